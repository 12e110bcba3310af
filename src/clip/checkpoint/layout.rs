//! Which stored tensor is which parameter.

use safetensors::Dtype;

use super::Precision;
use crate::{
    clip::ClipConfig,
    experts::FeedForwardForm,
    router::BalancingBias,
    transformer::{EncoderConfig, SparseEncoderConfig, SparseLayer},
};

/// Whose names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    HuggingFace,
    OpenClip,
}

/// One parameter and where it is stored.
#[derive(Debug)]
pub(super) struct Entry {
    /// Name in the file; the three parts of a fused projection share one.
    pub key: String,
    /// Shape in the file.
    pub stored_shape: Vec<usize>,
    /// Path in the model.
    pub path: String,
    form: Form,
}

/// How the stored tensor differs from the parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Form {
    /// Not at all.
    Same,
    /// A scalar; the parameter is `[1]`.
    Scalar,
    /// `[out, ..]`, as PyTorch's linear and convolution weights; the parameter is `[in, out]`.
    OutputFirst,
    /// Rows `part · n .. (part + 1) · n` of `[3 n]`.
    FusedBias { part: usize },
    /// Rows `part · n .. (part + 1) · n` of `[3 n, in]`; the parameter is `[in, n]`.
    FusedWeight { part: usize },
}

impl Entry {
    /// Which third of the stored tensor the parameter is; `None`: all of it.
    pub(super) fn part(&self) -> Option<usize> {
        match self.form {
            Form::FusedBias { part } | Form::FusedWeight { part } => Some(part),
            Form::Same | Form::Scalar | Form::OutputFirst => None,
        }
    }

    /// Values of the parameter in the stored order.
    fn rows(&self) -> usize {
        self.stored_shape.first().copied().unwrap_or(1) / if self.part().is_some() { 3 } else { 1 }
    }

    /// From the file, of which [`part`](Self::part) was read, to the model.
    pub(super) fn load(&self, stored: Vec<f32>) -> Vec<f32> {
        match self.form {
            Form::Same | Form::Scalar | Form::FusedBias { .. } => stored,
            Form::OutputFirst | Form::FusedWeight { .. } => transposed(&stored, self.rows()),
        }
    }

    /// From the model to [`part`](Self::part) of the file.
    pub(super) fn store(&self, values: Vec<f32>) -> Vec<f32> {
        match self.form {
            Form::Same | Form::Scalar | Form::FusedBias { .. } => values,
            Form::OutputFirst | Form::FusedWeight { .. } => {
                let columns = values.len() / self.rows();
                transposed(&values, columns)
            }
        }
    }
}

/// `[rows, columns] -> [columns, rows]`, in squares that fit the cache.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    const SIDE: usize = 32;
    let columns = values.len() / rows.max(1);
    let mut out = vec![0.0; values.len()];
    for first_row in (0..rows).step_by(SIDE) {
        for first_column in (0..columns).step_by(SIDE) {
            for row in first_row..(first_row + SIDE).min(rows) {
                for column in first_column..(first_column + SIDE).min(columns) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

/// Numbers of a stored tensor; `None` for a dtype that is no weight.
pub(super) fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => return None,
    })
}

impl Precision {
    pub(super) fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// How many values would be written as something else than a finite number.
    pub(super) fn overflows(self, values: &[f32]) -> usize {
        let fits = |v: f32| match self {
            Self::F32 => v.is_finite(),
            Self::F16 => half::f16::from_f32(v).is_finite(),
            Self::BF16 => half::bf16::from_f32(v).is_finite(),
        };
        values.iter().filter(|v| !fits(**v)).count()
    }

    pub(super) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => bytes_of(values, f32::to_le_bytes),
            Self::F16 => bytes_of(values, |v| half::f16::from_f32(v).to_le_bytes()),
            Self::BF16 => bytes_of(values, |v| half::bf16::from_f32(v).to_le_bytes()),
        }
    }
}

fn bytes_of<const N: usize>(values: &[f32], encode: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; N * values.len()];
    for (bytes, value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *bytes = encode(*value);
    }
    bytes
}

