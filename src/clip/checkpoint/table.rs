//! Which stored tensor is which parameter: what the tables of all formats are made of.

use std::sync::Arc;

use crate::{checkpoint::numbers::transposed, clip::ClipConfig};

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

/// A tensor that is no parameter, because its numbers follow from the configuration. A file may leave it out.
#[derive(Debug)]
pub(super) struct Constant {
    /// Name in the file.
    pub key: String,
    /// What it must hold, to the precision of the file.
    pub values: Arc<[f32]>,
    /// What these numbers are, in words.
    pub what: &'static str,
}

/// How the stored tensor differs from the parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Form {
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
    /// `[E, out, in]`; the parameter is `[E, in, out]`. With a half, these rows of each expert in `[E, 2 out, in]`. Read and never written.
    Experts { half: Option<usize> },
}

impl Entry {
    /// Which third of the stored tensor the parameter is; `None`: all of it.
    pub(super) fn part(&self) -> Option<usize> {
        match self.form {
            Form::FusedBias { part } | Form::FusedWeight { part } => Some(part),
            Form::Same | Form::Scalar | Form::OutputFirst | Form::Experts { .. } => None,
        }
    }

    /// Whether the weights may be stored in 8 bits.
    pub(super) fn may_be_int8(&self) -> bool {
        self.maps().is_some() && !matches!(self.form, Form::Experts { .. })
    }

    /// Sizes `[E, D, F]` of the weights of experts, feed-forward networks and attention (`E` 1 but for experts): what may be stored in 8 bits.
    pub(super) fn maps(&self) -> Option<[usize; 3]> {
        let (module, name) = self.path.rsplit_once('.')?;
        let is_linear = name == "weight"
            && [".attention.", ".feed_forward.Dense.", ".pooling.mlp."].into_iter().any(|part| module.contains(part));
        let is_expert = ["w_in", "w_gate", "w_out"].contains(&name) && module.contains(".feed_forward.");
        match (self.form, &self.stored_shape[..]) {
            (Form::OutputFirst, [d_out, d_in]) if is_linear || is_expert => Some([1, *d_in, *d_out]),
            (Form::FusedWeight { .. }, [d_out, d_in]) if is_linear => Some([1, *d_in, d_out / 3]),
            (Form::Same, [num_experts, d_in, d_out]) if is_expert => Some([*num_experts, *d_in, *d_out]),
            (Form::Experts { half }, [num_experts, d_out, d_in]) => {
                Some([*num_experts, *d_in, if half.is_some() { d_out / 2 } else { *d_out }])
            }
            _ => None,
        }
    }

    /// Sizes `[E, D, F]` of what is packed, and in which precision: [`maps`](Self::maps), and the embedding of patches.
    #[cfg(feature = "flex")]
    pub(super) fn packed_in(&self, precision: crate::Precision) -> Option<([usize; 3], crate::Precision)> {
        match self.stored_shape[..] {
            [d_out, channels, height, width] if self.path.ends_with("patch_embedding.weight") => {
                let precision = crate::layer::packed::precision_of_patches(precision);
                Some(([1, channels * height * width, d_out], precision))
            }
            _ => self.maps().map(|dims| (dims, precision)),
        }
    }

    /// The name of the scales of a weight in 8 bits, and their shape: one for each output column.
    pub(super) fn scales(&self) -> (String, Vec<usize>) {
        let shape = match (self.form, &self.stored_shape[..]) {
            (Form::Same, [num_experts, _, d_out]) => vec![*num_experts, *d_out],
            (_, stored) => vec![stored[0]],
        };
        (format!("{}.scale", self.key), shape)
    }

    /// Multiplies what is stored, of which [`part`](Self::part) was read, by its scales.
    pub(super) fn scaled(&self, mut stored: Vec<f32>, scales: &[f32]) -> Vec<f32> {
        match (self.form, &self.stored_shape[..]) {
            (Form::Same, [_, d_in, d_out]) => {
                for (values, scales) in stored.chunks_exact_mut(d_in * d_out).zip(scales.chunks_exact(*d_out)) {
                    for row in values.chunks_exact_mut(*d_out) {
                        row.iter_mut().zip(scales).for_each(|(value, scale)| *value *= scale);
                    }
                }
            }
            _ => {
                let d_in = stored.len() / scales.len().max(1);
                for (row, scale) in stored.chunks_exact_mut(d_in.max(1)).zip(scales) {
                    row.iter_mut().for_each(|value| *value *= scale);
                }
            }
        }
        stored
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
            Form::Experts { half } => {
                let [rows, columns] = [self.stored_shape[1], self.stored_shape[2]];
                let rows = if half.is_some() { rows / 2 } else { rows };
                let own = |expert: &[f32]| transposed(&expert[half.unwrap_or(0) * rows * columns..][..rows * columns], rows);
                stored.chunks_exact((self.stored_shape[1] * columns).max(1)).flat_map(own).collect()
            }
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
            Form::Experts { .. } => unreachable!("no format that is written has it"),
        }
    }
}

