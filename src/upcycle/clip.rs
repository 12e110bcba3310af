//! The whole CLIP.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::{
    Probe, UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, Upcycled,
    layer::replace,
    report::deviation,
    transformer::{encoder, norm, same_place},
};
use crate::clip::{Clip, TextTower, VisionTower};

/// Every second block of both towers becomes sparse with [`SparseClipConfig::clip_up`](crate::clip::SparseClipConfig::clip_up).
/// The report's deviation is that of the embeddings, normalised.
impl UpcycleFromDense<Clip> for Clip {
    fn upcycle_from_dense(mut self, dense: &Clip, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let probe = match &options.probe {
            None => None,
            Some(Probe::ImagesAndTexts { images, tokens }) => Some((images.clone(), tokens.clone())),
            Some(Probe::Tokens { .. }) => return Err(UpcycleError::Probe { expected: "images and texts", found: "tokens" }),
        };
        let mut calibrations = [None, None];
        match options.calibration_batch()? {
            None => {}
            Some(Probe::ImagesAndTexts { images, tokens }) => {
                calibrations =
                    [Some(dense.vision.feed_forward_inputs(images.clone())), Some(dense.text.feed_forward_inputs(tokens.clone()))];
            }
            Some(Probe::Tokens { .. }) => return Err(UpcycleError::Probe { expected: "images and texts", found: "tokens" }),
        }
        let mut layers = Vec::new();
        let vision = vision(&mut self.vision, &dense.vision).map_err(|error| error.within("vision"))?;
        let text = text(&mut self.text, &dense.text).map_err(|error| error.within("text"))?;
        let towers = [("vision", vision, &mut self.vision.encoder), ("text", text, &mut self.text.encoder)];
        for ((name, source, target), calibration) in towers.into_iter().zip(calibrations) {
            let name = format!("{name}.encoder");
            let (blocks, sparse) =
                encoder(target.clone(), source, options.strategy, calibration).map_err(|error| error.within(&name))?;
            *target = blocks;
            layers.extend(sparse.into_iter().map(|layer| layer.within(&name)));
        }
        if layers.is_empty() {
            return Err(UpcycleError::NotSparse);
        }
        self.logit_scale = replace(self.logit_scale, dense.logit_scale.val());

        let max_deviation = match probe {
            None => None,
            Some((images, tokens)) => Some(compare(dense, &self, images, tokens)?),
        };
        let report = UpcycleReport::new(dense, &self, layers, max_deviation);
        Ok(Upcycled { model: self, report })
    }
}

/// Copies all but the blocks, and returns the blocks to copy.
fn vision<'a>(target: &mut VisionTower, source: &'a VisionTower) -> Result<&'a crate::transformer::Encoder, UpcycleError> {
    let weights = (&source.patch_embedding.weight, &target.patch_embedding.weight);
    UpcycleError::shapes("patch_embedding", &weights.0.dims(), &weights.1.dims())?;
    UpcycleError::shapes("position_embedding", &source.position_embedding.dims(), &target.position_embedding.dims())?;
    UpcycleError::shapes("projection", &source.projection.weight.dims(), &target.projection.weight.dims())?;
    UpcycleError::settings("preprocessing", source.preprocessing, target.preprocessing)?;
    target.patch_embedding = same_place(&source.patch_embedding, &target.patch_embedding);
    target.class_embedding = same_place(&source.class_embedding, &target.class_embedding);
    target.position_embedding = same_place(&source.position_embedding, &target.position_embedding);
    target.projection = same_place(&source.projection, &target.projection);
    norm(&mut target.norm_pre, &source.norm_pre).map_err(|error| error.within("norm_pre"))?;
    norm(&mut target.norm_post, &source.norm_post).map_err(|error| error.within("norm_post"))?;
    Ok(&source.encoder)
}

/// Copies all but the blocks, and returns the blocks to copy.
fn text<'a>(target: &mut TextTower, source: &'a TextTower) -> Result<&'a crate::transformer::Encoder, UpcycleError> {
    let weights = (&source.token_embedding.weight, &target.token_embedding.weight);
    UpcycleError::shapes("token_embedding", &weights.0.dims(), &weights.1.dims())?;
    UpcycleError::shapes("position_embedding", &source.position_embedding.dims(), &target.position_embedding.dims())?;
    UpcycleError::shapes("projection", &source.projection.weight.dims(), &target.projection.weight.dims())?;
    UpcycleError::settings("end_of_text", source.end_of_text, target.end_of_text)?;
    target.token_embedding = same_place(&source.token_embedding, &target.token_embedding);
    target.position_embedding = same_place(&source.position_embedding, &target.position_embedding);
    target.projection = same_place(&source.projection, &target.projection);
    norm(&mut target.norm_final, &source.norm_final).map_err(|error| error.within("norm_final"))?;
    Ok(&source.encoder)
}

fn compare(dense: &Clip, sparse: &Clip, images: Tensor<4>, tokens: Tensor<2, Int>) -> Result<f64, UpcycleError> {
    let images = images.cast(dense.vision.class_embedding.val().dtype());
    let run = |model: &Clip| model.clone().freeze().forward(images.clone(), tokens.clone());
    let (dense, sparse) = (run(dense), run(sparse));
    let image = deviation("image embeddings on the probe batch", dense.image_embeds.detach(), sparse.image_embeds.detach())?;
    let text = deviation("text embeddings on the probe batch", dense.text_embeds.detach(), sparse.text_embeds.detach())?;
    Ok(image.max(text))
}
