//! One pre-norm block.

use burn::module::Module;
use burn::nn::LayerNorm;
use burn::nn::attention::MultiHeadAttention;
use burn::tensor::{Bool, Tensor};

use super::{Mlp, attention::self_attention};
use crate::{
    moe::MoeFeedForward,
    routing::{MoeInput, Routing},
    soft_moe::SoftMoeFeedForward,
};

/// The feed-forward network of a block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a handful per model
pub enum FeedForward {
    /// Every token passes the same network.
    Dense(Mlp),
    /// Each token passes its own choice of experts.
    Moe(MoeFeedForward),
    /// Every expert computes mixtures of the tokens.
    SoftMoe(SoftMoeFeedForward),
}

/// What routing should know about the tokens; nothing else reads it.
#[derive(Clone, Debug, Default)]
pub struct TokenMarks {
    /// `[B, N]`, false for padding, which gets no expert.
    pub valid: Option<Tensor<2, Bool>>,
    /// `[B, N]`, true for tokens that are seated before all others, where tokens choose.
    pub protected: Option<Tensor<2, Bool>>,
}

/// `h = x + MHA(LN₁(x))`, `y = h + FFN(LN₂(h))`; made by [`EncoderConfig`](super::EncoderConfig).
#[derive(Module, Debug)]
pub struct TransformerBlock {
    /// Before attention.
    pub norm_attention: LayerNorm,
    /// Self-attention.
    pub attention: MultiHeadAttention,
    /// Before the feed-forward network.
    pub norm_feed_forward: LayerNorm,
    /// Dense or sparse.
    pub feed_forward: FeedForward,
}

impl TransformerBlock {
    /// One block; also the routing if the block is sparse.
    ///
    /// # Shapes (`B` samples of `N` tokens)
    /// - x, output: `[B, N, D]`
    /// - mask: `[B, N, N]`, true where a token must not look
    pub fn forward(&self, x: Tensor<3>, mask: Option<Tensor<3, Bool>>, marks: &TokenMarks) -> (Tensor<3>, Option<Routing>) {
        self.run(x, mask, marks, |_| ())
    }

    /// [`forward`](Self::forward); `observe` sees what the feed-forward network reads.
    pub(crate) fn run(
        &self,
        x: Tensor<3>,
        mask: Option<Tensor<3, Bool>>,
        marks: &TokenMarks,
        observe: impl FnOnce(&Tensor<3>),
    ) -> (Tensor<3>, Option<Routing>) {
        let attended = self_attention(&self.attention, self.norm_attention.forward(x.clone()), mask);
        let x = x + attended;
        let normed = self.norm_feed_forward.forward(x.clone());
        observe(&normed);
        let (output, routing) = self.feed_forward.forward(normed, marks);
        (x + output, routing)
    }
}

impl FeedForward {
    /// The network alone, `[B, N, D] -> [B, N, D]`; also the routing if it is sparse.
    fn forward(&self, x: Tensor<3>, marks: &TokenMarks) -> (Tensor<3>, Option<Routing>) {
        let input = |x| match &marks.valid {
            Some(valid) => MoeInput::new(x).valid(valid.clone()),
            None => MoeInput::new(x),
        };
        let output = match self {
            Self::Dense(mlp) => return (mlp.forward(x), None),
            Self::Moe(moe) => match marks.protected.as_ref().filter(|_| moe.assignment.can_protect()) {
                Some(protected) => moe.forward(input(x).protected(protected.clone())),
                None => moe.forward(input(x)),
            },
            Self::SoftMoe(soft) => soft.forward(input(x)),
        };
        (output.output, Some(output.routing))
    }

    /// Whether there are experts.
    pub fn is_sparse(&self) -> bool {
        !matches!(self, Self::Dense(_))
    }
}
