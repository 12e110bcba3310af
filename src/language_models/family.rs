//! What the configuration of each family says of its MoE layers.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::settings::{LARGEST, Settings};
use crate::{
    Activation, BalancingOptions, Capacity, ExpertGroups, ExpertOptions, FeedForwardForm, GateNormalization, MoeFeedForwardConfig,
    RouterOptions, RouterScore, TokenChoiceConfig,
};

/// More blocks than any model has.
const MOST_BLOCKS: usize = 4096;

/// The families of language models whose MoE layers are read, by `model_type` of transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// `mixtral`.
    Mixtral,
    /// `qwen2_moe`.
    Qwen2Moe,
    /// `qwen3_moe`.
    Qwen3Moe,
    /// `olmoe`.
    Olmoe,
    /// `deepseek_v3`.
    DeepseekV3,
    /// `glm4_moe`.
    Glm4Moe,
    /// `gpt_oss`.
    GptOss,
    /// `granitemoe`.
    GraniteMoe,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Mixtral,
        Self::Qwen2Moe,
        Self::Qwen3Moe,
        Self::Olmoe,
        Self::DeepseekV3,
        Self::Glm4Moe,
        Self::GptOss,
        Self::GraniteMoe,
    ];

    /// Its name in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Mixtral => "mixtral",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::Olmoe => "olmoe",
            Self::DeepseekV3 => "deepseek_v3",
            Self::Glm4Moe => "glm4_moe",
            Self::GptOss => "gpt_oss",
            Self::GraniteMoe => "granitemoe",
        }
    }

    /// The names of its number of experts.
    fn num_experts(self) -> &'static [&'static str] {
        match self {
            Self::DeepseekV3 | Self::Glm4Moe => &["n_routed_experts", "num_local_experts"],
            // transformers knows no other name here.
            Self::Qwen2Moe => &["num_experts"],
            Self::Qwen3Moe | Self::Olmoe => &["num_experts", "num_local_experts"],
            Self::Mixtral | Self::GptOss | Self::GraniteMoe => &["num_local_experts", "num_experts"],
        }
    }

    /// The name of the hidden width of its experts.
    fn d_ff(self) -> &'static str {
        match self {
            Self::Qwen2Moe | Self::Qwen3Moe | Self::DeepseekV3 | Self::Glm4Moe => "moe_intermediate_size",
            Self::Mixtral | Self::Olmoe | Self::GptOss | Self::GraniteMoe => "intermediate_size",
        }
    }

    /// Further settings that are read, or that change nothing of a layer's result.
    fn known_settings(self) -> &'static [&'static str] {
        match self {
            Self::Mixtral => &["router_jitter_noise"],
            Self::Qwen2Moe => &["shared_expert_intermediate_size", "num_local_experts"],
            Self::DeepseekV3 | Self::Glm4Moe => &[
                "n_shared_experts",
                "routed_scaling_factor",
                "n_group",
                "topk_group",
                "topk_method",
                "scoring_func",
                "moe_layer_freq",
            ],
            Self::GptOss => &["experts_per_token", "swiglu_limit", "swiglu_alpha"],
            Self::Qwen3Moe | Self::Olmoe | Self::GraniteMoe => &[],
        }
    }
}

/// What a configuration describes.
pub(super) struct Described {
    pub family: Family,
    pub config: MoeFeedForwardConfig,
    pub num_blocks: usize,
    pub moe_blocks: Vec<usize>,
}

/// From the text of a `config.json`; errors are in words.
pub(super) fn describe(text: &str) -> Result<Described, String> {
    let settings = Settings::parse(text)?;
    let family = family_of(&settings)?;
    refuse_unknown(&settings, family)?;

    let num_blocks = settings.size(&["num_hidden_layers"])?;
    if num_blocks > MOST_BLOCKS {
        return Err(format!("`num_hidden_layers` = {num_blocks}: at most {MOST_BLOCKS} is possible"));
    }
    let (num_experts, top_k) = (settings.size(family.num_experts())?, settings.size(&["num_experts_per_tok"])?);
    let d_ff = settings.size(&[family.d_ff()])?;
    let base = MoeFeedForwardConfig::new(settings.size(&["hidden_size"])?, d_ff, num_experts);
    let dropless = TokenChoiceConfig::new().with_top_k(top_k).with_training_capacity(Capacity::Dropless);
    let normalized = |is_normalized: bool| {
        let normalization = match (is_normalized, top_k) {
            (false, _) => GateNormalization::None,
            (true, 1) => GateNormalization::ConstantOne,
            (true, _) => GateNormalization::BeforeDrop,
        };
        dropless.clone().with_gate_normalization(normalization)
    };
    let router = RouterOptions::new();
    let swiglu =
        |settings: &Settings| Ok::<_, String>(ExpertOptions::swiglu().with_activation(activation(settings)?).with_bias(false));
    let (router, choice, experts) = match family {
        Family::Mixtral => {
            let jitter = settings.number("router_jitter_noise", 0.0)?;
            (router.with_jitter(jitter), normalized(true), swiglu(&settings)?)
        }
        Family::GraniteMoe => (router, normalized(true), swiglu(&settings)?),
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Olmoe => {
            (router, normalized(settings.flag("norm_topk_prob", false)?), swiglu(&settings)?)
        }
        Family::DeepseekV3 | Family::Glm4Moe => {
            settings.only("scoring_func", &json!("sigmoid"))?;
            settings.only("topk_method", &json!("noaux_tc"))?;
            settings.only("moe_layer_freq", &json!(1))?;
            // The published biases, which stay as they are.
            let router = router.with_score(RouterScore::Sigmoid).with_balancing(Some(BalancingOptions::new(0.0)));
            let (scale, groups) = deepseek_choice(&settings, family)?;
            // transformers takes `null` for false.
            let is_normalized = !settings.is_null("norm_topk_prob") && settings.flag("norm_topk_prob", true)?;
            let choice = normalized(is_normalized).with_gate_scale(scale).with_expert_groups(groups);
            (router, choice, swiglu(&settings)?)
        }
        Family::GptOss => {
            let (limit, alpha) = (settings.number("swiglu_limit", 7.0)?, settings.number("swiglu_alpha", 1.702)?);
            let experts = ExpertOptions::swiglu().with_form(FeedForwardForm::ClampedGated { limit, alpha });
            (router.with_bias(true), normalized(true), experts)
        }
    };
    let (shared_expert, shared_expert_gate) = match family {
        Family::Qwen2Moe => match settings.count("shared_expert_intermediate_size", None)? {
            0 => (None, false),
            width => (Some(width), true),
        },
        Family::DeepseekV3 | Family::Glm4Moe => {
            let count = settings.count("n_shared_experts", Some(1))?;
            let width = count * d_ff;
            if width > LARGEST as usize {
                return Err(format!(
                    "`n_shared_experts` = {count} of hidden width {d_ff}: a width of at most {LARGEST} is possible"
                ));
            }
            ((width > 0).then_some(width), false)
        }
        _ => (None, false),
    };
    let config = base
        .with_router(router)
        .with_assignment(choice.into())
        .with_experts(experts)
        .with_shared_expert(shared_expert)
        .with_shared_expert_gate(shared_expert_gate);
    Ok(Described { family, config, num_blocks, moe_blocks: moe_blocks(&settings, family, num_blocks)? })
}

