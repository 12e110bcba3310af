//! A stack of blocks.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{Bool, Int, Tensor, assert_shape};

use super::{
    BlockRouter, FeedForward, Padding, Protection, TokenMarks, TransformerBlock,
    layout::{Layout, Looks},
};
use crate::{
    layer::packed::run_pass,
    routing::{BatchTotals, Routing},
};

/// Pre-norm transformer blocks, one after the other.
#[derive(Module, Debug)]
pub struct Encoder {
    /// The blocks.
    pub blocks: Vec<TransformerBlock>,
    /// Whether marked tokens get their slots first.
    #[module(skip)]
    pub protection: Protection,
    /// Whether padding is routed.
    #[module(skip)]
    pub padding: Padding,
}

/// What the feed-forward networks of an encoder read: data to calibrate on.
#[derive(Debug, Clone)]
pub struct FeedForwardInputs {
    /// One per block, `[B, N, D]`.
    pub tokens: Vec<Tensor<3>>,
    /// `[B, N]`, false for padding; `None`: all valid.
    pub valid: Option<Tensor<2, Bool>>,
}

/// What an [`Encoder`] returns.
#[derive(Debug, Clone)]
pub struct EncoderOutput {
    /// `[B, N, D]`; in training of no meaning where a token is not valid.
    pub hidden: Tensor<3>,
    /// One per routed block, in order.
    pub routings: Vec<Routing>,
}

impl Encoder {
    /// Indices of the routed blocks, in the order of [`EncoderOutput::routings`].
    pub fn routed_blocks(&self) -> impl Iterator<Item = usize> {
        self.blocks
            .iter()
            .enumerate()
            .filter(|(_, block)| matches!(block.feed_forward, FeedForward::Moe(_)))
            .map(|(index, _)| index)
    }

    /// Experts of each routed block.
    #[cfg(feature = "train")]
    pub(crate) fn experts_of_routed_blocks(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().filter_map(|block| match &block.feed_forward {
            FeedForward::Moe(moe) => Some(moe.router.weight.dims()[1]),
            FeedForward::Dense(_) | FeedForward::SoftMoe(_) => None,
        })
    }

    /// Moves the balancing biases of all routed blocks by what one training step routed; see
    /// [`BalancingOptions`](crate::BalancingOptions). Without such biases the encoder stays as it is.
    ///
    /// # Panics
    /// When there is not one routing per routed block.
    pub fn update_balancing_bias(self, routings: &[Routing]) -> Self {
        let mut totals = BatchTotals::default();
        totals.add(routings);
        self.update_balancing_bias_by(&totals)
    }

    /// The same by what the micro-batches of one training step routed together. A router that is frozen on an autodiff device keeps its bias.
    ///
    /// # Panics
    /// When the totals are not of as many layers as there are routed blocks.
    pub fn update_balancing_bias_by(mut self, totals: &BatchTotals) -> Self {
        let (layers, routed_blocks) = (totals.requested.len(), self.routed_blocks().count());
        assert_eq!(layers, routed_blocks, "routings of {layers} layers do not fit {routed_blocks} routed blocks");
        let mut loads = totals.requested.iter();
        for block in &mut self.blocks {
            if let FeedForward::Moe(moe) = &mut block.feed_forward {
                let load = loads.next().expect("they were counted");
                let weight = moe.router.weight.val();
                if weight.is_require_grad() || !weight.device().is_autodiff() {
                    moe.router = moe.router.clone().update_balancing_bias(load);
                }
            }
        }
        self
    }

    /// Passes tokens through all blocks.
    ///
    /// # Shapes (`B` samples of `N` tokens)
    /// - x, hidden: `[B, N, D]`
    /// - marks: `[B, N]` each; protected tokens count only where [`RoutedLayerConfig::protection`](super::RoutedLayerConfig::protection) says so
    ///
    /// With `causal`, a token looks only at itself and at those before it.
    ///
    /// # Panics
    /// When a shape does not fit, or the encoder has rotary positions and `marks` does not say where the tokens are.
    pub fn forward(&self, x: Tensor<3>, marks: TokenMarks, causal: bool) -> EncoderOutput {
        run_pass(self.first_map(), || self.run(x, marks, causal, None, None))
    }

