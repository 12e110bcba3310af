//! One pre-norm block.

use burn::module::Module;
use burn::nn::LayerNorm;
use burn::nn::attention::MultiHeadAttention;
use burn::tensor::{Bool, Int, Tensor};

use super::{
    Mlp, RotaryPositions, TokenGrid,
    attention::{attention_at, self_attention},
    layout::{Layout, Looks},
};
use crate::{
    layer::{moe::MoeFeedForward, soft_moe::SoftMoeFeedForward},
    routing::{MoeInput, Phase, Routing, TokenMask, assignment::AssignmentConfig, capacity::Capacity},
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

/// What is known about tokens: masks for the routing, and places for rotary positions. Attention does not mask padding.
#[derive(Clone, Debug, Default)]
pub struct TokenMarks {
    /// `[B, N]`, false for padding, which gets no expert.
    pub valid: Option<Tensor<2, Bool>>,
    /// `[B, N]`, true for tokens that get their slots before all others, where tokens choose.
    pub protected: Option<Tensor<2, Bool>>,
    /// Where the tokens are, which blocks with [`RotaryPositions`] need to know, and others do not read.
    pub grid: Option<TokenGrid>,
}

/// The input of a [`BlockRouter`].
#[derive(Clone, Debug)]
pub struct BlockTokens<'a> {
    /// The block's index in its encoder.
    pub block: usize,
    /// What its feed-forward network reads, `[B, N, D]`.
    pub tokens: Tensor<3>,
    /// What is known about the tokens.
    pub marks: &'a TokenMarks,
    /// What the pass is for, as the block's layer sees it.
    pub phase: Phase,
}

/// A router of your own for the routed blocks of an encoder, in place of the layers' own; see
/// [`Encoder::forward_with`](super::Encoder::forward_with). Closures are such routers.
pub trait BlockRouter {
    /// The experts and gates of each token. Padding should have no expert; its output is zero in any case. The encoder sets the routing's number
    /// type, and its mask of valid tokens if it has none.
    fn route(&mut self, input: BlockTokens) -> Routing;
}

impl<F: FnMut(BlockTokens) -> Routing> BlockRouter for F {
    fn route(&mut self, input: BlockTokens) -> Routing {
        self(input)
    }
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
    /// The rotary positions of its queries and keys, if it has them.
    #[module(skip)]
    pub rotary: Option<RotaryPositions>,
}

impl TransformerBlock {
    /// One block; also the routing if the block routes tokens.
    ///
    /// # Shapes (`B` samples of `N` tokens)
    /// - x, output: `[B, N, D]`
    /// - mask: `[B, N, N]`, true where a token must not look
    ///
    /// # Panics
    /// When a shape does not fit, or the block has rotary positions and `marks` does not say where the tokens are.
    pub fn forward(&self, x: Tensor<3>, mask: Option<Tensor<3, Bool>>, marks: &TokenMarks) -> (Tensor<3>, Option<Routing>) {
        let [batch, num_tokens, _] = x.dims();
        let layout = Layout::whole([batch, num_tokens], mask.map_or(Looks::AtAll, Looks::Mask)).turned(self, marks, &x.device());
        let (rows, routing) = self.run(layout.rows(x), &layout, marks, None, None);
        (layout.tokens(rows), routing)
    }

    /// What the feed-forward network reads, `[B, N, D]`, where every token looks at all others.
    pub(crate) fn feed_forward_input(&self, x: Tensor<3>, marks: &TokenMarks) -> Tensor<3> {
        let [batch, num_tokens, _] = x.dims();
        let layout = Layout::whole([batch, num_tokens], Looks::AtAll).turned(self, marks, &x.device());
        let mut read = None;
        self.run(layout.rows(x), &layout, marks, None, Some(&mut |tokens| read = Some(tokens)));
        read.expect("the feed-forward network was run")
    }

    /// [`forward`](Self::forward) on the rows of a layout; `router` is one to use instead of the layer's own, with the block's index, and `observe`
    /// sees what the feed-forward network reads, `[B, N, D]`.
    pub(super) fn run(
        &self,
        rows: Tensor<2>,
        layout: &Layout,
        marks: &TokenMarks,
        router: Option<(usize, &mut dyn BlockRouter)>,
        observe: Option<&mut dyn FnMut(Tensor<3>)>,
    ) -> (Tensor<2>, Option<Routing>) {
        let attended = self_attention(&self.attention, self.norm_attention.forward(rows.clone()), layout);
        let rows = rows + attended;
        let normed = self.norm_feed_forward.forward(rows.clone());
        if let Some(observe) = observe {
            observe(layout.tokens(normed.clone()));
        }
        let (output, routing) = match &self.feed_forward {
            FeedForward::Dense(mlp) => (mlp.forward(normed), None),
            sparse => {
                let (output, routing) = sparse.forward(layout.tokens(normed), marks, router);
                (layout.rows(output), routing)
            }
        };
        (rows + output, routing)
    }

    /// [`run`](Self::run) for one token of each sample, at inference: `[R, D], [B, 1] -> [B, D]`. The feed-forward network must take each token by
    /// itself.
    pub(super) fn run_at(&self, rows: Tensor<2>, layout: &Layout, at: &Tensor<2, Int>) -> Tensor<2> {
        let attended = attention_at(&self.attention, self.norm_attention.forward(rows.clone()), layout, at);
        let rows = rows.select(0, layout.rows_at(at)) + attended;
        let normed = self.norm_feed_forward.forward(rows.clone());
        let output = match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.forward(normed),
            FeedForward::Moe(moe) => moe.forward(normed).output,
            FeedForward::SoftMoe(_) => unreachable!("soft experts mix tokens"),
        };
        rows + output
    }
}

impl FeedForward {
    /// Whether, at inference, the output of a token depends on that token alone.
    pub(super) fn is_token_by_token(&self) -> bool {
        match self {
            Self::Dense(_) => true,
            Self::Moe(moe) => match &moe.assignment {
                AssignmentConfig::TokenChoice(config) => config.inference_capacity == Capacity::Dropless,
                _ => false,
            },
            Self::SoftMoe(_) => false,
        }
    }

    /// The network alone, `[B, N, D] -> [B, N, D]`; also the routing if tokens are routed.
    fn forward(
        &self,
        x: Tensor<3>,
        marks: &TokenMarks,
        router: Option<(usize, &mut dyn BlockRouter)>,
    ) -> (Tensor<3>, Option<Routing>) {
        let input = |x| match &marks.valid {
            Some(valid) => MoeInput::new(x).valid(valid.clone()),
            None => MoeInput::new(x),
        };
        match (self, router) {
            (Self::Dense(mlp), _) => (mlp.forward(x), None),
            (Self::SoftMoe(soft), _) => (soft.forward(input(x)).output, None),
            (Self::Moe(moe), Some((block, router))) => {
                let phase = moe.phase(&x.device());
                let mut routing = router.route(BlockTokens { block, tokens: x.clone(), marks, phase });
                routing.valid = routing.valid.or_else(|| marks.valid.clone().map(TokenMask::new));
                routing.token_dtype = x.dtype();
                (moe.forward_with(input(x), &routing.plan), Some(routing))
            }
            (Self::Moe(moe), None) => {
                let output = match marks.protected.as_ref().filter(|_| moe.assignment.can_protect()) {
                    Some(protected) => moe.forward(input(x).protected(protected.clone())),
                    None => moe.forward(input(x)),
                };
                (output.output, Some(output.routing))
            }
        }
    }

    /// Whether there are experts.
    pub fn is_sparse(&self) -> bool {
        !matches!(self, Self::Dense(_))
    }
}
