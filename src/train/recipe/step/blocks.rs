//! Passes that keep what goes into each block, and compute the block again on the way back.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Gradients, Int, Tensor};

use super::{StepSetting, embedded, scalar, seen_patches, towards};
use crate::{
    clip::{Clip, VisionTower},
    routing::{BatchTotals, Routing},
    train::data::Batch,
    transformer::{Encoder, EncoderOutput, KeptInputs, Part},
};

/// A piece that has passed the model, of which what went into each block is left.
pub(super) struct Recomputable<'a> {
    /// Normalised, `[B, P]`.
    image: Tensor<2>,
    text: Tensor<2>,
    vision_kept: KeptInputs,
    text_kept: KeptInputs,
    /// Where each text ends.
    end: Tensor<2, Int>,
    draws: Draws<'a>,
}

/// What must be drawn alike in all passes.
struct Draws<'a> {
    /// The first pair's place in the batch.
    first: usize,
    is_noisy: bool,
    setting: StepSetting<'a>,
}

impl Draws<'_> {
    /// Called before a block of a tower is computed: whenever that is, its router draws the same.
    fn before(&self, tower: u64, block: usize) {
        if self.is_noisy {
            let place = (tower << 8 | block as u64) << 40 | self.first as u64;
            self.setting.device.seed(self.setting.seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
    }
}

impl<'a> Recomputable<'a> {
    /// Passes a model without gradients.
    pub(super) fn new(untracked: &Clip, piece: &Batch, first: usize, is_noisy: bool, setting: StepSetting<'a>) -> Self {
        let draws = Draws { first, is_noisy, setting };
        let (tokens, marks) = draws.vision_tokens(untracked, piece);
        let vision_kept = untracked.vision.encoder.forward_keeping(tokens, marks, false, &|block| draws.before(0, block));
        let (tokens, marks, end) = untracked.text.embed(piece.tokens(setting.device));
        let text_kept = untracked.text.encoder.forward_keeping(tokens, marks, true, &|block| draws.before(1, block));
        let encoded = |kept: &KeptInputs| EncoderOutput { hidden: kept.hidden().output, routings: Vec::new() };
        let image = embedded(untracked.vision.project(encoded(&vision_kept)).embedding).detach();
        let text = embedded(untracked.text.project(encoded(&text_kept), end.clone()).embedding).detach();
        Self { image, text, vision_kept, text_kept, end, draws }
    }

    /// Of images and texts.
    pub(super) fn embeddings(&self) -> [&Tensor<2>; 2] {
        [&self.image, &self.text]
    }

    pub(super) fn image_routings(&self) -> &[Routing] {
        &self.vision_kept.routings
    }

    pub(super) fn text_routings(&self) -> &[Routing] {
        &self.text_kept.routings
    }

    /// From the gradients of the embeddings and the auxiliary losses, which it returns; `model` is the one with gradients. `add` gets those of
    /// each part.
    pub(super) fn backward(
        self,
        model: &Clip,
        piece: &Batch,
        [image, text]: [Tensor<2>; 2],
        totals: [&BatchTotals; 2],
        add: &mut dyn FnMut(Gradients),
    ) -> f64 {
        let Self { vision_kept, text_kept, end, draws, .. } = self;
        let frozen = |tower, kept: &KeptInputs| draws.losses(tower, &kept.routings, totals);
        let mut auxiliary = 0.0;
        if has_trained(&model.vision) {
            let project = |hidden| model.vision.project(EncoderOutput { hidden, routings: Vec::new() }).embedding;
            let (rows, value) = draws.encoder(0, &model.vision.encoder, &vision_kept, project, image, totals, add);
            let VisionTower { patch_embedding, class_embedding, position_embedding, norm_pre, .. } = &model.vision;
            if has_trained(patch_embedding)
                || has_trained(class_embedding)
                || has_trained(position_embedding)
                || has_trained(norm_pre)
            {
                let (tokens, _) = draws.vision_tokens(model, piece);
                add(towards(vision_kept.rows(tokens), rows).backward());
            }
            auxiliary += value;
        } else {
            auxiliary += frozen(0, &vision_kept);
        }
        if has_trained(&model.text) {
            let project = |hidden| model.text.project(EncoderOutput { hidden, routings: Vec::new() }, end).embedding;
            let (rows, value) = draws.encoder(1, &model.text.encoder, &text_kept, project, text, totals, add);
            if has_trained(&model.text.token_embedding) || has_trained(&model.text.position_embedding) {
                let (tokens, ..) = model.text.embed(piece.tokens(draws.setting.device));
                add(towards(text_kept.rows(tokens), rows).backward());
            }
            auxiliary += value;
        } else {
            auxiliary += frozen(1, &text_kept);
        }
        auxiliary
    }
}

/// Whether some parameter of a module gets a gradient: all of a tower, adapters of a frozen one, or none.
fn has_trained<M: Module>(module: &M) -> bool {
    struct Any(bool);
    impl ModuleVisitor for Any {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0 |= param.is_require_grad();
        }
    }
    let mut any = Any(false);
    module.visit(&mut any);
    any.0
}

impl Draws<'_> {
    fn vision_tokens(&self, model: &Clip, piece: &Batch) -> (Tensor<3>, crate::transformer::TokenMarks) {
        let images = piece.images(self.setting.device).cast(model.vision.patch_embedding.weight.dtype());
        model.vision.embed(images, seen_patches(model, piece.len(), self.first, self.setting))
    }

    /// The auxiliary losses of a tower that has no gradients.
    fn losses(&self, tower: usize, routings: &[Routing], totals: [&BatchTotals; 2]) -> f64 {
        let loss = |(layer, routing)| scalar(&self.setting.auxiliary.layer_of_micro_batch(tower, layer, routing, totals));
        routings.iter().enumerate().map(loss).sum()
    }

    /// Goes back through the blocks of a tower; the gradient of what went into the first one, `[R, D]`, and the value of the auxiliary losses.
    #[allow(clippy::too_many_arguments)]
    fn encoder(
        &self,
        tower: usize,
        encoder: &Encoder,
        kept: &KeptInputs,
        project: impl FnOnce(Tensor<3>) -> Tensor<2>,
        gradient: Tensor<2>,
        totals: [&BatchTotals; 2],
        add: &mut dyn FnMut(Gradients),
    ) -> (Tensor<2>, f64) {
        let mut back = |total: Tensor<1>, leaf: Tensor<2>| {
            let mut found = total.backward();
            let gradient = leaf.grad_remove(&mut found).expect("the result depends on what went in");
            add(found);
            gradient
        };
        let Part { leaf, output, .. } = kept.hidden();
        let mut rows = back(towards(embedded(project(output)), gradient), leaf);
        let mut value = 0.0;
        let mut layer = kept.routings.len();
        for index in (0..encoder.blocks.len()).rev() {
            self.before(tower as u64, index);
            let Part { leaf, output, routing } = kept.block(encoder, index);
            let mut total = towards(output, rows);
            if let Some(routing) = routing {
                layer -= 1;
                let part = self.setting.auxiliary.layer_of_micro_batch(tower, layer, &routing, totals);
                value += scalar(&part);
                total = total + part.cast(DType::F32);
            }
            rows = back(total, leaf);
        }
        (rows, value)
    }
}