/// The table of a format, while it is written down.
#[derive(Default)]
pub(super) struct Table {
    pub(super) entries: Vec<Entry>,
}

impl Table {
    pub(super) fn add(&mut self, key: &str, stored_shape: Vec<usize>, path: &str, form: Form) {
        self.entries.push(Entry { key: key.to_string(), stored_shape, path: path.to_string(), form });
    }

    pub(super) fn same(&mut self, key: &str, shape: &[usize], path: &str) {
        self.add(key, shape.to_vec(), path, Form::Same);
    }

    pub(super) fn norm(&mut self, key: &str, width: usize, path: &str) {
        self.same(&format!("{key}.weight"), &[width], &format!("{path}.gamma"));
        self.same(&format!("{key}.bias"), &[width], &format!("{path}.beta"));
    }

    pub(super) fn weight(&mut self, key: &str, d_in: usize, d_out: usize, path: &str) {
        self.add(&format!("{key}.weight"), vec![d_out, d_in], &format!("{path}.weight"), Form::OutputFirst);
    }

    pub(super) fn linear(&mut self, key: &str, d_in: usize, d_out: usize, path: &str) {
        self.weight(key, d_in, d_out, path);
        self.same(&format!("{key}.bias"), &[d_out], &format!("{path}.bias"));
    }

    /// Fused projections of queries, keys and values, and the output.
    pub(super) fn attention(&mut self, key: &str, d: usize, path: &str) {
        for (part, name) in ["query", "key", "value"].into_iter().enumerate() {
            let (weight, bias) = (Form::FusedWeight { part }, Form::FusedBias { part });
            self.add(&format!("{key}.in_proj_weight"), vec![3 * d, d], &format!("{path}.{name}.weight"), weight);
            self.add(&format!("{key}.in_proj_bias"), vec![3 * d], &format!("{path}.{name}.bias"), bias);
        }
        self.linear(&format!("{key}.out_proj"), d, d, &format!("{path}.output"));
    }

    /// A vision tower's attention pooling, but for the probe.
    pub(super) fn pooling(&mut self, key: &str, d: usize, path: &str) {
        self.attention(&format!("{key}.attn"), d, &format!("{path}.attention"));
        self.norm(&format!("{key}.layernorm"), d, &format!("{path}.norm"));
        self.linear(&format!("{key}.mlp.c_fc"), d, 4 * d, &format!("{path}.mlp.linear_in"));
        self.linear(&format!("{key}.mlp.c_proj"), 4 * d, d, &format!("{path}.mlp.linear_out"));
    }

    pub(super) fn mlp(&mut self, key: &str, names: [&str; 2], d: usize, f: usize, path: &str) {
        self.linear(&format!("{key}.{}", names[0]), d, f, &format!("{path}.feed_forward.Dense.linear_in"));
        self.linear(&format!("{key}.{}", names[1]), f, d, &format!("{path}.feed_forward.Dense.linear_out"));
    }

    /// The norms around the blocks, as far as there are any, by open_clip's names.
    pub(super) fn norms(&mut self, config: &ClipConfig) {
        let (vision, text) = (&config.vision, &config.text);
        for (is_there, key, width, path) in [
            (vision.norm_pre, "visual.ln_pre", vision.encoder.d_model, "vision.norm_pre"),
            (vision.norm_post, "visual.ln_post", vision.encoder.d_model, "vision.norm_post"),
            (text.norm_final, "ln_final", text.encoder.d_model, "text.norm_final"),
        ] {
            if is_there {
                self.norm(key, width, path);
            }
        }
    }

    /// The gate of a gated network.
    pub(super) fn gate(&mut self, key: &str, d: usize, f: usize, path: &str) {
        self.linear(key, d, f, &format!("{path}.feed_forward.Dense.linear_gate"));
    }
}
