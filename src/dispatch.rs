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
/// # use burn_moe::{AssignmentConfig, Router, RouterConfig, routing::{AssignmentInput, Dispatcher, Phase}};
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
    /// `None` when no token has a row.
    index: Option<RowIndex>,
    gates: Tensor<2>,
    num_experts: usize,
    /// `[T, 1]`: tokens whose scores were not finite, where the index does not say so.
    lost: Option<Tensor<2, Bool>>,
}

impl Dispatcher {
    /// For tokens of the device and number type of `tokens` that go by `plan`.
    ///
    /// # Panics
    /// When the plan was made for another number of tokens.
    pub fn new(plan: &DispatchPlan, tokens: &Tensor<2>) -> Self {
        let (device, [num_tokens, _]) = (tokens.device(), tokens.dims());
        assert!(plan.num_tokens() == num_tokens, "a plan of {} tokens does not fit {num_tokens} tokens", plan.num_tokens());
        let (gates, num_experts) = (plan.gates().cast(tokens.dtype()), plan.num_experts());
        if plan.is_known_empty() {
            return Self { index: None, gates, num_experts, lost: plan.lost(&device) };
        }
        let (index, lost) = plan.row_index(&device, ops::has_kernels(&device, tokens.dtype()));
        Self { index: Some(index), gates, num_experts, lost }
    }

    /// Experts, `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Whether there is no row to compute, as far as is known without waiting for a device.
    pub fn is_empty(&self) -> bool {
        self.index.is_none()
    }

    /// Rows of all experts, `N`; some may be padding.
    pub fn num_rows(&self) -> usize {
        match &self.index {
            None => 0,
            Some(RowIndex::Ragged(index)) => index.row_choice.dims()[0],
            Some(RowIndex::Padded(index)) => index.slot_token.dims()[0],
        }
    }

    /// Which rows are each expert's, `[E]`. Some may be padding, which nobody reads: computing them does no harm.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        match &self.index {
            None => vec![0..0; self.num_experts],
            Some(RowIndex::Ragged(index)) => index.offsets.host.windows(2).map(|pair| pair[0]..pair[1]).collect(),
            Some(RowIndex::Padded(index)) => {
                let slots = index.slot_token.dims()[0] / self.num_experts.max(1);
                (0..self.num_experts).map(|expert| expert * slots..(expert + 1) * slots).collect()
            }
        }
    }

    /// Where each expert's rows begin; none when every expert has the same number.
    pub(crate) fn offsets(&self) -> Option<&Offsets> {
        self.index.as_ref().and_then(RowIndex::offsets)
    }

    /// The token of each row, `[T, D] -> [N, D]`, sorted by expert; an empty row holds zeros.
    ///
    /// # Panics
    /// When there are not `T` tokens.
    pub fn dispatch(&self, tokens: Tensor<2>) -> Tensor<2> {
        let ([found, d_model], [num_tokens, _]) = (tokens.dims(), self.gates.dims());
        assert!(found == num_tokens, "{found} tokens do not fit a plan of {num_tokens} tokens");
        match &self.index {
            Some(index) => ops::dispatch(tokens, index),
            None => Tensor::zeros([0, d_model], (&tokens.device(), tokens.dtype())),
        }
    }

    /// The gate-weighted sum of each token's rows, `[N, D] -> [T, D]`; exactly 0 for a token without one, but NaN for a valid token whose scores
    /// are not finite: a zero would hide it.
    ///
    /// # Panics
    /// When there are not `N` rows.
    pub fn combine(&self, rows: Tensor<2>) -> Tensor<2> {
        let ([found, d_model], expected) = (rows.dims(), self.num_rows());
        assert!(found == expected, "{found} rows do not fit a plan of {expected} rows");
        let output = match &self.index {
            Some(index) => ops::combine(rows, self.gates.clone(), index),
            None => Tensor::zeros([self.gates.dims()[0], d_model], (&rows.device(), rows.dtype())),
        };
        match &self.lost {
            Some(lost) => output.mask_fill(lost.clone(), f32::NAN),
            None => output,
        }
    }
}
