//! The whole CLIP, and each of its towers.

use burn::module::Module;
use burn::tensor::{Int, Tensor};

use super::{
    UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, Upcycled, UpcycledLayer,
    layer::replace,
    report::deviation,
    source::ExpertSource,
    transformer::{encoder, optional_norm, same_place},
};
use crate::{
    clip::{Clip, TextTower, VisionTower, normalize},
    transformer::BlockRouter,
};

/// Every second block of both towers becomes sparse with [`SparseClipConfig::clip_up`](crate::clip::SparseClipConfig::clip_up).
/// The report's deviation is that of the embeddings, normalised.
impl UpcycleFromDense<Clip> for Clip {
    fn upcycle_from_dense(mut self, dense: &Clip, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let probe = options.probe.as_ref().map(|probe| probe.both(dense)).transpose()?;
        let calibration = options.calibration_batch()?.map(|batch| batch.both(dense)).transpose()?;
        let calibrations =
            calibration.map(|(images, tokens)| [dense.vision.feed_forward_inputs(images), dense.text.feed_forward_inputs(tokens)]);
        let sources = calibrations.map_or([None, None], |inputs| inputs.map(Some));
        let sources = sources.map(|calibration| ExpertSource::Dense { strategy: options.strategy, calibration });
        let layers = clip(&mut self, dense, sources.each_ref())?;
        let max_deviation = match probe {
            None => None,
            Some((images, tokens)) => {
                let image = image_deviation(&dense.vision, &self.vision, images, None)?;
                Some(image.max(text_deviation(&dense.text, &self.text, tokens, None)?))
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
        let layers = vision(&mut self, dense, &ExpertSource::Dense { strategy: options.strategy, calibration })?;
        let max_deviation = probe.map(|images| image_deviation(dense, &self, images, None)).transpose()?;
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
        let layers = text(&mut self, dense, &ExpertSource::Dense { strategy: options.strategy, calibration })?;
        let max_deviation = probe.map(|tokens| text_deviation(dense, &self, tokens, None)).transpose()?;
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

/// Copies a CLIP, and returns its layers that became sparse; their experts are from one source for each tower.
pub(super) fn clip(
    target: &mut Clip,
    source: &Clip,
    [image_experts, text_experts]: [&ExpertSource; 2],
) -> Result<Vec<UpcycledLayer>, UpcycleError> {
    let images = vision(&mut target.vision, &source.vision, image_experts).map_err(|error| error.within("vision"))?;
    let texts = text(&mut target.text, &source.text, text_experts).map_err(|error| error.within("text"))?;
    target.logit_scale = replace(target.logit_scale.clone(), source.logit_scale.val());
    let images = images.into_iter().map(|layer| layer.within("vision"));
    Ok(images.chain(texts.into_iter().map(|layer| layer.within("text"))).collect())
}

/// Copies a vision tower, and returns its layers that became sparse.
pub(super) fn vision(
    target: &mut VisionTower,
    source: &VisionTower,
    experts: &ExpertSource,
) -> Result<Vec<UpcycledLayer>, UpcycleError> {
    let weights = (&source.patch_embedding.weight, &target.patch_embedding.weight);
    UpcycleError::shapes("patch_embedding", &weights.0.dims(), &weights.1.dims())?;
    if let (Some(source), Some(target)) = (&source.position_embedding, &target.position_embedding) {
        UpcycleError::shapes("position_embedding", &source.dims(), &target.dims())?;
    }
    UpcycleError::shapes("image", &source.image_dims(), &target.image_dims())?;
    UpcycleError::settings("class_token", source.class_embedding.is_some(), target.class_embedding.is_some())?;
    UpcycleError::settings("position_table", source.position_embedding.is_some(), target.position_embedding.is_some())?;
    UpcycleError::shapes("projection", &source.projection.weight.dims(), &target.projection.weight.dims())?;
    UpcycleError::settings("preprocessing", source.preprocessing, target.preprocessing)?;
    let heads = |tower: &VisionTower| tower.pooling.as_ref().map(|pooling| pooling.attention.n_heads);
    UpcycleError::settings("heads of attention pooling", heads(source), heads(target))?;
    target.patch_embedding = same_place(&source.patch_embedding, &target.patch_embedding);
    target.class_embedding = same_place(&source.class_embedding, &target.class_embedding);
    target.position_embedding = same_place(&source.position_embedding, &target.position_embedding);
    target.pooling = same_place(&source.pooling, &target.pooling);
    target.projection = same_place(&source.projection, &target.projection);
    optional_norm("norm_pre", &mut target.norm_pre, &source.norm_pre)?;
    optional_norm("norm_post", &mut target.norm_post, &source.norm_post)?;
    blocks(&mut target.encoder, &source.encoder, experts)
}

/// Copies a text tower, and returns its layers that became sparse.
pub(super) fn text(target: &mut TextTower, source: &TextTower, experts: &ExpertSource) -> Result<Vec<UpcycledLayer>, UpcycleError> {
    let weights = (&source.token_embedding.weight, &target.token_embedding.weight);
    UpcycleError::shapes("token_embedding", &weights.0.dims(), &weights.1.dims())?;
    UpcycleError::shapes("position_embedding", &source.position_embedding.dims(), &target.position_embedding.dims())?;
    UpcycleError::shapes("projection", &source.projection.weight.dims(), &target.projection.weight.dims())?;
    UpcycleError::settings("end_of_text", source.end_of_text, target.end_of_text)?;
    UpcycleError::settings("tokenizer", source.tokenizer, target.tokenizer)?;
    target.token_embedding = same_place(&source.token_embedding, &target.token_embedding);
    target.position_embedding = same_place(&source.position_embedding, &target.position_embedding);
    target.projection = same_place(&source.projection, &target.projection);
    optional_norm("norm_final", &mut target.norm_final, &source.norm_final)?;
    blocks(&mut target.encoder, &source.encoder, experts)
}

fn blocks(
    target: &mut crate::transformer::Encoder,
    source: &crate::transformer::Encoder,
    experts: &ExpertSource,
) -> Result<Vec<UpcycledLayer>, UpcycleError> {
    let (upcycled, layers) = encoder(target.clone(), source, experts).map_err(|error| error.within("encoder"))?;
    *target = upcycled;
    Ok(layers.into_iter().map(|layer| layer.within("encoder")).collect())
}

/// Largest difference of the normalised embeddings; `router` is one to use instead of the sparse tower's own.
pub(super) fn image_deviation(
    dense: &VisionTower,
    sparse: &VisionTower,
    images: Tensor<4>,
    router: Option<&mut dyn BlockRouter>,
) -> Result<f64, UpcycleError> {
    let images = images.cast(dense.patch_embedding.weight.dtype());
    let expected = dense.clone().freeze().forward(images.clone()).embedding;
    let sparse = sparse.clone().freeze();
    let found = match router {
        None => sparse.forward(images),
        Some(router) => sparse.forward_with(images, router),
    };
    deviation("image embeddings on the probe batch", normalize(expected.detach()), normalize(found.embedding.detach()))
}

/// The same of texts.
pub(super) fn text_deviation(
    dense: &TextTower,
    sparse: &TextTower,
    tokens: Tensor<2, Int>,
    router: Option<&mut dyn BlockRouter>,
) -> Result<f64, UpcycleError> {
    let expected = dense.clone().freeze().forward(tokens.clone()).embedding;
    let sparse = sparse.clone().freeze();
    let found = match router {
        None => sparse.forward(tokens),
        Some(router) => sparse.forward_with(tokens, router),
    };
    deviation("text embeddings on the probe batch", normalize(expected.detach()), normalize(found.embedding.detach()))
}
