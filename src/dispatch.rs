//! Carries tokens to the rows of their experts and the results back.

use std::ops::Range;

use burn::tensor::{Bool, Tensor};

use crate::{
    ops::{self, Offsets, RowIndex},
    plan::DispatchPlan,
};

/// One trip: [`dispatch`](Self::dispatch) out, [`combine`](Self::combine) back. What [`MoeFeedForward`](crate::MoeFeedForward) does around its
/// experts, for experts of your own.
///
/// ```
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use burn_moe::{AssignmentConfig, AssignmentInput, Dispatcher, Phase, Router, RouterConfig};
/// # let device = Device::default();
/// let tokens = Tensor::<2>::random([6, 8], Distribution::Default, &device);
/// let router = RouterConfig::new().init(8, 4, &device);
/// let scores = router.forward(tokens.clone(), Phase::Inference).scores;
/// let plan = AssignmentConfig::default().assign(&AssignmentInput::new(scores, Phase::Inference));
///
/// let dispatcher = Dispatcher::new(&plan, &tokens);
/// let mut rows = dispatcher.dispatch(tokens);
/// for (expert, range) in dispatcher.ranges().into_iter().enumerate().filter(|(_, range)| !range.is_empty()) {
///     let own = rows.clone().slice([range.clone()]) * expert as f64; // your expert
///     rows = rows.slice_assign([range], own);
/// }
/// let output = dispatcher.combine(rows);
/// # assert_eq!(output.dims(), [6, 8]);
/// ```
#[derive(Debug, Clone)]
pub struct Dispatcher {
    index: RowIndex,
    gates: Tensor<2>,
    num_experts: usize,
    /// `[T, 1]`: tokens whose scores were not finite, where the index does not say so.
    lost: Option<Tensor<2, Bool>>,
}

impl Dispatcher {
    /// For tokens of the device and number type of `tokens` that go by `plan`.
    pub fn new(plan: &DispatchPlan, tokens: &Tensor<2>) -> Self {
        let device = tokens.device();
        let (index, lost) = plan.row_index(&device, ops::has_kernels(&device, tokens.dtype()));
        Self { index, gates: plan.gates().cast(tokens.dtype()), num_experts: plan.num_experts(), lost }
    }

    /// Which rows are each expert's, `[E]`. Some may be padding, which nobody reads: computing them does no harm.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        match &self.index {
            RowIndex::Ragged(index) => index.offsets.host.windows(2).map(|pair| pair[0]..pair[1]).collect(),
            RowIndex::Padded(index) => {
                let slots = index.slot_token.dims()[0] / self.num_experts.max(1);
                (0..self.num_experts).map(|expert| expert * slots..(expert + 1) * slots).collect()
            }
        }
    }

    /// Where each expert's rows begin; none when every expert has the same number.
    pub(crate) fn offsets(&self) -> Option<&Offsets> {
        self.index.offsets()
    }

    /// The token of each row, `[T, D] -> [N, D]`, sorted by expert; an empty row holds zeros.
    pub fn dispatch(&self, tokens: Tensor<2>) -> Tensor<2> {
        ops::dispatch(tokens, &self.index)
    }

    /// The gate-weighted sum of each token's rows, `[N, D] -> [T, D]`; exactly 0 for a token without one, but NaN for a valid token whose scores
    /// are not finite: a zero would hide it.
    pub fn combine(&self, rows: Tensor<2>) -> Tensor<2> {
        let output = ops::combine(rows, self.gates.clone(), &self.index);
        match &self.lost {
            Some(lost) => output.mask_fill(lost.clone(), f32::NAN),
            None => output,
        }
    }
}