fn family_of(settings: &Settings) -> Result<Family, String> {
    let known = || Family::ALL.map(Family::model_type).join(", ");
    let Some(name) = settings.text("model_type")? else {
        return Err(format!("`model_type` is missing; MoE layers are read of {}", known()));
    };
    let found = Family::ALL.into_iter().find(|family| family.model_type() == name);
    found.ok_or_else(|| format!("`model_type` = {name:?} is not supported; MoE layers are read of {}", known()))
}

/// Settings of experts and routers that nobody here knows: what they say could change the result.
fn refuse_unknown(settings: &Settings, family: Family) -> Result<(), String> {
    if let Some(quantization) = settings.value("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return Err(format!(
            "`quantization_config`: weights quantized by {method:?} are not read; save the model in bf16 or f16 first (`dequantize` in transformers)"
        ));
    }
    // Losses and outputs of training, which a layer has no part in.
    let harmless = [
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "output_router_logits",
        "norm_topk_prob",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ];
    let is_known =
        |name: &str| harmless.contains(&name) || family.num_experts().contains(&name) || family.known_settings().contains(&name);
    let parts = ["expert", "moe_", "router", "topk", "routed", "routing", "scoring", "n_group", "swiglu", "shared_"];
    let is_about_experts = |name: &str| parts.iter().any(|part| name.contains(part));
    for name in settings.names().filter(|name| is_about_experts(name) && !is_known(name)) {
        let is_off = |value: &Value| *value == json!(false) || value.as_f64() == Some(0.0) || *value == json!([]);
        if let Some(value) = settings.value(name).filter(|value| !is_off(value)) {
            return Err(format!("`{name}` = {value} is not a setting of `{}` that is known here", family.model_type()));
        }
    }
    Ok(())
}

/// Scale of the gates, and groups of experts.
fn deepseek_choice(settings: &Settings, family: Family) -> Result<(f64, Option<ExpertGroups>), String> {
    let (scale, groups, per_token) = match family {
        Family::DeepseekV3 => (2.5, 8, 4),
        _ => (1.0, 1, 1),
    };
    // For transformers, nothing stands for these.
    if let Some(name) = ["routed_scaling_factor", "n_group", "topk_group"].into_iter().find(|name| settings.is_null(name)) {
        return Err(format!("`{name}` = null: expected a number (without groups, `n_group` and `topk_group` are 1)"));
    }
    let scale = settings.number("routed_scaling_factor", scale)?;
    let groups = ExpertGroups::new(settings.count("n_group", Some(groups))?, settings.count("topk_group", Some(per_token))?);
    // Choosing all groups is choosing among all experts.
    Ok((scale, (groups.count != groups.per_token || groups.count == 0).then_some(groups)))
}

fn moe_blocks(settings: &Settings, family: Family, num_blocks: usize) -> Result<Vec<usize>, String> {
    let blocks = 0..num_blocks;
    Ok(match family {
        Family::Qwen2Moe | Family::Qwen3Moe => {
            let step = match settings.count("decoder_sparse_step", Some(1))? {
                0 => return Err("`decoder_sparse_step` must be at least 1, got 0".into()),
                step => step,
            };
            let dense: BTreeSet<usize> = settings.list("mlp_only_layers")?.into_iter().collect();
            blocks.filter(|block| (block + 1).is_multiple_of(step) && !dense.contains(block)).collect()
        }
        Family::DeepseekV3 | Family::Glm4Moe => {
            let dense = settings.count("first_k_dense_replace", Some(if family == Family::DeepseekV3 { 3 } else { 1 }))?;
            blocks.skip(dense).collect()
        }
        _ => blocks.collect(),
    })
}

fn activation(settings: &Settings) -> Result<Activation, String> {
    Ok(match settings.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" => Activation::GeluTanh,
        "quick_gelu" => Activation::QuickGelu,
        "relu" => Activation::Relu,
        other => {
            return Err(format!(
                "`hidden_act` = {other:?} is not supported: expected silu, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu or relu"
            ));
        }
    })
}
