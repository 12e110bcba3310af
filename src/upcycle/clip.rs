//! The whole CLIP, and each of its towers.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::{
    UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, UpcycleStrategy, Upcycled, UpcycledLayer,
    layer::replace,
    report::deviation,
    transformer::{encoder, norm, same_place},
};
use crate::{
    clip::{Clip, TextTower, VisionTower, normalize},
    transformer::FeedForwardInputs,
};

/// Every second block of both towers becomes sparse with [`SparseClipConfig::clip_up`](crate::clip::SparseClipConfig::clip_up).
/// The report's deviation is that of the embeddings, normalised.
impl UpcycleFromDense<Clip> for Clip {
    fn upcycle_from_dense(mut self, dense: &Clip, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let probe = options.probe.as_ref().map(|probe| probe.both(dense)).transpose()?;
        let calibration = options.calibration_batch()?.map(|batch| batch.both(dense)).transpose()?;
        let calibrations =
            calibration.map(|(images, tokens)| [dense.vision.feed_forward_inputs(images), dense.text.feed_forward_inputs(tokens)]);
        let [vision_inputs, text_inputs] = calibrations.map_or([None, None], |inputs| inputs.map(Some));
        let mut layers =
            vision(&mut self.vision, &dense.vision, options.strategy, vision_inputs).map_err(|error| error.within("vision"))?;
        let text = text(&mut self.text, &dense.text, options.strategy, text_inputs).map_err(|error| error.within("text"))?;
        layers = layers
            .into_iter()
            .map(|layer| layer.within("vision"))
            .chain(text.into_iter().map(|layer| layer.within("text")))
            .collect();
        self.logit_scale = replace(self.logit_scale, dense.logit_scale.val());
        let max_deviation = match probe {
            None => None,
            Some((images, tokens)) => {
                let image = image_deviation(&dense.vision, &self.vision, images)?;
                Some(image.max(text_deviation(&dense.text, &self.text, tokens)?))
            }
        };
        finish(self, dense, layers, max_deviation)
    }
}

/// A vision tower alone; probe and calibration are [`Probe::Images`](super::Probe::Images), or
/// [`Probe::ImagesAndTexts`](super::Probe::ImagesAndTexts) of which the images are taken.
impl UpcycleFromDense<VisionTower> for VisionTower {
    fn upcycle_from_dense(mut self, dense: &VisionTower, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let probe = options.probe.as_ref().map(|probe| probe.images(dense)).transpose()?;
        let calibration = options.calibration_batch()?.map(|batch| batch.images(dense)).transpose()?;
        let calibration = calibration.map(|images| dense.feed_forward_inputs(images));
        let layers = vision(&mut self, dense, options.strategy, calibration)?;
        let max_deviation = probe.map(|images| image_deviation(dense, &self, images)).transpose()?;
        finish(self, dense, layers, max_deviation)
    }
}

/// A text tower alone; probe and calibration are [`Probe::Texts`](super::Probe::Texts), or
/// [`Probe::ImagesAndTexts`](super::Probe::ImagesAndTexts) of which the texts are taken.
impl UpcycleFromDense<TextTower> for TextTower {
    fn upcycle_from_dense(mut self, dense: &TextTower, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let probe = options.probe.as_ref().map(|probe| probe.texts(dense)).transpose()?;
        let calibration = options.calibration_batch()?.map(|batch| batch.texts(dense)).transpose()?;
        let calibration = calibration.map(|tokens| dense.feed_forward_inputs(tokens));
        let layers = text(&mut self, dense, options.strategy, calibration)?;
        let max_deviation = probe.map(|tokens| text_deviation(dense, &self, tokens)).transpose()?;
        finish(self, dense, layers, max_deviation)
    }
}

fn finish<M: Module>(
    model: M,
    dense: &M,
    layers: Vec<UpcycledLayer>,
    max_deviation: Option<f64>,
) -> Result<Upcycled<M>, UpcycleError> {
    if layers.is_empty() {
        return Err(UpcycleError::NotSparse);
    }
    let report = UpcycleReport::new(dense, &model, layers, max_deviation);
    Ok(Upcycled { model, report })
}

/// Copies a vision tower, and returns its layers that became sparse.
fn vision(
    target: &mut VisionTower,
    source: &VisionTower,
    strategy: UpcycleStrategy,
    calibration: Option<FeedForwardInputs>,
) -> Result<Vec<UpcycledLayer>, UpcycleError> {
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
    blocks(&mut target.encoder, &source.encoder, strategy, calibration)
}

/// Copies a text tower, and returns its layers that became sparse.
fn text(
    target: &mut TextTower,
    source: &TextTower,
    strategy: UpcycleStrategy,
    calibration: Option<FeedForwardInputs>,
) -> Result<Vec<UpcycledLayer>, UpcycleError> {
    let weights = (&source.token_embedding.weight, &target.token_embedding.weight);
    UpcycleError::shapes("token_embedding", &weights.0.dims(), &weights.1.dims())?;
    UpcycleError::shapes("position_embedding", &source.position_embedding.dims(), &target.position_embedding.dims())?;
    UpcycleError::shapes("projection", &source.projection.weight.dims(), &target.projection.weight.dims())?;
    UpcycleError::settings("end_of_text", source.end_of_text, target.end_of_text)?;
    UpcycleError::settings("tokenizer", source.tokenizer, target.tokenizer)?;
    target.token_embedding = same_place(&source.token_embedding, &target.token_embedding);
    target.position_embedding = same_place(&source.position_embedding, &target.position_embedding);
    target.projection = same_place(&source.projection, &target.projection);
    norm(&mut target.norm_final, &source.norm_final).map_err(|error| error.within("norm_final"))?;
    blocks(&mut target.encoder, &source.encoder, strategy, calibration)
}

fn blocks(
    target: &mut crate::transformer::Encoder,
    source: &crate::transformer::Encoder,
    strategy: UpcycleStrategy,
    calibration: Option<FeedForwardInputs>,
) -> Result<Vec<UpcycledLayer>, UpcycleError> {
    let (upcycled, layers) = encoder(target.clone(), source, strategy, calibration).map_err(|error| error.within("encoder"))?;
    *target = upcycled;
    Ok(layers.into_iter().map(|layer| layer.within("encoder")).collect())
}

fn image_deviation(dense: &VisionTower, sparse: &VisionTower, images: Tensor<4>) -> Result<f64, UpcycleError> {
    let images = images.cast(dense.class_embedding.val().dtype());
    let run = |tower: &VisionTower| normalize(tower.clone().freeze().forward(images.clone()).embedding.detach());
    deviation("image embeddings on the probe batch", run(dense), run(sparse))
}

fn text_deviation(dense: &TextTower, sparse: &TextTower, tokens: Tensor<2, Int>) -> Result<f64, UpcycleError> {
    let run = |tower: &TextTower| normalize(tower.clone().freeze().forward(tokens.clone()).embedding.detach());
    deviation("text embeddings on the probe batch", run(dense), run(sparse))
}
