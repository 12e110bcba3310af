//! Copying a whole CLIP, and each of its towers.

use super::{
    UpcycleError, UpcycledLayer,
    layer::replace,
    source::ExpertSource,
    transformer::{encoder, optional_norm, same_place},
};
use crate::clip::{Clip, TextTower, VisionTower};

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
