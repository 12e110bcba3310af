//! What one sparse layer decided on one batch, and what a routing is made from: scores, masks, assignments, plans.

pub(crate) mod assignment;
pub(crate) mod balancing;
pub(crate) mod capacity;
mod dispatch;
mod input;
mod mask;
mod normalization;
mod phase;
mod plan;
pub(crate) mod router;
mod router_options;
mod totals;

pub use assignment::AssignmentInput;
pub use dispatch::Dispatcher;
pub(crate) use input::{FlatTokens, shaped};
pub use input::{MoeInput, MoeOutput};
pub use mask::TokenMask;
pub use phase::Phase;
pub use plan::DispatchPlan;
pub use router::RouterOutput;
pub use totals::BatchTotals;

use burn::tensor::{Bool, DType, Tensor};

use crate::ops;
use router::non_finite_rows;

/// The routing of one layer on one batch. Everything that losses and statistics need is in here; nothing is kept elsewhere.
#[derive(Debug, Clone)]
pub struct Routing {
    /// What the router computed, noise included.
    pub router: RouterOutput,
    /// Which tokens are not padding; `None`: all.
    pub valid: Option<TokenMask>,
    /// Which expert computes which token, and with which gate.
    pub plan: DispatchPlan,
    /// The number type of the layer's tokens, in which losses over the routing are returned.
    pub token_dtype: DType,
}

impl Routing {
    /// The routing of a router of your own, for losses and statistics: what it computed and the plan that was made from it. All tokens are
    /// valid; set the field where it is otherwise.
    pub fn new(router: RouterOutput, plan: DispatchPlan) -> Self {
        let token_dtype = router.probs.dtype();
        Self { router, valid: None, plan, token_dtype }
    }

    /// Reads the plan and the mask, if a device has them, so that their functions, and whatever counts the routing, need not wait: for a device that
    /// the host cannot wait for, as in a browser.
    pub async fn read_async(&self) {
        self.plan.read_async().await;
        if let Some(valid) = &self.valid {
            valid.read_async().await;
        }
    }

    /// Valid tokens, which are not padding.
    pub fn num_valid(&self) -> usize {
        match &self.valid {
            Some(valid) => valid.as_slice().iter().filter(|&&valid| valid).count(),
            None => self.plan.num_tokens(),
        }
    }

    /// Tokens that count in losses: valid ones whose probabilities are finite. Waits for the device.
    pub fn num_counted(&self) -> usize {
        if !ops::can_wait_for(&self.router.probs.device()) {
            // The same for this crate's routers.
            return self.num_valid() - self.plan.non_finite_tokens().len();
        }
        self.counted().into_scalar::<f32>() as usize
    }

    /// How many tokens count in losses, `[1]`, f32, where the probabilities are.
    pub(crate) fn counted(&self) -> Tensor<1> {
        if self.plan.num_tokens() == 0 {
            return Tensor::zeros([1], (&self.router.probs.device(), DType::F32));
        }
        count_of(self.uncounted())
    }

    /// Mean over valid tokens of finite probabilities of a value per token, `[T, N] -> [1, N]`; zeros when there are none.
    pub(crate) fn mean_over_valid(&self, per_token: Tensor<2>) -> Tensor<2> {
        let (device, dtype, [num_tokens, width]) = (per_token.device(), per_token.dtype(), per_token.dims());
        if num_tokens == 0 {
            return Tensor::zeros([1, width], (&device, dtype));
        }
        let uncounted = self.uncounted();
        // Counted where the sum is, which does not wait for the host.
        let count = count_of(uncounted.clone()).cast(dtype).clamp_min(1.0).unsqueeze_dim(1);
        // A fill, not a product: what such a token holds may not be finite.
        per_token.mask_fill(uncounted, 0.0).sum_dim(0) / count
    }

    /// Tokens that count in no loss, `[T, 1]`: padding, and those whose probabilities are not finite.
    fn uncounted(&self) -> Tensor<2, Bool> {
        let not_finite = non_finite_rows(self.router.probs.clone());
        match &self.valid {
            Some(valid) => not_finite.bool_or(valid.unset(&self.router.probs.device())),
            None => not_finite,
        }
    }
}

/// How many flags `[T, 1]` are not set, `[1]`.
fn count_of(uncounted: Tensor<2, Bool>) -> Tensor<1> {
    uncounted.bool_not().float().cast(DType::F32).sum()
}

/// `H(p) = −Σ p ln p` of each row, `[N, E] -> [N, 1]`.
pub(crate) fn entropy(probs: Tensor<2>) -> Tensor<2> {
    // 0 · ln 0 is 0: the clamp keeps the logarithm finite, and above what a device may flush to zero.
    (probs.clone() * probs.clamp_min(1e-30).log()).sum_dim(1).neg()
}
