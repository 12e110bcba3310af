//! Sums of each expert's rows, column by column: for the gradient of a bias.
//!
//! An expert has thousands of rows and a column is one unit's work, so rows are summed in chunks first, by many cubes, and then the chunks. Which
//! rows are added to which depends on the split of the rows alone.

use burn_cubecl::{ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    grouped::row_tile,
    launch::{Elementwise, elem_pair, empty, vector_size},
};

/// Rows of a chunk.
const CHUNK: usize = 256;
/// Vectors that a cube has side by side.
const COLUMNS: usize = 32;
/// Units that share a column of a chunk.
const UNITS: usize = 8;

/// `sums[chunk] = Σ_{r of chunk} x[r]`: `[R, F] -> [chunks, F]`, in f32.
#[cube(launch)]
fn chunks_kernel<F: Float, N: Size, I: Int>(
    x: &Tensor<Vector<F, N>>,
    offsets: &Tensor<I>,
    sums: &mut Tensor<Vector<f32, N>>,
    width: usize,
    num_experts: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let mut parts = Shared::<[Vector<f32, N>]>::new_slice(COLUMNS * UNITS);
    let unit = UNIT_POS as usize;
    let column = CUBE_POS_X as usize * COLUMNS + unit % COLUMNS;
    let chunk = CUBE_POS_Y as usize;
    let (_, first, rows) = row_tile::<I>(offsets, chunk, num_experts, CHUNK);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    if column < width {
        let mut row = unit / COLUMNS;
        while row < rows {
            sum += Vector::cast_from(x[(first + row) * width + column]);
            row += UNITS;
        }
    }
    parts[unit] = sum;
    sync_cube();
    if unit < COLUMNS && column < width {
        #[unroll]
        for other in 1..UNITS {
            sum += parts[other * COLUMNS + unit];
        }
        sums[chunk * width + column] = sum;
    }
}

/// `out[e] = Σ_{chunks of e} sums[chunk]`: `[chunks, F] -> [E, F]`.
#[cube(launch)]
fn experts_kernel<F: Float, N: Size, I: Int>(
    sums: &Tensor<Vector<f32, N>>,
    offsets: &Tensor<I>,
    out: &mut Tensor<Vector<F, N>>,
    width: usize,
    total: usize,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    let expert = ABSOLUTE_POS / width;
    let column = ABSOLUTE_POS % width;
    let mut first = 0usize;
    for e in 0..expert {
        first += usize::cast_from(offsets[e + 1] - offsets[e]).div_ceil(CHUNK);
    }
    let chunks = usize::cast_from(offsets[expert + 1] - offsets[expert]).div_ceil(CHUNK);
    let mut sum = Vector::<f32, N>::new(0.0f32);
    for chunk in first..first + chunks {
        sum += sums[chunk * width + column];
    }
    out[ABSOLUTE_POS] = Vector::cast_from(sum);
}

/// `out[e] = Σ_{r of e} x[r]`: `[R, F] -> [E, F]`.
pub(super) fn by_expert(x: CubeTensor, offsets: CubeTensor) -> CubeTensor {
    let [num_rows, columns] = x.meta.shape().dims();
    let num_experts = offsets.meta.num_elements() - 1;
    // Every expert may leave one chunk unfilled.
    let chunks = num_rows / CHUNK + num_experts;
    let sums =
        empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), [chunks, columns].into(), burn::tensor::DType::F32);
    let out = empty(&x, [num_experts, columns]);
    let lanes = vector_size(&x, columns);
    let width = columns / lanes;
    let dtypes = elem_pair(&x, &offsets);
    chunks_kernel::launch(
        &out.client,
        CubeCount::Static(width.div_ceil(COLUMNS) as u32, chunks as u32, 1),
        CubeDim::new_1d((COLUMNS * UNITS) as u32),
        lanes,
        x.into_tensor_arg(),
        offsets.clone().into_tensor_arg(),
        sums.clone().into_tensor_arg(),
        width,
        num_experts,
        dtypes,
    );
    let grid = Elementwise::new(&out, num_experts * width);
    experts_kernel::launch(
        &out.client,
        grid.count,
        grid.dim,
        lanes,
        sums.into_tensor_arg(),
        offsets.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        width,
        grid.total,
        dtypes,
    );
    out
}
