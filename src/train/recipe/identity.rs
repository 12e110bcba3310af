//! What makes a run this one, so that it does not go on as another.

use std::{
    collections::BTreeSet,
    hash::{Hash, Hasher},
};

use burn::module::{LoraAdapter, Param};
use burn::nn::Linear;
use burn::tensor::Tensor;
use serde_json::{Map, Value, json};

use super::{Arm, Run, TrainConfig, TrainData};
use crate::{
    clip::Clip,
    layer::lora::ExpertLora,
    routing::router::Router,
    support::hash::StableHasher,
    train::{CompactVocabulary, data::ImageTextSet},
    transformer::{Encoder, FeedForward, TransformerBlock},
};

/// What a run is trained on, and where it starts.
pub(super) struct Identity {
    data: Value,
    /// Token ids that can occur.
    vocabulary: usize,
    start: String,
    /// What the run was evaluated on, if it is not now.
    pub(super) test_before: Option<String>,
}

/// Of all that makes a run this one, as JSON. How long it is, how often it is evaluated and how it saves memory may change.
pub(super) fn fingerprint(config: &TrainConfig, identity: &Identity, runs: &[Run]) -> String {
    let config = TrainConfig { steps: 0, eval_every: 0, micro_batch: None, recompute_blocks: false, ..config.clone() };
    let arm = |run: &Run| {
        let Run { name, config, auxiliary, frozen, routing, adapters, .. } = run;
        json!({
            "name": name, "optimizer": config, "auxiliary": auxiliary, "frozen": frozen, "routing": routing, "adapters": adapters,
        })
    };
    let arms: Vec<Value> = runs.iter().map(arm).collect();
    let Identity { data, vocabulary, start, .. } = identity;
    json!({ "train": config, "data": data, "vocabulary": vocabulary, "start": start, "arms": arms }).to_string()
}

/// The first setting that differs between two fingerprints, in words.
pub(super) fn difference(then: &str, now: &str) -> Option<String> {
    fn first(path: String, then: &Value, now: &Value) -> Option<(String, Value, Value)> {
        let inner = |key: &dyn std::fmt::Display| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
        match (then, now) {
            (Value::Object(then), Value::Object(now)) => {
                let value = |of: &Map<String, Value>, key: &str| of.get(key).cloned().unwrap_or_default();
                let keys = then.keys().chain(now.keys().filter(|key| !then.contains_key(*key)));
                keys.into_iter().find_map(|key| first(inner(key), &value(then, key), &value(now, key)))
            }
            (Value::Array(then), Value::Array(now)) if then.len() == now.len() => {
                then.iter().zip(now).enumerate().find_map(|(index, (then, now))| first(inner(&index), then, now))
            }
            (then, now) => (then != now).then(|| (path, then.clone(), now.clone())),
        }
    }
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let (path, then, now) = first(String::new(), &parsed(then), &parsed(now))?;
    Some(match path.as_str() {
        "start" => "it started from another model".into(),
        "arms" => "it trains another number of models".into(),
        path if path.starts_with("data.") && (now.is_null() || then.is_null()) => {
            "it has a set in memory in place of a stream, or the other way round".into()
        }
        "data.images" => "it has other images or captions".into(),
        "data.samples" => {
            format!("it has other data, by the names and sizes of its files: {} then, {} now", text(&then), text(&now))
        }
        "vocabulary" => {
            "other token ids can occur: a set in memory needs the same test set, and one process or several as before".into()
        }
        path if path.contains(".adapters") => format!("its adapters have {} then, and {} now", text(&then), text(&now)),
        path if path.contains(".routing") => "its model has other layers, or routes in another way".into(),
        _ => format!("`{path}` was {then} and is {now} now"),
    })
}

/// A text without quotes, or a list of texts.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(texts) if texts.is_empty() => "none".into(),
        Value::Array(texts) => texts.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// How a model routes, in words: settings that no parameter shows.
pub(super) fn routing_of(model: &Clip) -> Vec<String> {
    let towers = [&model.vision.encoder, &model.text.encoder];
    let settings = |block: &TransformerBlock, encoder: &Encoder| match &block.feed_forward {
        FeedForward::Dense(_) => "dense".to_string(),
        FeedForward::SoftMoe(_) => format!("soft {:?}", encoder.padding),
        FeedForward::Moe(moe) => {
            let Router { score, noise, jitter, balancing, logit_normalization, .. } = &moe.router;
            format!(
                "{:?} {score:?} {noise} {jitter} {balancing:?} {logit_normalization:?} {:?} {:?} {:?}",
                moe.assignment, moe.experts.form, encoder.protection, encoder.padding
            )
        }
    };
    towers.into_iter().flat_map(|encoder| encoder.blocks.iter().map(move |block| settings(block, encoder))).collect()
}

/// Rank and scale of all low-rank adapters of the encoders, each once: no parameter shows the scale.
pub(super) fn adapters_of(model: &Clip) -> BTreeSet<String> {
    let of_linear = |linear: &Linear| {
        linear.weight.reparameterization::<LoraAdapter>().map(|LoraAdapter { a, scale, .. }| (a.dims()[1], *scale))
    };
    let of_experts = |weight: &Param<Tensor<3>>| {
        weight.reparameterization::<ExpertLora>().map(|ExpertLora { a, scale, .. }| (a.dims()[2], *scale))
    };
    let of_block = |TransformerBlock { attention, feed_forward, .. }: &TransformerBlock| {
        let linears = [&attention.query, &attention.key, &attention.value, &attention.output].map(of_linear);
        let feed_forward = match feed_forward {
            FeedForward::Dense(mlp) => [of_linear(&mlp.linear_in), of_linear(&mlp.linear_out)],
            FeedForward::Moe(moe) => [of_experts(&moe.experts.w_in), of_experts(&moe.experts.w_out)],
            FeedForward::SoftMoe(moe) => [of_experts(&moe.experts.w_in), of_experts(&moe.experts.w_out)],
        };
        linears.into_iter().chain(feed_forward).flatten()
    };
    let blocks = model.vision.encoder.blocks.iter().chain(&model.text.encoder.blocks);
    blocks.flat_map(of_block).map(|(rank, scale)| format!("rank {rank} and scale {scale}")).collect()
}

/// Stands for the data and for where the arms start, so that a run is not resumed as another one.
pub(super) fn identity_of(data: &TrainData, vocabulary: &CompactVocabulary, arms: &[Arm]) -> Identity {
    let data = match data {
        TrainData::Set { set, batch } => json!({ "images": fingerprint_of_set(set), "batch": batch }),
        TrainData::Stream { stream, .. } => json!({
            "samples": stream.fingerprint(),
            "stream": stream.config(),
            "preprocessor": format!("{:?}", stream.preprocessor()),
        }),
    };
    let mut hasher = StableHasher::default();
    for arm in arms {
        // One weight of each tower tells two models apart.
        for weight in [arm.model.vision.patch_embedding.weight.val(), arm.model.text.projection.weight.val()] {
            let values = weight.detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32");
            values.iter().for_each(|value| value.to_bits().hash(&mut hasher));
        }
        arm.state.hash(&mut hasher);
    }
    Identity { data, vocabulary: vocabulary.len(), start: format!("{:016x}", hasher.finish()), test_before: None }
}

/// Stands for images with their captions.
pub(super) fn fingerprint_of_set(set: &ImageTextSet) -> String {
    let mut hasher = StableHasher::default();
    set.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