/// The whole table of a configuration.
pub(super) fn entries(config: &ClipConfig, layout: Layout) -> Vec<Entry> {
    let mut table = Table { entries: Vec::new() };
    let (vision, text, embed) = (&config.vision, &config.text, config.embed_dim);
    let (vd, td, patch) = (vision.encoder.d_model, text.encoder.d_model, vision.patch_size);
    let conv = vec![vd, vision.channels, patch, patch];
    table.add("logit_scale", vec![], "logit_scale", Form::Scalar);
    match layout {
        Layout::OpenClip => {
            table.add("visual.conv1.weight", conv, "vision.patch_embedding.weight", Form::OutputFirst);
            table.same("visual.class_embedding", &[vd], "vision.class_embedding");
            table.same("visual.positional_embedding", &[vision.num_tokens(), vd], "vision.position_embedding");
            table.norm("visual.ln_pre", vd, "vision.norm_pre");
            table.norm("visual.ln_post", vd, "vision.norm_post");
            table.same("visual.proj", &[vd, embed], "vision.projection.weight");
            table.same("token_embedding.weight", &[text.vocab_size, td], "text.token_embedding.weight");
            table.same("positional_embedding", &[text.context_length, td], "text.position_embedding");
            table.norm("ln_final", td, "text.norm_final");
            match text.projection_bias {
                false => table.same("text_projection", &[td, embed], "text.projection.weight"),
                true => table.linear("text_projection", td, embed, "text.projection"),
            }
            table.open_clip_blocks("visual.transformer.resblocks", "vision.encoder.blocks", &vision.encoder);
            table.open_clip_blocks("transformer.resblocks", "text.encoder.blocks", &text.encoder);
        }
        Layout::HuggingFace => {
            let name = "vision_model.embeddings";
            table.add(&format!("{name}.patch_embedding.weight"), conv, "vision.patch_embedding.weight", Form::OutputFirst);
            table.same(&format!("{name}.class_embedding"), &[vd], "vision.class_embedding");
            let positions = &[vision.num_tokens(), vd];
            table.same(&format!("{name}.position_embedding.weight"), positions, "vision.position_embedding");
            // The name is misspelt in transformers.
            table.norm("vision_model.pre_layrnorm", vd, "vision.norm_pre");
            table.norm("vision_model.post_layernorm", vd, "vision.norm_post");
            table.weight("visual_projection", vd, embed, "vision.projection");
            let name = "text_model.embeddings";
            table.same(&format!("{name}.token_embedding.weight"), &[text.vocab_size, td], "text.token_embedding.weight");
            let positions = &[text.context_length, td];
            table.same(&format!("{name}.position_embedding.weight"), positions, "text.position_embedding");
            table.norm("text_model.final_layer_norm", td, "text.norm_final");
            table.weight("text_projection", td, embed, "text.projection");
            table.hugging_face_blocks("vision_model.encoder.layers", "vision.encoder.blocks", &vision.encoder);
            table.hugging_face_blocks("text_model.encoder.layers", "text.encoder.blocks", &text.encoder);
        }
    }
    table.entries
}

struct Table {
    entries: Vec<Entry>,
}

impl Table {
    fn add(&mut self, key: &str, stored_shape: Vec<usize>, path: &str, form: Form) {
        self.entries.push(Entry { key: key.to_string(), stored_shape, path: path.to_string(), form });
    }

    fn same(&mut self, key: &str, shape: &[usize], path: &str) {
        self.add(key, shape.to_vec(), path, Form::Same);
    }

    fn norm(&mut self, key: &str, width: usize, path: &str) {
        self.same(&format!("{key}.weight"), &[width], &format!("{path}.gamma"));
        self.same(&format!("{key}.bias"), &[width], &format!("{path}.beta"));
    }

    fn weight(&mut self, key: &str, d_in: usize, d_out: usize, path: &str) {
        self.add(&format!("{key}.weight"), vec![d_out, d_in], &format!("{path}.weight"), Form::OutputFirst);
    }

    fn linear(&mut self, key: &str, d_in: usize, d_out: usize, path: &str) {
        self.weight(key, d_in, d_out, path);
        self.same(&format!("{key}.bias"), &[d_out], &format!("{path}.bias"));
    }

