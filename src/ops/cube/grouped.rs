//! One linear map per expert over rows sorted by expert, in tiles: no padding, and next to no work for an expert without rows.
//!
//! A cube computes one tile of the output from tiles of both factors in shared memory, each unit a small block of it; sums are in f32. Cubes are
//! handed out without knowing how many rows each expert has: there are enough for any split of the rows, and those too many write
//! nothing. One launch for all experts: for few rows, or widths that parts of a buffer cannot have.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{
    launch::{elem_pair, empty},
    pointwise::finish,
};
use crate::ops::Activation;

/// Side of an output tile.
const TILE: usize = 64;
/// Length of the pieces in which factors pass through shared memory.
const DEPTH: usize = 16;
/// Side of a unit's block.
const BLOCK: usize = 4;
/// Units along each side of a cube.
const UNITS: usize = TILE / BLOCK;

/// What is done to a sum before it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Epilogue {
    pub(super) bias: bool,
    pub(super) activation: Option<Activation>,
    pub(super) keep_pre: bool,
}

/// The expert of a tile of rows, and which it has: `(expert, first row, rows)`; no rows for a tile too many.
#[cube]
pub(super) fn row_tile<I: Int>(
    offsets: &Tensor<I>,
    tile: usize,
    num_experts: usize,
    #[comptime] tile_rows: usize,
) -> (usize, usize, usize) {
    let mut expert = 0usize;
    let mut first = 0usize;
    let mut rows = 0usize;
    let mut tiles_before = 0usize;
    for e in 0..num_experts {
        let start = usize::cast_from(offsets[e]);
        let end = usize::cast_from(offsets[e + 1]);
        let tiles = (end - start).div_ceil(tile_rows);
        if tile >= tiles_before && tile < tiles_before + tiles {
            expert = e;
            first = start + (tile - tiles_before) * tile_rows;
            rows = (end - first).min(tile_rows);
        }
        tiles_before += tiles;
    }
    (expert, first, rows)
}

/// `sums += leftᵀ · right` of two pieces in shared memory, `[DEPTH, TILE]` each.
#[cube]
fn multiply(left: &Shared<[f32]>, right: &Shared<[f32]>, sums: &mut Array<f32>, unit_row: usize, unit_column: usize) {
    #[unroll]
    for k in 0..DEPTH {
        let mut column_values = Array::<f32>::new(BLOCK);
        #[unroll]
        for j in 0..BLOCK {
            column_values[j] = right[k * TILE + unit_column + j * UNITS];
        }
        #[unroll]
        for i in 0..BLOCK {
            let value = left[k * TILE + unit_row + i * UNITS];
            #[unroll]
            for j in 0..BLOCK {
                sums[i * BLOCK + j] += value * column_values[j];
            }
        }
    }
}

