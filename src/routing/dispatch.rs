//! Carries tokens to the rows of their experts and the results back.

use std::ops::Range;

use burn::tensor::{Bool, DType, Tensor};

use crate::{
    ops::{self, Kernels, Offsets, RowIndex, with_kernels},
    routing::plan::DispatchPlan,
};

/// Dispatch and combine for one plan, for experts of your own: [`dispatch`](Self::dispatch) copies tokens to rows,
/// [`combine`](Self::combine) adds up the experts' outputs.
///
/// ```
/// # use burn::tensor::{Device, Distribution, Tensor};
/// # use burn_moe::{AssignmentConfig, Router, RouterConfig, routing::{AssignmentInput, Dispatcher, Phase}};
/// # let device = Device::default();
/// let tokens = Tensor::<2>::random([6, 8], Distribution::Default, &device);
/// let router = RouterConfig::new(8, 4).init(&device);
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
    non_finite: Option<Tensor<2, Bool>>,
    /// Which implementations the index was made for.
    kernels: Kernels,
}

impl Dispatcher {
    /// For tokens of the device and number type of `tokens`, `[T, D]`, that go by `plan`.
    ///
    /// # Panics
    /// When the plan was made for another number of tokens.
    pub fn new(plan: &DispatchPlan, tokens: &Tensor<2>) -> Self {
        let (device, [num_tokens, _]) = (tokens.device(), tokens.dims());
        assert!(plan.num_tokens() == num_tokens, "a plan of {} tokens does not fit {num_tokens} tokens", plan.num_tokens());
        let (gates, num_experts) = (plan.gates().cast(tokens.dtype()), plan.num_experts());
        let kernels = ops::chosen_kernels();
        // The reference takes rows without gaps, which it has to count.
        let has_kernels = ops::has_kernels(&device, tokens.dtype());
        if plan.is_known_empty() || (!has_kernels && plan.num_rows() == 0) {
            return Self { index: None, gates, num_experts, non_finite: plan.non_finite(&device), kernels };
        }
        let (index, non_finite) = plan.row_index(&device, has_kernels);
        Self { index: Some(index), gates, num_experts, non_finite, kernels }
    }

    /// Experts, `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Whether there is no row to compute, as far as is known without waiting for a device.
    pub fn is_empty(&self) -> bool {
        self.index.is_none()
    }

    /// Rows of all experts: `R`, plus empty ones if a GPU assigned the slots.
    pub fn num_rows(&self) -> usize {
        self.index.as_ref().map_or(0, RowIndex::num_rows)
    }

    /// The range of rows of each expert, `[E]`; waits for the device that assigned them. Rows of empty slots do not affect the output.
    pub fn ranges(&self) -> Vec<Range<usize>> {
        match self.offsets() {
            None => vec![0..0; self.num_experts],
            Some(offsets) => offsets.host().windows(2).map(|pair| pair[0]..pair[1]).collect(),
        }
    }

    /// Where each expert's rows begin; `None` without a row.
    pub(crate) fn offsets(&self) -> Option<&Offsets> {
        self.index.as_ref().map(|index| &index.offsets)
    }

    /// The index was made for implementations that the number type decides about.
    fn expect_dtype(&self, found: DType) {
        let expected = self.gates.dtype();
        assert!(found == expected, "values of {found:?} do not fit a dispatcher made for {expected:?}");
    }

    /// The token of each row, `[T, D] -> [R, D]`, sorted by expert; an empty row holds zeros.
    ///
    /// # Panics
    /// When there are not `T` tokens, or their number type is not that of the tokens that the dispatcher was made for.
    pub fn dispatch(&self, tokens: Tensor<2>) -> Tensor<2> {
        let ([found, d_model], [num_tokens, _]) = (tokens.dims(), self.gates.dims());
        assert!(found == num_tokens, "{found} tokens do not fit a plan of {num_tokens} tokens");
        self.expect_dtype(tokens.dtype());
        match &self.index {
            Some(index) => with_kernels(self.kernels, || ops::dispatch(tokens, index)),
            None => Tensor::zeros([0, d_model], (&tokens.device(), tokens.dtype())),
        }
    }

    /// The gate-weighted sum of each token's rows, `[R, D] -> [T, D]`; exactly 0 for a token without one, but NaN for a valid token whose scores
    /// are not finite: a zero would hide it.
    ///
    /// # Panics
    /// When there are not `R` rows, or their number type is another one.
    pub fn combine(&self, rows: Tensor<2>) -> Tensor<2> {
        let ([found, d_model], expected) = (rows.dims(), self.num_rows());
        assert!(found == expected, "{found} rows do not fit a plan of {expected} rows");
        self.expect_dtype(rows.dtype());
        let output = match &self.index {
            Some(index) => with_kernels(self.kernels, || ops::combine(rows, self.gates.clone(), index)),
            None => Tensor::zeros([self.gates.dims()[0], d_model], (&rows.device(), rows.dtype())),
        };
        match &self.non_finite {
            Some(non_finite) => output.mask_fill(non_finite.clone(), f32::NAN),
            None => output,
        }
    }
}
