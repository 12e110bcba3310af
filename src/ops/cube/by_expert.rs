//! One matrix product of the backend's own for each expert, into its part of the output: for experts with many rows.
//!
//! burn picks that product by measuring what the device has to offer, tensor cores included. No row is padded, and an expert without
//! rows costs nothing; what it costs is one launch for each of the others.

use std::ops::Range;

use burn::backend::ops::FloatTensorOps;
use burn_cubecl::{
    CubeBackend,
    kernel::matmul::{MatmulStrategy, matmul},
    ops::numeric::zeros_client,
    tensor::CubeTensor,
};

use super::{
    grouped::{Linear, Maps},
    launch::empty,
    pointwise,
};

/// Mean rows of an expert from which the launches are worth it.
pub(in crate::ops) const MIN_ROWS: usize = 128;
/// Where a part of a buffer may begin, in bytes, on every device.
const ALIGNMENT: usize = 256;

/// Whether products expert by expert are possible and worth it, for rows of these widths.
pub(super) fn is_worth_it(like: &CubeTensor, widths: [usize; 2], offsets: &[usize]) -> bool {
    let num_experts = offsets.len() - 1;
    offsets[num_experts] >= MIN_ROWS * num_experts
        && widths.iter().all(|width| (width * like.dtype.size()).is_multiple_of(ALIGNMENT))
}

/// Experts with rows, and their rows.
fn loads(offsets: &[usize]) -> impl Iterator<Item = (usize, Range<usize>)> {
    offsets.windows(2).map(|pair| pair[0]..pair[1]).enumerate().filter(|(_, rows)| !rows.is_empty())
}

/// Some rows of a matrix, where they are.
fn rows_of(x: &CubeTensor, rows: Range<usize>) -> CubeTensor {
    let [num_rows, width] = x.meta.shape().dims();
    part(x, rows.start * width, (num_rows - rows.end) * width, [rows.len(), width])
}

/// The matrix of one expert, where it is.
fn matrix_of(weight: &CubeTensor, expert: usize) -> CubeTensor {
    let [num_experts, rows, columns] = weight.meta.shape().dims();
    let size = rows * columns;
    part(weight, expert * size, (num_experts - expert - 1) * size, [rows, columns])
}

fn part(x: &CubeTensor, before: usize, after: usize, shape: [usize; 2]) -> CubeTensor {
    let bytes = |values: usize| (values * x.dtype.size()) as u64;
    let handle = x.handle.clone().offset_start(bytes(before)).offset_end(bytes(after));
    CubeTensor::new_contiguous(x.client.clone(), x.device.clone(), shape.into(), handle, x.dtype)
}

fn transposed(x: CubeTensor) -> CubeTensor {
    CubeBackend::float_swap_dims(x, 0, 1)
}

fn multiply(lhs: CubeTensor, rhs: CubeTensor, out: CubeTensor) {
    let dtype = out.dtype;
    matmul(lhs, rhs, Some(out), MatmulStrategy::default(), dtype).expect("matrices that fit can be multiplied");
}

/// As [`grouped::linear`](super::grouped::linear).
pub(super) fn linear(x: CubeTensor, maps: Maps, offsets: CubeTensor, host_offsets: &[usize]) -> Linear {
    let out = empty(&x, [x.meta.shape()[0], maps.columns()]);
    for (expert, rows) in loads(host_offsets) {
        let weight = matrix_of(&maps.weight, expert);
        let weight = if maps.transposed { transposed(weight) } else { weight };
        multiply(rows_of(&x, rows.clone()), weight, rows_of(&out, rows));
    }
    match maps.bias {
        Some(bias) => pointwise::add_bias(out, bias, offsets, maps.activation, maps.keep_pre),
        None => Linear { out, pre: None },
    }
}

/// As [`grouped::weight_gradient`](super::grouped::weight_gradient).
pub(super) fn weight_gradient(x: CubeTensor, grad: CubeTensor, host_offsets: &[usize]) -> CubeTensor {
    let num_experts = host_offsets.len() - 1;
    let shape = [num_experts, x.meta.shape()[1], grad.meta.shape()[1]];
    let out = if loads(host_offsets).count() == num_experts {
        empty(&x, shape)
    } else {
        zeros_client(x.client.clone(), x.device.clone(), shape.into(), x.dtype)
    };
    for (expert, rows) in loads(host_offsets) {
        multiply(transposed(rows_of(&x, rows.clone())), rows_of(&grad, rows), matrix_of(&out, expert));
    }
    out
}