    fn open_clip_blocks(&mut self, key: &str, path: &str, encoder: &EncoderConfig) {
        let (d, f) = (encoder.d_model, encoder.d_ff);
        for index in 0..encoder.n_layers {
            let (key, path) = (format!("{key}.{index}"), format!("{path}.{index}"));
            for (part, name) in ["query", "key", "value"].into_iter().enumerate() {
                let path = format!("{path}.attention.{name}");
                let (weight, bias) = (Form::FusedWeight { part }, Form::FusedBias { part });
                self.add(&format!("{key}.attn.in_proj_weight"), vec![3 * d, d], &format!("{path}.weight"), weight);
                self.add(&format!("{key}.attn.in_proj_bias"), vec![3 * d], &format!("{path}.bias"), bias);
            }
            self.linear(&format!("{key}.attn.out_proj"), d, d, &format!("{path}.attention.output"));
            self.norm(&format!("{key}.ln_1"), d, &format!("{path}.norm_attention"));
            self.norm(&format!("{key}.ln_2"), d, &format!("{path}.norm_feed_forward"));
            match encoder.sparse_block(index) {
                None => self.mlp(&key, ["mlp.c_fc", "mlp.c_proj"], d, f, &path),
                Some(sparse) => self.moe(&format!("{key}.moe"), sparse, d, sparse.d_ff.unwrap_or(f), &path),
            }
        }
    }

    fn hugging_face_blocks(&mut self, key: &str, path: &str, encoder: &EncoderConfig) {
        let (d, f) = (encoder.d_model, encoder.d_ff);
        for index in 0..encoder.n_layers {
            let (key, path) = (format!("{key}.{index}"), format!("{path}.{index}"));
            for (theirs, ours) in [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")] {
                self.linear(&format!("{key}.self_attn.{theirs}"), d, d, &format!("{path}.attention.{ours}"));
            }
            self.norm(&format!("{key}.layer_norm1"), d, &format!("{path}.norm_attention"));
            self.norm(&format!("{key}.layer_norm2"), d, &format!("{path}.norm_feed_forward"));
            self.mlp(&key, ["mlp.fc1", "mlp.fc2"], d, f, &path);
        }
    }

    fn mlp(&mut self, key: &str, names: [&str; 2], d: usize, f: usize, path: &str) {
        self.linear(&format!("{key}.{}", names[0]), d, f, &format!("{path}.feed_forward.Dense.linear_in"));
        self.linear(&format!("{key}.{}", names[1]), f, d, &format!("{path}.feed_forward.Dense.linear_out"));
    }

    fn moe(&mut self, key: &str, sparse: &SparseEncoderConfig, d: usize, f: usize, path: &str) {
        let e = sparse.num_experts;
        match sparse.layer {
            SparseLayer::Routed => {
                let path = format!("{path}.feed_forward.Moe");
                self.same(&format!("{key}.router.weight"), &[d, e], &format!("{path}.router.weight"));
                if sparse.router.balancing_bias != BalancingBias::None {
                    self.same(&format!("{key}.router.balancing_bias"), &[e], &format!("{path}.router.balancing_bias"));
                }
                self.experts(&format!("{key}.experts"), sparse.form, [e, d, f], &format!("{path}.experts"));
                if let Some(f) = sparse.shared_expert {
                    self.experts(&format!("{key}.shared_expert"), sparse.form, [1, d, f], &format!("{path}.shared_expert"));
                }
            }
            SparseLayer::Soft { slots_per_expert } => {
                let path = format!("{path}.feed_forward.SoftMoe");
                self.same(&format!("{key}.slots"), &[d, e * slots_per_expert], &format!("{path}.slots"));
                self.experts(&format!("{key}.experts"), sparse.form, [e, d, f], &format!("{path}.experts"));
            }
        }
    }

    fn experts(&mut self, key: &str, form: FeedForwardForm, [e, d, f]: [usize; 3], path: &str) {
        let mut tensor = |name: &str, shape: &[usize]| self.same(&format!("{key}.{name}"), shape, &format!("{path}.{name}"));
        tensor("w_in", &[e, d, f]);
        tensor("b_in", &[e, f]);
        if form == FeedForwardForm::Gated {
            tensor("w_gate", &[e, d, f]);
            tensor("b_gate", &[e, f]);
        }
        tensor("w_out", &[e, f, d]);
        tensor("b_out", &[e, d]);
    }
}