    /// The same with a router of your own in place of the layers' routers; arguments as for [`forward`](Self::forward).
    ///
    /// # Panics
    /// When a shape does not fit, or a plan does not fit its block.
    pub fn forward_with(&self, x: Tensor<3>, marks: TokenMarks, causal: bool, router: &mut dyn BlockRouter) -> EncoderOutput {
        self.run(x, marks, causal, Some(router), None)
    }

    /// What the feed-forward network of each block reads; arguments as for [`forward`](Self::forward).
    ///
    /// # Panics
    /// When a shape does not fit.
    pub fn feed_forward_inputs(&self, x: Tensor<3>, marks: TokenMarks, causal: bool) -> FeedForwardInputs {
        let mut inputs = FeedForwardInputs { tokens: Vec::new(), valid: marks.valid.clone() };
        self.run(x, marks, causal, None, Some(&mut |tokens| inputs.tokens.push(tokens)));
        inputs
    }

    /// How the tokens lie in rows, those of padding left out if it `packs` and can; of the marks, those stay that this encoder heeds.
    pub(super) fn lay_out(&self, x: &Tensor<3>, marks: &mut TokenMarks, causal: bool, packs: bool) -> Layout {
        let [batch, num_tokens, _] = x.dims();
        for mark in [&marks.valid, &marks.protected].into_iter().flatten() {
            assert_shape!(mark, [batch, num_tokens]);
        }
        if self.protection == Protection::None {
            marks.protected = None;
        }
        if self.padding == Padding::Routed {
            marks.valid = None;
        }
        let rotary = self.blocks.first().filter(|block| block.rotary.is_some());
        let layout = match (causal, packs && rotary.is_none()) {
            (true, true) => Layout::packed(x, marks),
            (true, false) => Layout::whole([batch, num_tokens], Looks::Back),
            (false, _) => Layout::whole([batch, num_tokens], Looks::AtAll),
        };
        match rotary {
            Some(block) => layout.turned(block, marks, &x.device()),
            None => layout,
        }
    }

