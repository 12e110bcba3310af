//! Low-rank adapters for a whole CLIP.

use burn::module::{Lora, Module, ModuleVisitor, ParamGroup};

use super::Clip;
use crate::{
    LoraOptions,
    support::{error::expect_valid, param::made},
    transformer::FeedForward,
};

/// Whether some parameter has an attachment of this name: an adapter of low rank, burn's or ours, or packed weights.
fn has(name: &'static str, model: &Clip) -> bool {
    struct Found(&'static str, bool);
    impl ModuleVisitor for Found {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1 |= name == self.0;
        }
    }
    let mut found = Found(name, false);
    model.visit(&mut found);
    found.1
}

impl Clip {
    /// The model frozen, with low-rank adapters on attention, dense feed-forward networks and experts: only these are trained. Routers stay as they
    /// are, and so does a balancing bias unless you move it.
    ///
    /// Matrices get burn's adapters, experts [those of this crate](crate::ExpertMlp::with_lora); all are parameters at paths with `.lora.` in them, which save
    /// and load alone. The scale is in no record: attach adapters with the same options before loading.
    ///
    /// ```
    /// use burn::module::{Module, ParamGroup};
    /// # use burn::tensor::Device;
    /// # use burn_moe::{LoraOptions, clip::{ClipConfig, SparseClipConfig, TextConfig, VisionConfig}, transformer::EncoderConfig};
    /// # let encoder = || EncoderConfig::new(8, 2, 2, 16);
    /// # let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    /// # let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10).sparse(SparseClipConfig::clip_up());
    /// # let model = config.init(&Device::default().autodiff());
    /// let options = LoraOptions::new().with_rank(4);
    /// let tuned = model.clone().with_lora(&options); // and train it
    /// let adapters = tuned.clone().into_record_group(ParamGroup::from_predicate(".lora."));
    ///
    /// let again = model.with_lora(&options).load_record(adapters.allow_partial(true));
    /// let merged = again.valid().materialize(); // plain weights again
    /// # assert_eq!(merged.num_params(), tuned.materialize().num_params());
    /// ```
    ///
    /// # Panics
    /// When the options cannot be used, or there are adapters or packed weights already.
    #[track_caller]
    pub fn with_lora(self, options: &LoraOptions) -> Self {
        expect_valid(options.validate());
        // burn would freeze the old ones and adapt them in turn.
        assert!(!has("lora", &self), "the model has adapters already: merge them first, by `materialize`");
        assert!(!has("packed", &self), "the model's weights are packed: make them plain first, by `materialize`");
        let matrices = ParamGroup::from_any_predicates(vec![".attention.", ".linear_in.", ".linear_gate.", ".linear_out."]);
        let mut adapted = made(self).apply_lora(Lora::new(options.rank, options.alpha).set_param_group(matrices));
        for encoder in [&mut adapted.vision.encoder, &mut adapted.text.encoder] {
            for block in &mut encoder.blocks {
                let experts = match &mut block.feed_forward {
                    FeedForward::Dense(_) => continue,
                    FeedForward::Moe(moe) => {
                        moe.shared_expert = moe.shared_expert.take().map(|shared| shared.with_lora(options));
                        &mut moe.experts
                    }
                    FeedForward::SoftMoe(soft) => &mut soft.experts,
                };
                *experts = experts.clone().with_lora(options);
            }
        }
        adapted
    }
}
