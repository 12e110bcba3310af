//! The router's product in f32, whatever the numbers of the tokens: burn's own product may round f32 to 19 bits on tensor cores (TF32), which
//! changes the expert of a token, and would read and keep a copy of all tokens in f32.
//!
//! The weight comes transposed, `[E, D]`, so that neighbouring units read neighbouring values of it.

use burn::{backend::ops::FloatTensorOps, tensor::DType};
use burn_cubecl::{CubeBackend, ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::prelude::*;

use super::launch::{Elementwise, elem, empty, vector_size};

/// Units that share a row of tokens.
const LANES: usize = 32;
/// Rows of units in a cube.
const ROWS: usize = 8;
/// Tokens of a row of units in the forward pass: each value of the weight is read once for all of them.
const TOKENS: usize = 4;
/// Experts that a cube computes.
const EXPERTS: usize = 8;
/// Tokens whose part of the weight's gradient is summed by one cube.
const CHUNK: usize = 256;

/// `logits[t, e] = Σ_d x[t, d] · w[e, d]`: `[T, D], [E, D] -> [T, E]`.
#[cube(launch)]
fn logits_kernel<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<f32, N>>,
    logits: &mut Tensor<f32>,
    width: usize,
    num_tokens: usize,
    num_experts: usize,
    #[comptime] vector_size: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut parts = Shared::<[f32]>::new_slice(ROWS * LANES * EXPERTS);
    let unit = UNIT_POS as usize;
    let (row, lane) = (unit / LANES, unit % LANES);
    let first_token = (CUBE_POS_X as usize * ROWS + row) * TOKENS;
    let first_expert = CUBE_POS_Y as usize * EXPERTS;
    let mut sums = Array::<f32>::new(TOKENS * EXPERTS);
    #[unroll]
    for i in 0..TOKENS * EXPERTS {
        sums[i] = 0.0f32;
    }
    let mut column = lane;
    while column < width {
        let mut values = Array::<Vector<f32, N>>::new(TOKENS);
        #[unroll]
        for i in 0..TOKENS {
            // Sums of tokens and experts too many are not written.
            let token = (first_token + i).min(num_tokens - 1);
            values[i] = Vector::cast_from(x[token * width + column]);
        }
        #[unroll]
        for j in 0..EXPERTS {
            let expert = (first_expert + j).min(num_experts - 1);
            let weights = weight[expert * width + column];
            #[unroll]
            for i in 0..TOKENS {
                #[unroll]
                for k in 0..vector_size {
                    sums[i * EXPERTS + j] += values[i].extract(k) * weights.extract(k);
                }
            }
        }
        column += LANES;
    }
    #[unroll]
    for i in 0..TOKENS {
        #[unroll]
        for j in 0..EXPERTS {
            parts[(row * EXPERTS + j) * LANES + lane] = sums[i * EXPERTS + j];
        }
        sync_cube();
        if unit < ROWS * EXPERTS {
            let token = CUBE_POS_X as usize * ROWS * TOKENS + unit / EXPERTS * TOKENS + i;
            let expert = first_expert + unit % EXPERTS;
            let mut sum = 0.0f32;
            for other in 0..LANES {
                sum += parts[unit * LANES + other];
            }
            if token < num_tokens && expert < num_experts {
                logits[token * num_experts + expert] = sum;
            }
        }
        sync_cube();
    }
}

/// `out[t, d] = Σ_e grad[t, e] · w[e, d]`: `[T, E], [E, D] -> [T, D]`.
#[cube(launch)]
fn tokens_kernel<F: Float, N: Size>(
    grad: &Tensor<f32>,
    weight: &Tensor<Vector<f32, N>>,
    out: &mut Tensor<Vector<F, N>>,
    width: usize,
    num_experts: usize,
    total: usize,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let token = ABSOLUTE_POS / width;
    let column = ABSOLUTE_POS % width;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for e in 0..num_experts {
        sum += weight[e * width + column] * Vector::new(grad[token * num_experts + e]);
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum);
}

/// `out[chunk, e, d] = Σ_{t of chunk} grad[t, e] · x[t, d]`: `[T, E], [T, D] -> [chunks, E, D]`. Tokens without a gradient are left out: among them
/// are those that are not finite.
#[cube(launch)]
fn weight_kernel<F: Float, N: Size>(
    grad: &Tensor<f32>,
    x: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<f32, N>>,
    width: usize,
    num_tokens: usize,
    num_experts: usize,
    #[define(F)] _dtype: ElemType,
) {
    let mut parts = Shared::<[Vector<f32, N>]>::new_slice(ROWS * LANES);
    let unit = UNIT_POS as usize;
    let (row, lane) = (unit / LANES, unit % LANES);
    let column = CUBE_POS_X as usize * LANES + lane;
    let first_expert = CUBE_POS_Z as usize * EXPERTS;
    let chunk = CUBE_POS_Y as usize;
    let end = ((chunk + 1) * CHUNK).min(num_tokens);
    let mut sums = Array::<Vector<f32, N>>::new(EXPERTS);
    #[unroll]
    for j in 0..EXPERTS {
        sums[j] = Vector::new(0.0f32);
    }
    if column < width {
        let mut token = chunk * CHUNK + row;
        while token < end {
            let value = Vector::<f32, N>::cast_from(x[token * width + column]);
            #[unroll]
            for j in 0..EXPERTS {
                let expert = (first_expert + j).min(num_experts - 1);
                let gradient = grad[token * num_experts + expert];
                sums[j] += select(gradient == 0.0f32, Vector::new(0.0f32), value) * Vector::new(gradient);
            }
            token += ROWS;
        }
    }
    #[unroll]
    for j in 0..EXPERTS {
        parts[unit] = sums[j];
        sync_cube();
        if row == 0 && column < width && first_expert + j < num_experts {
            let mut sum = sums[j];
            #[unroll]
            for other in 1..ROWS {
                sum += parts[other * LANES + lane];
            }
            out[(chunk * num_experts + first_expert + j) * width + column] = sum;
        }
        sync_cube();
    }
}