    /// All blocks in turn; `observe` sees what each feed-forward network reads.
    fn run(
        &self,
        x: Tensor<3>,
        mut marks: TokenMarks,
        causal: bool,
        mut router: Option<&mut dyn BlockRouter>,
        mut observe: Option<&mut dyn FnMut(Tensor<3>)>,
    ) -> EncoderOutput {
        // At inference a row for every token, as in PyTorch's models, whose last states of padding some programs compare.
        let layout = self.lay_out(&x, &mut marks, causal, x.device().is_autodiff());
        let mut rows = layout.rows(x);
        let mut routings = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let router = router.as_mut().map(|router| (index, &mut **router as &mut dyn BlockRouter));
            let observe = observe.as_mut().map(|observe| &mut **observe as &mut dyn FnMut(Tensor<3>));
            let (next, routing) = block.run(rows, &layout, &marks, router, observe);
            rows = next;
            routings.extend(routing);
        }
        EncoderOutput { hidden: layout.tokens(rows), routings }
    }

    /// One token of each sample: what [`forward`](Self::forward) makes of it, to rounding, without what it does not depend on. Padding is not computed
    /// where there is attention for samples of different lengths (burn's CPU backend), and the last block is computed for this token alone, unless what
    /// its experts do depends on other tokens, or the input is on an autodiff device.
    ///
    /// # Shapes
    /// - x, marks: as for [`forward`](Self::forward)
    /// - at: `[B, 1]`, places of tokens that are not padding
    /// - output: `[B, D]`
    ///
    /// # Panics
    /// When a shape does not fit, or a place is one of padding that is not computed.
    pub fn forward_at(&self, x: Tensor<3>, marks: TokenMarks, causal: bool, at: Tensor<2, Int>) -> Tensor<2> {
        run_pass(self.first_map(), || self.run_at(x, marks, causal, at))
    }

    fn first_map(&self) -> Option<&Linear> {
        self.blocks.first().map(|block| &block.attention.query)
    }

    fn run_at(&self, x: Tensor<3>, mut marks: TokenMarks, causal: bool, at: Tensor<2, Int>) -> Tensor<2> {
        let (is_training, [batch, _, _]) = (x.device().is_autodiff(), x.dims());
        assert_shape!(at, [batch, 1]);
        let layout = self.lay_out(&x, &mut marks, causal, true);
        let mut rows = layout.rows(x);
        let (last, before) = self.blocks.split_last().expect("an encoder has blocks");
        for block in before {
            (rows, _) = block.run(rows, &layout, &marks, None, None);
        }
        if !is_training && last.feed_forward.is_token_by_token() {
            return last.run_at(rows, &layout, &at);
        }
        let (rows, _) = last.run(rows, &layout, &marks, None, None);
        rows.select(0, layout.rows_at(&at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layer::experts::FeedForwardForm,
        transformer::{EncoderConfig, RoutedLayerConfig, SparseEncoderConfig, SparseLayer},
    };
    use burn::tensor::Device;

    #[test]
    #[should_panic(expected = "`n_heads` (3) must divide `d_model` (8)")]
    fn heads_must_divide_the_width() {
        EncoderConfig::new(8, 3, 2, 16).init(&Device::default());
    }

    #[test]
    #[cfg(feature = "flex")]
    #[should_panic(expected = "token 0 of sample 0 is padding: 0 of its tokens are not")]
    fn what_is_taken_of_a_sample_is_no_padding() {
        let device = Device::flex();
        let valid = Tensor::from_data([[false, false], [true, false]], &device);
        let marks = TokenMarks { valid: Some(valid), ..TokenMarks::default() };
        let encoder = EncoderConfig::new(8, 2, 2, 16).init(&device);
        encoder.forward_at(Tensor::ones([2, 2, 8], &device), marks, true, Tensor::from_data([[0], [0]], &device));
    }

    #[test]
    fn every_second_block_is_sparse_by_default() {
        let config = EncoderConfig::new(8, 2, 4, 16).with_sparse(Some(SparseEncoderConfig::new()));
        let encoder = config.init(&Device::default());
        let sparse: Vec<bool> = encoder.blocks.iter().map(|b| b.feed_forward.is_sparse()).collect();
        assert_eq!(sparse, [false, true, false, true]);
        assert_eq!(config.cost(1).params_total, encoder.num_params() as u64);
    }

    #[test]
    fn every_kind_of_sparse_block_has_the_parameters_that_its_cost_counts() {
        let sparse = SparseEncoderConfig::new();
        for sparse in [
            sparse
                .clone()
                .with_form(Some(FeedForwardForm::Gated))
                .with_layer(RoutedLayerConfig::new().with_shared_expert(Some(5)).into()),
            sparse.clone().with_d_ff(Some(4)),
            sparse.with_layer(SparseLayer::Soft { slots_per_expert: 3 }),
        ] {
            let routed = usize::from(matches!(sparse.layer, SparseLayer::Routed(_)));
            let config = EncoderConfig::new(8, 2, 2, 16).with_sparse(Some(sparse));
            let device = Device::default();
            let encoder = config.init(&device);
            assert_eq!(config.cost(1).params_total, encoder.num_params() as u64);
            let output = encoder.forward(Tensor::ones([2, 3, 8], &device), TokenMarks::default(), false);
            assert_eq!((output.hidden.dims(), output.routings.len()), ([2, 3, 8], routed));
        }
    }
}
