//! What experts are made from.

use burn::nn::{activation::Activation as NnActivation, transformer::PositionWiseFeedForward};
use burn::tensor::{Device, Tensor, module::linear};

use super::UpcycleError;
use crate::{layer::experts::Activation, transformer::Mlp};

/// The weights of a dense feed-forward network, `FFN(x) = act(x · w_in + b_in) · w_out + b_out`, or, with `w_gate`,
/// `FFN(x) = (act(x · w_gate + b_gate) ⊙ (x · w_in + b_in)) · w_out + b_out`, as in Llama and Qwen (`gate_proj`, `up_proj`, `down_proj`).
#[derive(Clone, Debug)]
pub struct DenseWeights {
    /// `[D, F]`
    pub w_in: Tensor<2>,
    /// `[F]`
    pub b_in: Option<Tensor<1>>,
    /// `[D, F]`, of a gated network.
    pub w_gate: Option<Tensor<2>>,
    /// `[F]`, of a gated network.
    pub b_gate: Option<Tensor<1>>,
    /// `[F, D]`
    pub w_out: Tensor<2>,
    /// `[D]`
    pub b_out: Option<Tensor<1>>,
    /// The non-linearity.
    pub activation: Activation,
}

/// A feed-forward network that experts can be made from. Implement it for your own, and a
/// [`MoeFeedForward`](crate::MoeFeedForward) can be upcycled from it.
pub trait DenseFeedForward {
    /// The weights.
    ///
    /// # Errors
    /// [`UpcycleError::Activation`] when the network's non-linearity is none of [`Activation`].
    fn dense_weights(&self) -> Result<DenseWeights, UpcycleError>;
}

impl DenseWeights {
    /// Those of a network, as floats where they are quantized.
    pub(super) fn of<Dense: DenseFeedForward + ?Sized>(dense: &Dense) -> Result<Self, UpcycleError> {
        let Self { w_in, b_in, w_gate, b_gate, w_out, b_out, activation } = dense.dense_weights()?;
        Ok(Self {
            w_in: w_in.dequantize(),
            b_in: b_in.map(Tensor::dequantize),
            w_gate: w_gate.map(Tensor::dequantize),
            b_gate: b_gate.map(Tensor::dequantize),
            w_out: w_out.dequantize(),
            b_out: b_out.map(Tensor::dequantize),
            activation,
        })
    }

    /// The dense network itself, `[T, D] -> [T, D]`.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        linear(self.hidden(x), self.w_out.clone(), self.b_out.clone())
    }

    /// What the second map reads, `[T, D] -> [T, F]`.
    pub(super) fn hidden(&self, x: Tensor<2>) -> Tensor<2> {
        let input = |x| linear(x, self.w_in.clone(), self.b_in.clone());
        match &self.w_gate {
            None => self.activation.forward(input(x)),
            Some(w_gate) => self.activation.forward(linear(x.clone(), w_gate.clone(), self.b_gate.clone())) * input(x),
        }
    }

    /// How many numbers they are.
    pub(super) fn num_params(&self) -> usize {
        let [d_model, d_ff] = self.w_in.dims();
        let matrices = if self.w_gate.is_some() { 3 } else { 2 };
        let biases = [&self.b_in, &self.b_gate, &self.b_out];
        matrices * d_model * d_ff + biases.iter().filter_map(|bias| bias.as_ref().map(|bias| bias.dims()[0])).sum::<usize>()
    }

    /// The same weights on `device`, outside of any graph.
    pub(super) fn moved(&self, device: &Device) -> Self {
        fn moved<const D: usize>(tensor: &Tensor<D>, device: &Device) -> Tensor<D> {
            Tensor::from_data(tensor.clone().detach().into_data(), device)
        }
        Self {
            w_in: moved(&self.w_in, device),
            b_in: self.b_in.as_ref().map(|bias| moved(bias, device)),
            w_gate: self.w_gate.as_ref().map(|weight| moved(weight, device)),
            b_gate: self.b_gate.as_ref().map(|bias| moved(bias, device)),
            w_out: moved(&self.w_out, device),
            b_out: self.b_out.as_ref().map(|bias| moved(bias, device)),
            activation: self.activation,
        }
    }
}

impl DenseFeedForward for Mlp {
    fn dense_weights(&self) -> Result<DenseWeights, UpcycleError> {
        Ok(DenseWeights {
            w_in: self.linear_in.weight.val(),
            b_in: self.linear_in.bias.as_ref().map(|b| b.val()),
            w_gate: self.linear_gate.as_ref().map(|gate| gate.weight.val()),
            b_gate: self.linear_gate.as_ref().and_then(|gate| gate.bias.as_ref()).map(|b| b.val()),
            w_out: self.linear_out.weight.val(),
            b_out: self.linear_out.bias.as_ref().map(|b| b.val()),
            activation: self.activation,
        })
    }
}

/// A non-linearity of burn by its name, without its settings.
fn name_of(activation: &NnActivation) -> String {
    format!("{activation:?}").split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_string()
}

/// burn's own network. Its dropout is not taken over: the sparse layer has none.
impl DenseFeedForward for PositionWiseFeedForward {
    fn dense_weights(&self) -> Result<DenseWeights, UpcycleError> {
        let activation = match &self.activation {
            NnActivation::Gelu(gelu) => {
                if gelu.approximate {
                    Activation::GeluTanh
                } else {
                    Activation::Gelu
                }
            }
            NnActivation::Relu(_) => Activation::Relu,
            other => {
                return Err(UpcycleError::Activation { at: String::new(), dense: name_of(other), sparse: None });
            }
        };
        Ok(DenseWeights {
            w_in: self.linear_inner.weight.val(),
            b_in: self.linear_inner.bias.as_ref().map(|b| b.val()),
            w_gate: None,
            b_gate: None,
            w_out: self.linear_outer.weight.val(),
            b_out: self.linear_outer.bias.as_ref().map(|b| b.val()),
            activation,
        })
    }
}
