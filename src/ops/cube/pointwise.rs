//! Activations and their slopes, in f32.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{
    grouped::Linear,
    launch::{Elementwise, elem, elem_pair, empty, vector_size},
};
use crate::ops::Activation;

/// `1 / √2`
const FRAC_1_SQRT_2: f32 = std::f32::consts::FRAC_1_SQRT_2;
/// `1 / √(2 π)`
const FRAC_1_SQRT_2_PI: f32 = 0.398_942_3;

#[cube]
fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    one / (one + (-x).exp())
}

/// `2 √(2/π)`, as `(1 + tanh(u)) / 2 = σ(2 u)`.
const TANH_SCALE: f32 = 1.595_769;
const TANH_CUBE: f32 = 0.044_715;

/// `2 √(2/π) · (x + 0.044715 x³)`.
#[cube]
fn tanh_argument<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    Vector::<f32, N>::new(TANH_SCALE) * (x + Vector::<f32, N>::new(TANH_CUBE) * x * x * x)
}

/// `act(x)`.
#[cube]
fn activate<N: Size>(x: Vector<f32, N>, #[comptime] activation: Activation) -> Vector<f32, N> {
    match activation {
        Activation::Gelu => {
            let erf = (x * Vector::<f32, N>::new(FRAC_1_SQRT_2)).erf();
            x * Vector::<f32, N>::new(0.5f32) * (Vector::<f32, N>::new(1.0f32) + erf)
        }
        Activation::GeluTanh => x * sigmoid::<N>(tanh_argument::<N>(x)),
        Activation::QuickGelu => x * sigmoid::<N>(x * Vector::<f32, N>::new(1.702f32)),
        // Not the maximum, which makes 0 of what is not a number.
        Activation::Relu => {
            let zero = Vector::<f32, N>::new(0.0f32);
            select_many(x.less_than(&zero), zero, x)
        }
        Activation::Silu => x * sigmoid::<N>(x),
    }
}

/// `act'(x)`.
#[cube]
fn slope<N: Size>(x: Vector<f32, N>, #[comptime] activation: Activation) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0f32);
    match activation {
        Activation::Gelu => {
            let half = Vector::<f32, N>::new(0.5f32);
            let erf = (x * Vector::<f32, N>::new(FRAC_1_SQRT_2)).erf();
            let density = (-(x * x) * half).exp() * Vector::<f32, N>::new(FRAC_1_SQRT_2_PI);
            half * (one + erf) + x * density
        }
        Activation::GeluTanh => {
            let s = sigmoid::<N>(tanh_argument::<N>(x));
            // Beyond it the sigmoid is 0 or 1, and a square must not overflow.
            let near = x.max(Vector::<f32, N>::new(-80.0f32)).min(Vector::<f32, N>::new(80.0f32));
            let steepness = Vector::<f32, N>::new(TANH_SCALE) * (one + Vector::<f32, N>::new(3.0f32 * TANH_CUBE) * near * near);
            s + near * s * (one - s) * steepness
        }
        Activation::QuickGelu => {
            let steepness = Vector::<f32, N>::new(1.702f32);
            let s = sigmoid::<N>(x * steepness);
            s * (one + steepness * x * (one - s))
        }
        Activation::Relu => Vector::cast_from(x.greater_than(&Vector::<f32, N>::new(0.0f32))),
        Activation::Silu => {
            let s = sigmoid::<N>(x);
            s * (one + x * (one - s))
        }
    }
}

#[cube(launch)]
fn activation_kernel<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    total: usize,
    #[comptime] activation: Activation,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < total {
        out[ABSOLUTE_POS] = Vector::cast_from(activate::<N>(Vector::cast_from(x[ABSOLUTE_POS]), activation));
    }
}

#[cube(launch)]
fn activation_backward_kernel<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    total: usize,
    #[comptime] activation: Activation,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < total {
        let grad = Vector::<f32, N>::cast_from(grad[ABSOLUTE_POS]);
        out[ABSOLUTE_POS] = Vector::cast_from(grad * slope::<N>(Vector::cast_from(x[ABSOLUTE_POS]), activation));
    }
}

