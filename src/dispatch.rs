//! Carries tokens to the rows of their experts and the results back.

use burn::tensor::{Int, Tensor};

use crate::{
    ops::{self, RowIndex},
    plan::DispatchPlan,
};

/// One trip: [`dispatch`](Self::dispatch) out, [`combine`](Self::combine) back.
pub(crate) struct Dispatcher {
    index: RowIndex,
    gates: Tensor<2>,
}

impl Dispatcher {
    /// For `tokens` that go by `plan`.
    pub(crate) fn new(plan: &DispatchPlan, tokens: &Tensor<2>) -> Self {
        let device = tokens.device();
        let index = plan.row_index(&device, ops::has_kernels(&device, tokens.dtype()));
        Self { index, gates: plan.gates().cast(tokens.dtype()) }
    }

    /// Where each expert's rows begin, `[E + 1]`; none when every expert has the same number.
    pub(crate) fn offsets(&self) -> Option<&Tensor<1, Int>> {
        self.index.offsets()
    }

    /// `[T, D] -> [N, D]`, sorted by expert; an empty row holds zeros.
    pub(crate) fn dispatch(&self, tokens: Tensor<2>) -> Tensor<2> {
        ops::dispatch(tokens, &self.index)
    }

    /// `[N, D] -> [T, D]`: the gate-weighted sum of each token's rows, exactly 0 for a token without one.
    pub(crate) fn combine(&self, rows: Tensor<2>) -> Tensor<2> {
        ops::combine(rows, self.gates.clone(), &self.index)
    }
}
