//! The non-linearity between a feed-forward network's two linear maps.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// Element-wise activation of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Activation {
    /// `x · Φ(x)`, exact ([arXiv 1606.08415](https://arxiv.org/abs/1606.08415)); open_clip's and LAION's choice.
    Gelu,
    /// `x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2`, an approximation of `Gelu`; GPT-2's, Gemma's and SigLIP's choice
    /// (`gelu_new`, `gelu_pytorch_tanh` in transformers).
    GeluTanh,
    /// `x · σ(1.702 x)`; OpenAI's and DFN's choice.
    QuickGelu,
    /// `max(0, x)`.
    Relu,
    /// `x · σ(x)`.
    Silu,
}

impl Activation {
    /// Applies the function to every element; any shape.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        super::activation(x, *self)
    }
}
