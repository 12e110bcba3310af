//! Which stored tensors each parameter of a layer is made of.

use super::family::Family;
use crate::{MoeFeedForwardConfig, checkpoint::numbers::transpose};

/// One parameter of a `MoeFeedForward`, and where its numbers are.
pub(super) struct Parameter {
    /// Path in the layer.
    pub path: &'static str,
    pub key: Key,
    /// Experts that it is of: their numbers follow each other in the parameter.
    pub experts: usize,
    /// What one expert has in the file: a matrix, or a vector as one row.
    pub stored: [usize; 2],
    pub taken: Taken,
    /// Whether the parameter has the matrix transposed.
    pub transposed: bool,
    /// Sizes `[E, D, F]` of weights that may be packed.
    pub maps: Option<[usize; 3]>,
    is_vector: bool,
}

/// The tensor of an expert.
pub(super) enum Key {
    /// One, of a parameter without experts.
    One(String),
    /// One in which all experts are stacked.
    Stacked(String),
    /// `{before}{expert}{behind}`.
    Each { before: &'static str, behind: &'static str },
}

/// What of a stored matrix is the parameter's.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Taken {
    All,
    /// The rows of the first or the second half, transposed.
    Half(usize),
    /// Every second column, from the first or the second, not transposed.
    Alternate(usize),
}

impl Parameter {
    /// The tensor that has an expert's numbers.
    pub(super) fn key(&self, expert: usize) -> String {
        match &self.key {
            Key::One(key) | Key::Stacked(key) => key.clone(),
            Key::Each { before, behind } => format!("{before}{expert}{behind}"),
        }
    }

    /// Number of tensors.
    pub(super) fn num_tensors(&self) -> usize {
        if let Key::Each { .. } = self.key { self.experts } else { 1 }
    }

    /// The shape of each tensor.
    pub(super) fn shape(&self) -> Vec<usize> {
        let one = if self.is_vector { vec![self.stored[1]] } else { self.stored.to_vec() };
        match self.key {
            Key::Stacked(_) => [vec![self.experts], one].concat(),
            Key::One(_) | Key::Each { .. } => one,
        }
    }

    /// Which share of a tensor is an expert's.
    pub(super) fn share(&self, expert: usize) -> [usize; 2] {
        match self.key {
            Key::Stacked(_) => [expert, self.experts],
            Key::One(_) | Key::Each { .. } => [0, 1],
        }
    }

    /// How many numbers of the parameter are an expert's.
    pub(super) fn len(&self) -> usize {
        let [rows, columns] = self.stored;
        rows * columns / if self.taken == Taken::All { 1 } else { 2 }
    }

    /// The parameter's numbers of an expert from the stored ones.
    pub(super) fn fill(&self, stored: &[f32], out: &mut [f32]) {
        let [rows, _] = self.stored;
        match (self.taken, self.transposed) {
            (Taken::All, false) => out.copy_from_slice(stored),
            (Taken::All, true) => transpose(stored, rows, out),
            (Taken::Half(half), _) => transpose(&stored[half * out.len()..][..out.len()], rows / 2, out),
            (Taken::Alternate(first), _) => {
                out.iter_mut().zip(stored.iter().skip(first).step_by(2)).for_each(|(out, stored)| *out = *stored);
            }
        }
    }
}

/// A map `[in, out]` per expert.
fn map(path: &'static str, key: Key, [experts, d_in, d_out]: [usize; 3]) -> Parameter {
    let maps = Some([experts, d_in, d_out]);
    Parameter { path, key, experts, stored: [d_out, d_in], taken: Taken::All, transposed: true, maps, is_vector: false }
}

fn one(key: &str) -> Key {
    Key::One(key.to_string())
}

fn stacked(key: &str) -> Key {
    Key::Stacked(key.to_string())
}

fn vector(path: &'static str, key: Key, experts: usize, len: usize) -> Parameter {
    let stored = [1, len];
    Parameter { path, key, experts, stored, taken: Taken::All, transposed: false, maps: None, is_vector: true }
}