/// `rows[r] += bias[e(r)]` in place, then `act` of it in place too, or to `out` if both are to be kept.
#[cube(launch)]
fn add_bias_kernel<F: Float, N: Size, I: Int>(
    rows: &mut Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    bias: &Tensor<Vector<F, N>>,
    offsets: &Tensor<I>,
    width: usize,
    num_experts: usize,
    total: usize,
    #[comptime] activation: Option<Activation>,
    #[comptime] keep_pre: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS < total {
        let row = ABSOLUTE_POS / width;
        let mut expert = 0usize;
        for e in 1..num_experts {
            if row >= usize::cast_from(offsets[e]) {
                expert = e;
            }
        }
        let bias = Vector::<f32, N>::cast_from(bias[expert * width + ABSOLUTE_POS % width]);
        let value = Vector::<f32, N>::cast_from(rows[ABSOLUTE_POS]) + bias;
        let finished = Vector::cast_from(finish::<N>(value, activation));
        if keep_pre {
            rows[ABSOLUTE_POS] = Vector::cast_from(value);
            out[ABSOLUTE_POS] = finished;
        } else {
            rows[ABSOLUTE_POS] = finished;
        }
    }
}

/// What follows a sum.
#[cube]
pub(super) fn finish<N: Size>(value: Vector<f32, N>, #[comptime] activation: Option<Activation>) -> Vector<f32, N> {
    match activation {
        Some(activation) => activate::<N>(value, activation),
        None => value,
    }
}

/// `[R, F], [E, F] -> [R, F]`; `rows` is written over.
pub(super) fn add_bias(
    rows: CubeTensor,
    bias: CubeTensor,
    offsets: CubeTensor,
    activation: Option<Activation>,
    keep_pre: bool,
) -> Linear {
    let [num_rows, width] = rows.meta.shape().dims();
    let [num_experts, _] = bias.meta.shape().dims();
    let kept_out = keep_pre.then(|| empty(&rows, [num_rows, width]));
    let lanes = vector_size(&rows, width);
    let grid = Elementwise::new(&rows, num_rows * width / lanes);
    let dtypes = elem_pair(&rows, &offsets);
    // What stands in for it is not written; a buffer may not be bound for writing twice.
    let out_or_any = kept_out.clone().unwrap_or_else(|| bias.clone());
    add_bias_kernel::launch(
        &rows.client,
        grid.count,
        grid.dim,
        lanes,
        rows.clone().into_tensor_arg(),
        out_or_any.into_tensor_arg(),
        bias.into_tensor_arg(),
        offsets.into_tensor_arg(),
        width / lanes,
        num_experts,
        grid.total,
        activation,
        keep_pre,
        dtypes,
    );
    match kept_out {
        Some(out) => Linear { out, pre: Some(rows) },
        None => Linear { out: rows, pre: None },
    }
}

/// Any shape.
pub(super) fn activation(x: CubeTensor, activation: Activation) -> CubeTensor {
    let (out, lanes) = like(&x);
    let grid = Elementwise::new(&out, x.meta.num_elements() / lanes);
    let dtype = elem(&x);
    activation_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        lanes,
        x.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        grid.total,
        activation,
        dtype,
    );
    out
}

/// `grad · act'(x)`, any shape.
pub(super) fn activation_backward(x: CubeTensor, grad: CubeTensor, activation: Activation) -> CubeTensor {
    let (out, lanes) = like(&x);
    let grid = Elementwise::new(&out, x.meta.num_elements() / lanes);
    let dtype = elem(&x);
    activation_backward_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        lanes,
        x.into_tensor_arg(),
        grad.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        grid.total,
        activation,
        dtype,
    );
    out
}

/// An output of the same shape, and the values that a unit handles.
fn like(x: &CubeTensor) -> (CubeTensor, usize) {
    let total = x.meta.num_elements();
    let mut out = empty(x, [total]);
    out.meta = x.meta.clone();
    (out, vector_size(x, total))
}
