//! Layers of ours in Mixtral's layout.

use std::{borrow::Cow, collections::BTreeMap, fs, path::Path};

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use safetensors::{Dtype, tensor::View};
use serde_json::json;

use super::{CONFIG, CheckpointError, WEIGHTS};
use crate::{
    Activation, AssignmentConfig, Capacity, FeedForwardForm, GateNormalization, MoeFeedForward, Precision, RouterScore,
    checkpoint::numbers::transposed,
    support::files::{write_aside, write_atomic},
};

/// Writes `config.json` and `model.safetensors` of a `MixtralModel` with these MoE layers into `folder`, which is made if need be: block `i` of
/// transformers' `MixtralModel.from_pretrained(folder)` has layer `i`. Nothing else of a language model is written: transformers says so, and starts
/// attention, embeddings and norms from random weights.
///
/// # Errors
/// When there is no layer, layers differ in their sizes, Mixtral's layer has no place for an option (it has SwiGLU experts without biases, a softmax, gates over
/// their sum, and drops nothing), weights are to be in 8 bits, a value is not finite or beyond the precision, or on a failure of the file system; a file that was
/// there before is then as it was, but for weights that were written before their configuration could not be.
pub fn save_mixtral(layers: &[MoeFeedForward], folder: impl AsRef<Path>, precision: Precision) -> Result<(), CheckpointError> {
    let folder = folder.as_ref();
    let no_place = |what| CheckpointError::NoPlace { format: "Mixtral", what };
    let Some(first) = layers.first() else { return Err(no_place("a model without layers")) };
    if precision == Precision::Int8 {
        return Err(no_place("weights in 8 bits"));
    }
    let dims = first.experts.dims();
    let top_k = choices_of(first).map_err(no_place)?;
    for layer in layers {
        if layer.experts.dims() != dims || choices_of(layer).map_err(no_place)? != top_k {
            return Err(no_place("layers of different sizes"));
        }
        if layer.router.jitter != first.router.jitter {
            return Err(no_place("layers of different jitter"));
        }
    }
    fs::create_dir_all(folder).map_err(CheckpointError::io(folder))?;
    let mut stored = BTreeMap::new();
    for (block, layer) in layers.iter().enumerate() {
        // Packed weights are unpacked once, and adapters merged.
        let layer = layer.clone().materialize();
        let prefix = format!("layers.{block}.block_sparse_moe.");
        for (name, tensor) in tensors(&layer) {
            let key = format!("{prefix}{name}");
            let values = tensor.values();
            let count = precision.overflows(&values);
            if count > 0 {
                return Err(CheckpointError::Overflow { tensor: key, count });
            }
            stored.insert(key, Written { precision, ..tensor });
        }
    }
    let path = folder.join(WEIGHTS);
    write_aside(
        &path,
        |source| CheckpointError::Io { path: path.clone(), source },
        |aside| {
            fs::File::create(aside).map_err(CheckpointError::io(&path))?;
            let about = [("format".to_string(), "pt".to_string())].into();
            safetensors::serialize_to_file(stored, Some(about), aside).map_err(CheckpointError::safetensors(&path))
        },
    )?;
    let [num_experts, d_model, d_ff] = dims;
    let config = json!({
        "architectures": ["MixtralModel"],
        "model_type": "mixtral",
        "hidden_size": d_model,
        "intermediate_size": d_ff,
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers.len(),
        "hidden_act": "silu",
        "router_jitter_noise": first.router.jitter,
        // Of what is not written, as little as transformers builds.
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "vocab_size": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": match precision { Precision::F16 => "float16", Precision::BF16 => "bfloat16", _ => "float32" },
    });
    let (path, text) = (folder.join(CONFIG), serde_json::to_string_pretty(&config).expect("JSON can be written"));
    write_atomic(&path, text.as_bytes()).map_err(CheckpointError::io(&path))
}

/// Choices of each token, if the layer is one that Mixtral could have; what has no place otherwise.
fn choices_of(layer: &MoeFeedForward) -> Result<usize, &'static str> {
    let MoeFeedForward { router, experts, shared_expert, assignment, .. } = layer;
    let AssignmentConfig::TokenChoice(choice) = assignment else { return Err("expert choice") };
    let refused = [
        (experts.form != FeedForwardForm::Gated || experts.activation != Activation::Silu, "experts that are not SwiGLU networks"),
        (experts.b_in.is_some() || experts.b_gate.is_some() || experts.b_out.is_some(), "biases of experts"),
        (shared_expert.is_some(), "a shared expert"),
        (router.score != RouterScore::Softmax, "sigmoid scores"),
        (router.bias.is_some(), "a bias of the router"),
        (router.balancing_bias.is_some(), "a balancing bias"),
        (router.logit_normalization.is_some(), "gating logit normalisation"),
        (choice.gate_normalization == GateNormalization::None, "gates that are not divided by their sum"),
        (choice.gate_scale != 1.0, "a scale of the gates"),
        (choice.expert_groups.is_some(), "groups of experts"),
        (choice.inference_capacity != Capacity::Dropless, "a capacity at inference: set `inference_capacity` to `Dropless`"),
    ];
    match refused.into_iter().find(|(is_refused, _)| *is_refused) {
        Some((_, what)) => Err(what),
        None => Ok(choice.top_k),
    }
}

/// A tensor of the file, read from the layer when it is written.
struct Written {
    shape: [usize; 2],
    source: Source,
    precision: Precision,
}

enum Source {
    Router(Param<Tensor<2>>),
    Expert(Param<Tensor<3>>, usize),
}

impl Written {
    /// In the file's order, `[out, in]`.
    fn values(&self) -> Vec<f32> {
        let read = |values: Tensor<2>| values.detach().try_into_vec_as::<f32>().expect("read as f32");
        let values = match &self.source {
            Source::Router(weight) => read(weight.clone().transform_for_save().val()),
            Source::Expert(weight, expert) => read(weight.clone().transform_for_save().val().narrow(0, *expert, 1).squeeze_dim(0)),
        };
        transposed(&values, self.shape[1])
    }
}

impl View for Written {
    fn dtype(&self) -> Dtype {
        self.precision.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.precision.encode(&self.values()).into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}

fn tensors(layer: &MoeFeedForward) -> Vec<(String, Written)> {
    let [num_experts, d_model, d_ff] = layer.experts.dims();
    let written = |shape, source| Written { shape, source, precision: Precision::F32 };
    let mut tensors =
        vec![("gate.weight".to_string(), written([num_experts, d_model], Source::Router(layer.router.weight.clone())))];
    let w_gate = layer.experts.w_gate.as_ref().expect("the form was checked");
    for (name, weight, shape) in [
        ("w1", w_gate, [d_ff, d_model]),
        ("w2", &layer.experts.w_out, [d_model, d_ff]),
        ("w3", &layer.experts.w_in, [d_ff, d_model]),
    ] {
        for expert in 0..num_experts {
            let source = Source::Expert(weight.clone(), expert);
            tensors.push((format!("experts.{expert}.{name}.weight"), written(shape, source)));
        }
    }
    tensors
}