/// All bits of the exponent: set in what is not finite. A comparison would not do, as a compiler may take every number for finite.
const EXPONENT: u32 = 0x7f80_0000;

/// Whether a value is neither infinite nor NaN.
#[cube]
pub(super) fn is_finite(value: f32) -> bool {
    u32::reinterpret(value) & EXPONENT != EXPONENT
}

/// NaN for all experts of a token that has a logit that is not finite.
#[cube(launch)]
fn mark_kernel(logits: &mut Tensor<f32>, not_a_number: f32, num_experts: usize, total: usize) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let first = ABSOLUTE_POS * num_experts;
    let mut is_good = true;
    for e in 0..num_experts {
        is_good = is_good && is_finite(logits[first + e]);
    }
    if !is_good {
        for e in 0..num_experts {
            logits[first + e] = not_a_number;
        }
    }
}

/// The gradient, with zeros for tokens that are marked.
#[cube(launch)]
fn unmarked_kernel(grad: &Tensor<f32>, logits: &Tensor<f32>, out: &mut Tensor<f32>, num_experts: usize, total: usize) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let first = ABSOLUTE_POS / num_experts * num_experts;
    out[ABSOLUTE_POS] = select(is_finite(logits[first]), grad[ABSOLUTE_POS], 0.0f32);
}

fn cube_dim() -> CubeDim {
    CubeDim::new_1d((ROWS * LANES) as u32)
}

fn empty_f32<const R: usize>(like: &CubeTensor, shape: [usize; R]) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), DType::F32)
}

/// `[T, D], [E, D] -> [T, E]`, NaN for a token with a logit that is not finite.
pub(super) fn logits(x: CubeTensor, weight: CubeTensor) -> CubeTensor {
    let [num_tokens, d_model] = x.meta.shape().dims();
    let [num_experts, _] = weight.meta.shape().dims();
    let out = empty_f32(&x, [num_tokens, num_experts]);
    let lanes = vector_size(&x, d_model);
    let dtype = elem(&x);
    logits_kernel::launch(
        &out.client,
        CubeCount::Static(num_tokens.div_ceil(ROWS * TOKENS) as u32, num_experts.div_ceil(EXPERTS) as u32, 1),
        cube_dim(),
        lanes,
        x.into_tensor_arg(),
        weight.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        d_model / lanes,
        num_tokens,
        num_experts,
        lanes,
        dtype,
    );
    let grid = Elementwise::new(&out, num_tokens);
    mark_kernel::launch(&out.client, grid.count, grid.dim, out.clone().into_tensor_arg(), f32::NAN, num_experts, grid.total);
    out
}

fn unmarked(grad: CubeTensor, logits: CubeTensor) -> CubeTensor {
    let [num_tokens, num_experts] = grad.meta.shape().dims();
    let out = empty(&grad, [num_tokens, num_experts]);
    let grid = Elementwise::new(&out, num_tokens * num_experts);
    let (grad, logits) = (grad.into_tensor_arg(), logits.into_tensor_arg());
    unmarked_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        grad,
        logits,
        out.clone().into_tensor_arg(),
        num_experts,
        grid.total,
    );
    out
}

/// `[T, E], [E, D] -> [T, D]`, with the numbers of `x`.
pub(super) fn tokens_gradient(grad: CubeTensor, weight: CubeTensor, x: &CubeTensor, logits: CubeTensor) -> CubeTensor {
    let grad = unmarked(grad, logits);
    let [num_tokens, num_experts] = grad.meta.shape().dims();
    let [_, d_model] = weight.meta.shape().dims();
    let out = empty(x, [num_tokens, d_model]);
    let lanes = vector_size(x, d_model);
    let grid = Elementwise::new(&out, num_tokens * d_model / lanes);
    tokens_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        lanes,
        grad.into_tensor_arg(),
        weight.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        d_model / lanes,
        num_experts,
        grid.total,
        elem(x),
    );
    out
}

/// `[T, E], [T, D] -> [E, D]`.
pub(super) fn weight_gradient(grad: CubeTensor, x: CubeTensor, logits: CubeTensor) -> CubeTensor {
    let grad = unmarked(grad, logits);
    let [num_tokens, num_experts] = grad.meta.shape().dims();
    let [_, d_model] = x.meta.shape().dims();
    let chunks = num_tokens.div_ceil(CHUNK);
    let parts = empty_f32(&x, [chunks, num_experts, d_model]);
    let lanes = vector_size(&x, d_model);
    let dtype = elem(&x);
    weight_kernel::launch(
        &parts.client,
        CubeCount::Static((d_model / lanes).div_ceil(LANES) as u32, chunks as u32, num_experts.div_ceil(EXPERTS) as u32),
        cube_dim(),
        lanes,
        grad.into_tensor_arg(),
        x.into_tensor_arg(),
        parts.clone().into_tensor_arg(),
        d_model / lanes,
        num_tokens,
        num_experts,
        dtype,
    );
    CubeBackend::float_reshape(CubeBackend::float_sum_dim(parts, 0), [num_experts, d_model].into())
}