/// The names of the maps of one network: gate, up, down.
type Names = [&'static str; 3];

const PROJECTIONS: Names = [".gate_proj.weight", ".up_proj.weight", ".down_proj.weight"];

fn each_expert(before: &'static str, names: Names, [e, d, f]: [usize; 3]) -> Vec<Parameter> {
    let [gate, up, down] = names.map(|behind| Key::Each { before, behind });
    vec![map("experts.w_gate", gate, [e, d, f]), map("experts.w_in", up, [e, d, f]), map("experts.w_out", down, [e, f, d])]
}

fn shared(name: &str, d: usize, f: usize) -> Vec<Parameter> {
    let [gate, up, down] = PROJECTIONS.map(|behind| Key::One(format!("{name}{behind}")));
    vec![
        map("shared_expert.w_gate", gate, [1, d, f]),
        map("shared_expert.w_in", up, [1, d, f]),
        map("shared_expert.w_out", down, [1, f, d]),
    ]
}

/// Gate and up of all experts below each other in one tensor, and down in another.
fn halves([gate_and_up, down]: [&str; 2], [e, d, f]: [usize; 3]) -> Vec<Parameter> {
    let half =
        |path, half| Parameter { stored: [2 * f, d], taken: Taken::Half(half), ..map(path, stacked(gate_and_up), [e, d, f]) };
    vec![half("experts.w_gate", 0), half("experts.w_in", 1), map("experts.w_out", stacked(down), [e, f, d])]
}

/// The tensor that says that experts are stored as transformers 5 has them in memory.
pub(super) const STACKED: &str = "experts.gate_up_proj";

/// All parameters of a layer of this family. Keys are behind the name of the layer. `is_stacked`: experts that the family's published files have one
/// by one are as transformers 5 has them in memory.
pub(super) fn parameters(family: Family, config: &MoeFeedForwardConfig, is_stacked: bool) -> Vec<Parameter> {
    let (d, f, e) = (config.d_model, config.d_ff, config.num_experts);
    let router = |key: &str| Parameter { maps: None, ..map("router.weight", one(key), [1, d, e]) };
    let experts = |names| match is_stacked {
        true => halves([STACKED, "experts.down_proj"], [e, d, f]),
        false => each_expert("experts.", names, [e, d, f]),
    };
    match family {
        Family::Mixtral => {
            let mut parameters = vec![router("gate.weight")];
            parameters.extend(experts([".w1.weight", ".w3.weight", ".w2.weight"]));
            parameters
        }
        Family::Qwen2Moe | Family::Qwen3Moe | Family::Olmoe | Family::DeepseekV3 | Family::Glm4Moe => {
            let mut parameters = vec![router("gate.weight")];
            if config.router.balancing.is_some() {
                parameters.push(vector("router.balancing_bias", one("gate.e_score_correction_bias"), 1, e));
            }
            parameters.extend(experts(PROJECTIONS));
            if let Some(width) = config.shared_expert {
                let name = if family == Family::Qwen2Moe { "shared_expert" } else { "shared_experts" };
                parameters.extend(shared(name, d, width));
            }
            if config.shared_expert_gate {
                let gate = map("shared_expert_gate", one("shared_expert_gate.weight"), [1, d, 1]);
                parameters.push(Parameter { maps: None, ..gate });
            }
            parameters
        }
        Family::GptOss => {
            let alternate = |path, which, len| Parameter {
                stored: [1, 2 * len],
                taken: Taken::Alternate(which),
                ..vector(path, stacked("experts.gate_up_proj_bias"), e, 2 * len)
            };
            let up = |path, which| Parameter {
                stored: [d, 2 * f],
                taken: Taken::Alternate(which),
                transposed: false,
                ..map(path, stacked("experts.gate_up_proj"), [e, d, f])
            };
            let down =
                Parameter { stored: [f, d], transposed: false, ..map("experts.w_out", stacked("experts.down_proj"), [e, f, d]) };
            vec![
                router("router.weight"),
                vector("router.bias", one("router.bias"), 1, e),
                up("experts.w_gate", 0),
                alternate("experts.b_gate", 0, f),
                up("experts.w_in", 1),
                alternate("experts.b_in", 1, f),
                down,
                vector("experts.b_out", stacked("experts.down_proj_bias"), e, d),
            ]
        }
        Family::GraniteMoe => {
            let mut parameters = vec![router("router.layer.weight")];
            parameters.extend(halves(["input_linear.weight", "output_linear.weight"], [e, d, f]));
            parameters
        }
    }
}

/// Tensors of a layer that change nothing: the gate of a shared expert that is not there.
pub(super) fn is_idle(family: Family, config: &MoeFeedForwardConfig, key: &str) -> bool {
    family == Family::Qwen2Moe && config.shared_expert.is_none() && key == "shared_expert_gate.weight"
}
