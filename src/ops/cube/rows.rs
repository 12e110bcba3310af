//! Moving rows: gathers in both directions, so that nothing is ever added to from two places.
//!
//! A unit handles one vector of neighbouring values; sums are in f32.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{Elementwise, cubes, elem_pair, empty, vector_size};
use crate::ops::NON_FINITE;

/// Units that share one dot product.
const DOT_UNITS: u32 = 64;

/// `out[r] = x[t(r)]`, times `gates[choice of r]` if weighted; zeros in a row without a choice.
#[cube(launch)]
fn gather_kernel<F: Float, N: Size, I: Int>(
    x: &Tensor<Vector<F, N>>,
    gates: &Tensor<F>,
    row_choice: &Tensor<I>,
    out: &mut Tensor<Vector<F, N>>,
    width: usize,
    num_choices: usize,
    total: usize,
    #[comptime] weighted: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let choice = i32::cast_from(row_choice[ABSOLUTE_POS / width]);
    let mut value = Vector::<F, N>::new(F::new(0.0_f32));
    if choice >= 0 {
        let choice = usize::cast_from(choice);
        value = x[choice / num_choices * width + ABSOLUTE_POS % width];
        if weighted {
            let gate = Vector::<f32, N>::new(f32::cast_from(gates[choice]));
            value = Vector::cast_from(Vector::<f32, N>::cast_from(value) * gate);
        }
    }
    out[ABSOLUTE_POS] = value;
}

/// `out[t] = Σ_m rows[row of (t, m)]`; if weighted, each row times `gates[t, m]`, and `non_finite` for a token with a choice that is [`NON_FINITE`].
#[cube(launch)]
fn sum_kernel<F: Float, N: Size, I: Int>(
    rows: &Tensor<Vector<F, N>>,
    gates: &Tensor<F>,
    choice_row: &Tensor<I>,
    out: &mut Tensor<Vector<F, N>>,
    non_finite: f32,
    width: usize,
    num_choices: usize,
    total: usize,
    #[comptime] weighted: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let token = ABSOLUTE_POS / width;
    let column = ABSOLUTE_POS % width;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for m in 0..num_choices {
        let choice = token * num_choices + m;
        let row = i32::cast_from(choice_row[choice]);
        if row >= 0 {
            let value = Vector::<f32, N>::cast_from(rows[usize::cast_from(row) * width + column]);
            if weighted {
                sum += value * Vector::<f32, N>::new(f32::cast_from(gates[choice]));
            } else {
                sum += value;
            }
        } else if weighted && row == i32::new(comptime!(NON_FINITE as i64)) {
            sum = Vector::new(non_finite);
        }
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum);
}

/// `out[t, m] = x[t] · rows[row of (t, m)]`, 0 for a choice without a row. A cube for each choice; partial sums meet in an order that depends on
/// the width alone.
#[cube(launch)]
fn products_kernel<F: Float, N: Size, I: Int>(
    x: &Tensor<Vector<F, N>>,
    rows: &Tensor<Vector<F, N>>,
    choice_row: &Tensor<I>,
    out: &mut Tensor<F>,
    width: usize,
    num_choices: usize,
    total: usize,
    #[comptime] units: u32,
    #[comptime] vector_size: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let mut partial = Shared::<[f32]>::new_slice(units as usize);
    let unit = UNIT_POS as usize;
    // No early end: every unit must come to the barriers below.
    let choice = CUBE_POS.min(total - 1);
    let row = i32::cast_from(choice_row[choice]);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    if row >= 0 {
        let left = choice / num_choices * width;
        let right = usize::cast_from(row) * width;
        let mut column = unit;
        while column < width {
            sum += Vector::<f32, N>::cast_from(x[left + column]) * Vector::<f32, N>::cast_from(rows[right + column]);
            column += units as usize;
        }
    }
    let mut lanes = 0.0f32;
    #[unroll]
    for lane in 0..vector_size {
        lanes += sum.extract(lane);
    }
    partial[unit] = lanes;
    let steps = comptime!(units.ilog2());
    #[unroll]
    for step in 0..steps {
        sync_cube();
        let half = comptime!((units >> (step + 1)) as usize);
        if unit < half {
            let other = partial[unit + half];
            partial[unit] += other;
        }
    }
    if unit == 0 && CUBE_POS < total {
        out[choice] = F::cast_from(partial[0]);
    }
}

/// `[T, D] -> [R, D]`.
pub(super) fn gather(x: CubeTensor, gates: Option<CubeTensor>, row_choice: CubeTensor, num_choices: usize) -> CubeTensor {
    let [_, width] = x.meta.shape().dims();
    let [num_rows] = row_choice.meta.shape().dims();
    let out = empty(&x, [num_rows, width]);
    let lanes = vector_size(&x, width);
    let grid = Elementwise::new(&out, num_rows * width / lanes);
    let (weighted, gates) = (gates.is_some(), gates.unwrap_or_else(|| x.clone()));
    let dtypes = elem_pair(&x, &row_choice);
    gather_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        lanes,
        x.into_tensor_arg(),
        gates.into_tensor_arg(),
        row_choice.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        width / lanes,
        num_choices,
        grid.total,
        weighted,
        dtypes,
    );
    out
}

/// `[R, D] -> [T, D]`.
pub(super) fn sum(rows: CubeTensor, gates: Option<CubeTensor>, choice_row: CubeTensor, num_tokens: usize) -> CubeTensor {
    let [_, width] = rows.meta.shape().dims();
    let [num_choices_in_all] = choice_row.meta.shape().dims();
    let out = empty(&rows, [num_tokens, width]);
    let lanes = vector_size(&rows, width);
    let grid = Elementwise::new(&out, num_tokens * width / lanes);
    let (weighted, gates) = (gates.is_some(), gates.unwrap_or_else(|| rows.clone()));
    let dtypes = elem_pair(&rows, &choice_row);
    sum_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        lanes,
        rows.into_tensor_arg(),
        gates.into_tensor_arg(),
        choice_row.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        f32::NAN,
        width / lanes,
        num_choices_in_all / num_tokens,
        grid.total,
        weighted,
        dtypes,
    );
    out
}

/// `[T, D], [R, D] -> [T, M]`.
pub(super) fn products(x: CubeTensor, rows: CubeTensor, choice_row: CubeTensor) -> CubeTensor {
    let [num_tokens, width] = x.meta.shape().dims();
    let [total] = choice_row.meta.shape().dims();
    let num_choices = total / num_tokens;
    let out = empty(&x, [num_tokens, num_choices]);
    let lanes = vector_size(&x, width);
    let dtypes = elem_pair(&x, &choice_row);
    let dim = CubeDim::new_1d(DOT_UNITS);
    products_kernel::launch(
        &out.client,
        cubes(&out, total, dim),
        dim,
        lanes,
        x.into_tensor_arg(),
        rows.into_tensor_arg(),
        choice_row.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        width / lanes,
        num_choices,
        total,
        DOT_UNITS,
        lanes,
        dtypes,
    );
    out
}