/// `pre[r] = x[r] · w[e(r)] + bias[e(r)]`, if it is kept, and `out = act(pre)`: `[R, K], [E, K, N] -> [R, N]`; with `transposed`, weights are
/// `[E, N, K]`.
#[cube(launch)]
fn linear_kernel<F: Float, I: Int>(
    x: &Tensor<F>,
    weight: &Tensor<F>,
    bias: &Tensor<F>,
    offsets: &Tensor<I>,
    out: &mut Tensor<F>,
    pre: &mut Tensor<F>,
    inner: usize,
    columns: usize,
    num_experts: usize,
    #[comptime] transposed: bool,
    #[comptime] epilogue: Epilogue,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let mut left = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut right = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut sums = Array::<f32>::new(BLOCK * BLOCK);
    #[unroll]
    for i in 0..BLOCK * BLOCK {
        sums[i] = 0.0f32;
    }
    let unit = UNIT_POS as usize;
    let (expert, first_row, rows) = row_tile::<I>(offsets, CUBE_POS_Y as usize, num_experts, TILE);
    let first_column = CUBE_POS_X as usize * TILE;
    let weights = expert * inner * columns;
    for piece in 0..inner.div_ceil(DEPTH) {
        let depth = piece * DEPTH;
        #[unroll]
        for step in 0..BLOCK {
            let place = unit + step * UNITS * UNITS;
            // Neighbouring units read neighbouring values.
            let row = place / DEPTH;
            let k = place % DEPTH;
            let mut value = 0.0f32;
            if row < rows && depth + k < inner {
                value = f32::cast_from(x[(first_row + row) * inner + depth + k]);
            }
            left[k * TILE + row] = value;
            let mut value = 0.0f32;
            if transposed {
                let column = first_column + row;
                if column < columns && depth + k < inner {
                    value = f32::cast_from(weight[weights + column * inner + depth + k]);
                }
                right[k * TILE + row] = value;
            } else {
                let k = place / TILE;
                let column = place % TILE;
                if first_column + column < columns && depth + k < inner {
                    value = f32::cast_from(weight[weights + (depth + k) * columns + first_column + column]);
                }
                right[k * TILE + column] = value;
            }
        }
        sync_cube();
        multiply(&left, &right, &mut sums, unit / UNITS, unit % UNITS);
        sync_cube();
    }
    #[unroll]
    for i in 0..BLOCK {
        let row = unit / UNITS + i * UNITS;
        #[unroll]
        for j in 0..BLOCK {
            let column = first_column + unit % UNITS + j * UNITS;
            if row < rows && column < columns {
                let mut value = sums[i * BLOCK + j];
                if epilogue.bias {
                    value += f32::cast_from(bias[expert * columns + column]);
                }
                let at = (first_row + row) * columns + column;
                if epilogue.keep_pre {
                    pre[at] = F::cast_from(value);
                }
                let value = finish::<Const<1>>(Vector::new(value), epilogue.activation);
                out[at] = F::cast_from(value.extract(0usize));
            }
        }
    }
}

/// `out[e] = Σ_{r of e} x[r]ᵀ · grad[r]`: `[R, D], [R, F] -> [E, D, F]`.
#[cube(launch)]
fn weight_gradient_kernel<F: Float, I: Int>(
    x: &Tensor<F>,
    grad: &Tensor<F>,
    offsets: &Tensor<I>,
    out: &mut Tensor<F>,
    d_in: usize,
    d_out: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let mut left = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut right = Shared::<[f32]>::new_slice(DEPTH * TILE);
    let mut sums = Array::<f32>::new(BLOCK * BLOCK);
    #[unroll]
    for i in 0..BLOCK * BLOCK {
        sums[i] = 0.0f32;
    }
    let unit = UNIT_POS as usize;
    let expert = CUBE_POS_Z as usize;
    let first_in = CUBE_POS_Y as usize * TILE;
    let first_out = CUBE_POS_X as usize * TILE;
    let start = usize::cast_from(offsets[expert]);
    let end = usize::cast_from(offsets[expert + 1]);
    // WebGPU wants it said that every unit goes through the barriers below equally often.
    let mut pieces = Shared::<[u32]>::new_slice(1usize);
    if unit == 0 {
        pieces[0] = u32::cast_from((end - start).div_ceil(DEPTH));
    }
    let pieces = workgroup_uniform_load(&pieces[0]);
    for piece in 0..usize::cast_from(pieces) {
        let first_row = start + piece * DEPTH;
        #[unroll]
        for step in 0..BLOCK {
            let place = unit + step * UNITS * UNITS;
            let row = first_row + place / TILE;
            let column = place % TILE;
            let mut value = 0.0f32;
            if row < end && first_in + column < d_in {
                value = f32::cast_from(x[row * d_in + first_in + column]);
            }
            left[place] = value;
            let mut value = 0.0f32;
            if row < end && first_out + column < d_out {
                value = f32::cast_from(grad[row * d_out + first_out + column]);
            }
            right[place] = value;
        }
        sync_cube();
        multiply(&left, &right, &mut sums, unit / UNITS, unit % UNITS);
        sync_cube();
    }
    #[unroll]
    for i in 0..BLOCK {
        let row = first_in + unit / UNITS + i * UNITS;
        #[unroll]
        for j in 0..BLOCK {
            let column = first_out + unit % UNITS + j * UNITS;
            if row < d_in && column < d_out {
                out[(expert * d_in + row) * d_out + column] = F::cast_from(sums[i * BLOCK + j]);
            }
        }
    }
}

