//! Refusing models, losses and data that do not fit each other.

use super::{Arm, TrainConfig, TrainData, TrainError, step::is_noisy};
use crate::{
    clip::{EndOfText, ImagePreprocessing, TokenizerKind},
    routing::{assignment::AssignmentConfig, router::RouterScore},
    train::ranks::Ranks,
    transformer::FeedForward,
};

/// Refuses what cannot be computed by micro-batches, or by several ranks.
pub(super) fn check_micro_batches(arms: &[Arm], config: &TrainConfig, ranks: &dyn Ranks) -> Result<(), TrainError> {
    let alone = !ranks.has_others();
    if !alone && arms.len() > 1 {
        return Err(TrainError::Model {
            arm: arms[1].name.clone(),
            what: "arms that several ranks train",
            expected: "1".into(),
            found: arms.len().to_string(),
        });
    }
    if config.micro_batch.is_none() && alone && !config.recompute_blocks {
        return Ok(());
    }
    for arm in arms {
        arm.auxiliary.validate_micro_batches()?;
        let share_numbers = arms.len() > 1 || (!alone && ranks.are_threads());
        if share_numbers && is_noisy(&arm.model) {
            return Err(TrainError::Model {
                arm: arm.name.clone(),
                what: "router noise or jitter with micro-batches, ranks or recomputation",
                expected: "0 where several arms or ranks are trained in one process, which would draw each other's numbers".into(),
                found: "above 0".into(),
            });
        }
    }
    Ok(())
}

/// Refuses loss weights that the routers of a model have no use for.
pub(super) fn check_losses(arm: &Arm) -> Result<(), TrainError> {
    let refused = |what, expected: &str, found: f64| {
        Err(TrainError::Model { arm: arm.name.clone(), what, expected: expected.into(), found: found.to_string() })
    };
    let towers = [(&arm.model.vision.encoder, &arm.auxiliary.image), (&arm.model.text.encoder, &arm.auxiliary.text)];
    for (feed_forward, weights) in
        towers.into_iter().flat_map(|(encoder, weights)| encoder.blocks.iter().map(move |block| (&block.feed_forward, weights)))
    {
        let FeedForward::Moe(moe) = feed_forward else { continue };
        let (score, noise) = (moe.router.score, moe.router.noise);
        let [num_experts, ..] = moe.experts.dims();
        let chooses = matches!(&moe.assignment, AssignmentConfig::TokenChoice(tokens) if tokens.top_k < num_experts);
        if !chooses && weights.load > 0.0 {
            return refused("weight of the load loss", "0 where tokens do not choose some of the experts", weights.load);
        }
        if score != RouterScore::Softmax && weights.router_z > 0.0 {
            return refused("weight of the router z-loss", "0 without softmax scores", weights.router_z);
        }
        if noise == 0.0 && weights.load > 0.0 {
            return refused("weight of the load loss", "0 without router noise", weights.load);
        }
    }
    Ok(())
}

/// Refuses images that were prepared in another way than the model expects.
pub(super) fn check_preprocessing(arm: &Arm, found: &ImagePreprocessing) -> Result<(), TrainError> {
    let expected = &arm.model.vision.preprocessing;
    if expected == found {
        return Ok(());
    }
    let text = |p: &ImagePreprocessing| {
        let resized = p.resize_to.map_or(String::new(), |side| format!(" to {side}"));
        format!("mean {:?}, std {:?}, resize {:?}{resized}, interpolation {:?}", p.mean, p.std, p.resize_mode, p.interpolation)
    };
    Err(TrainError::Preprocessing { arm: arm.name.clone(), expected: text(expected), found: text(found) })
}

/// Refuses a model that would not understand the batches.
pub(super) fn check_model(arm: &Arm, data: &TrainData) -> Result<(), TrainError> {
    let (vision, text) = (&arm.model.vision, &arm.model.text);
    let [patch_pixels, _] = vision.patch_embedding.weight.dims();
    let [context, _] = text.position_embedding.dims();
    let [vocabulary, _] = text.token_embedding.weight.dims();
    let pixels = 3 * data.image_size() * data.image_size();
    let needed = data.context_length();
    let ids = data.vocab_size();
    let end = EndOfText::Id(ids as i64 - 1);
    let mark = |end| match end {
        EndOfText::HighestId => "the highest id".to_string(),
        EndOfText::Id(id) => format!("id {id}"),
    };
    let checks = [
        ("vocabulary", vocabulary == ids, ids.to_string(), vocabulary.to_string()),
        ("tokenizer", text.tokenizer == TokenizerKind::ClipBpe, "CLIP's".to_string(), "another".to_string()),
        ("context length", context >= needed, format!("at least {needed}"), context.to_string()),
        (
            "pixel values",
            patch_pixels * vision.num_patches() == pixels,
            pixels.to_string(),
            (patch_pixels * vision.num_patches()).to_string(),
        ),
        (
            "end of text",
            [EndOfText::HighestId, end].contains(&text.end_of_text),
            format!("{} or {}", mark(EndOfText::HighestId), mark(end)),
            mark(text.end_of_text),
        ),
    ];
    match checks.into_iter().find(|(_, good, ..)| !good) {
        None => Ok(()),
        Some((what, _, expected, found)) => Err(TrainError::Model { arm: arm.name.clone(), what, expected, found }),
    }
}
