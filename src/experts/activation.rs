//! The non-linearity between an expert's two linear maps.

use burn::tensor::{Tensor, activation};
use serde::{Deserialize, Serialize};

/// Element-wise activation of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Activation {
    /// `x · Φ(x)`, exact ([arXiv 1606.08415](https://arxiv.org/abs/1606.08415)); open_clip's and LAION's choice.
    Gelu,
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
        match self {
            Self::Gelu => activation::gelu(x),
            Self::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
            Self::Relu => activation::relu(x),
            Self::Silu => activation::silu(x),
        }
    }
}