fn cube_dim() -> CubeDim {
    CubeDim::new_1d((UNITS * UNITS) as u32)
}

/// The weights of all experts.
pub(super) struct Maps {
    /// `[E, K, N]`, or `[E, N, K]` if transposed.
    pub(super) weight: CubeTensor,
    pub(super) transposed: bool,
    /// `[E, N]`
    pub(super) bias: Option<CubeTensor>,
    pub(super) activation: Option<Activation>,
    /// Whether what the activation is applied to is wanted too.
    pub(super) keep_pre: bool,
}

impl Maps {
    /// Width of the output, `N`.
    pub(super) fn columns(&self) -> usize {
        self.weight.meta.shape()[if self.transposed { 1 } else { 2 }]
    }
}

/// What the maps return, `[R, N]` each.
pub(super) struct Linear {
    pub(super) out: CubeTensor,
    /// What the activation was applied to, if that is kept.
    pub(super) pre: Option<CubeTensor>,
}

/// What a launch for all experts takes and returns besides rows, weights and offsets.
pub(super) struct Launch {
    pub(super) grid: CubeCount,
    pub(super) num_experts: usize,
    pub(super) epilogue: Epilogue,
    /// Something else where there is none: it is not read, nor written. A buffer may not be bound for writing twice.
    pub(super) bias: CubeTensor,
    pub(super) pre: CubeTensor,
    pub(super) output: Linear,
}

impl Launch {
    /// With a cube for each tile of the output, of so many rows and columns.
    pub(super) fn new(x: &CubeTensor, maps: &Maps, [rows, columns]: [usize; 2]) -> Self {
        let [num_rows, _] = x.meta.shape().dims();
        let [num_experts, _, _] = maps.weight.meta.shape().dims();
        let shape = [num_rows, maps.columns()];
        let (out, pre) = (empty(x, shape), maps.keep_pre.then(|| empty(x, shape)));
        // Every expert may leave one tile unfilled.
        let row_tiles = num_rows / rows + num_experts;
        Self {
            grid: CubeCount::Static(maps.columns().div_ceil(columns) as u32, row_tiles as u32, 1),
            num_experts,
            epilogue: Epilogue { bias: maps.bias.is_some(), activation: maps.activation, keep_pre: maps.keep_pre },
            bias: maps.bias.clone().unwrap_or_else(|| x.clone()),
            pre: pre.clone().unwrap_or_else(|| x.clone()),
            output: Linear { out, pre },
        }
    }
}

/// `[R, K] -> [R, N]` by each row's expert.
pub(super) fn linear(x: CubeTensor, maps: Maps, offsets: CubeTensor) -> Linear {
    let [_, inner] = x.meta.shape().dims();
    let Launch { grid, num_experts, epilogue, bias, pre, output } = Launch::new(&x, &maps, [TILE; 2]);
    let (columns, dtypes) = (maps.columns(), elem_pair(&x, &offsets));
    linear_kernel::launch(
        &output.out.client,
        grid,
        cube_dim(),
        x.into_tensor_arg(),
        maps.weight.into_tensor_arg(),
        bias.into_tensor_arg(),
        offsets.into_tensor_arg(),
        output.out.clone().into_tensor_arg(),
        pre.into_tensor_arg(),
        inner,
        columns,
        num_experts,
        maps.transposed,
        epilogue,
        dtypes,
    );
    output
}

/// `[R, D], [R, F] -> [E, D, F]`.
pub(super) fn weight_gradient(x: CubeTensor, grad: CubeTensor, offsets: CubeTensor) -> CubeTensor {
    let ([_, d_in], [_, d_out]) = (x.meta.shape().dims(), grad.meta.shape().dims());
    let num_experts = offsets.meta.num_elements() - 1;
    let out = empty(&x, [num_experts, d_in, d_out]);
    let dtypes = elem_pair(&x, &offsets);
    weight_gradient_kernel::launch(
        &out.client,
        CubeCount::Static(d_out.div_ceil(TILE) as u32, d_in.div_ceil(TILE) as u32, num_experts as u32),
        cube_dim(),
        x.into_tensor_arg(),
        grad.into_tensor_arg(),
        offsets.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        d_in,
        d_out,
        dtypes,
    );
    out
}
