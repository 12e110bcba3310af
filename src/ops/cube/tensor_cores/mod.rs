//! One linear map per expert on tensor cores, for f16 and bf16: one launch for all experts, with bias and activation before anything is written.
//!
//! A cube computes one [tile] of the output. There is nothing to tune, so the same numbers give the same result in every process.

mod plan;
mod share;
mod tile;

use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    ir::{ElemType, FloatKind, features::MmaConfig},
    prelude::*,
};

use super::{
    grouped::{Epilogue, Launch, Linear, Maps},
    launch::{elem, elem_pair, empty},
};
use plan::{COLUMNS, FRAGMENT, LANES, PLANE_UNITS, Plan};
use share::Piece;
use tile::{product, write};

/// As [`row_tile`](super::grouped::row_tile). A plane loads the offsets of 32 experts at once, instead of waiting for one after the other.
#[cube]
fn row_tile<I: Int>(offsets: &Tensor<I>, tile: usize, num_experts: usize, #[comptime] tile_rows: u32) -> (usize, usize, usize) {
    let tile = tile as u32;
    let mut expert = 0u32;
    let mut first = 0u32;
    let mut rows = 0u32;
    let mut tiles_before = 0u32;
    for group in 0..num_experts.div_ceil(PLANE_UNITS) {
        let candidate = group * PLANE_UNITS + UNIT_POS as usize % PLANE_UNITS;
        let mut start = 0u32;
        let mut end = 0u32;
        if candidate < num_experts {
            start = u32::cast_from(offsets[candidate]);
            end = u32::cast_from(offsets[candidate + 1]);
        }
        let tiles = (end - start).div_ceil(tile_rows);
        let before = tiles_before + plane_inclusive_sum(tiles) - tiles;
        // One expert at most has the tile, so that sums over the plane are its own numbers.
        let mut its_expert = 0u32;
        let mut its_first = 0u32;
        let mut its_rows = 0u32;
        if tile >= before && tile < before + tiles {
            its_expert = candidate as u32;
            its_first = start + (tile - before) * tile_rows;
            its_rows = (end - its_first).min(tile_rows);
        }
        expert += plane_sum(its_expert);
        first += plane_sum(its_first);
        rows += plane_sum(its_rows);
        tiles_before += plane_sum(tiles);
    }
    (expert as usize, first as usize, rows as usize)
}

/// As the kernel of the same name in [`grouped`](super::grouped); `inner` and `columns` count vectors.
#[cube(launch)]
fn linear_kernel<F: Float, N: Size, I: Int>(
    x: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<F, N>>,
    bias: &Tensor<Vector<F, N>>,
    offsets: &Tensor<I>,
    out: &mut Tensor<Vector<F, N>>,
    pre: &mut Tensor<Vector<F, N>>,
    inner: usize,
    columns: usize,
    num_experts: usize,
    #[comptime] transposed: bool,
    #[comptime] epilogue: Epilogue,
    #[comptime] plan: Plan,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let (expert, first_row, rows) = row_tile::<I>(offsets, CUBE_POS_Y as usize, num_experts, comptime!(plan.rows as u32));
    if rows == 0 {
        terminate!();
    }
    let first_column = CUBE_POS_X as usize * comptime!(plan.columns);
    let first_vector = first_column / LANES;
    let left = Piece { first: first_row * inner, pitch: inner, lines: rows, vectors: inner };
    let weights = expert * inner * columns * LANES;
    let right = if transposed {
        Piece { first: weights + first_column * inner, pitch: inner, lines: columns * LANES - first_column, vectors: inner }
    } else {
        Piece { first: weights + first_vector, pitch: columns, lines: inner * LANES, vectors: columns - first_vector }
    };
    let pieces = (inner * LANES).div_ceil(comptime!(plan.depth));
    let sums = product::<F, N>(x, weight, &left, &right, pieces, plan, true, transposed);
    let target = Piece { first: first_row * columns + first_vector, pitch: columns, lines: rows, vectors: columns - first_vector };
    write::<F, N>(&sums, bias, out, pre, &target, expert * columns + first_vector, plan, epilogue);
}

/// As the kernel of the same name in [`grouped`](super::grouped); `d_in` and `d_out` count vectors.
#[cube(launch)]
fn weight_gradient_kernel<F: Float, N: Size, I: Int>(
    x: &Tensor<Vector<F, N>>,
    grad: &Tensor<Vector<F, N>>,
    offsets: &Tensor<I>,
    out: &mut Tensor<Vector<F, N>>,
    pre: &mut Tensor<Vector<F, N>>,
    d_in: usize,
    d_out: usize,
    #[comptime] plan: Plan,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let expert = CUBE_POS_Z as usize;
    let first_line = CUBE_POS_Y as usize * comptime!(plan.rows);
    let first_vector = CUBE_POS_X as usize * comptime!(plan.columns / LANES);
    let first_in = first_line / LANES;
    let start = usize::cast_from(offsets[expert]);
    let rows = usize::cast_from(offsets[expert + 1]) - start;
    let left = Piece { first: start * d_in + first_in, pitch: d_in, lines: rows, vectors: d_in - first_in };
    let right = Piece { first: start * d_out + first_vector, pitch: d_out, lines: rows, vectors: d_out - first_vector };
    let pieces = rows.div_ceil(comptime!(plan.depth));
    let sums = product::<F, N>(x, grad, &left, &right, pieces, plan, false, false);
    let lines = d_in * LANES - first_line;
    let first = (expert * d_in * LANES + first_line) * d_out + first_vector;
    let target = Piece { first, pitch: d_out, lines, vectors: d_out - first_vector };
    let epilogue = comptime!(Epilogue { bias: false, activation: None, keep_pre: false });
    write::<F, N>(&sums, grad, out, pre, &target, 0usize, plan, epilogue);
}

/// Whether these kernels can run: tensor cores for this number type, at least one row, and widths of whole vectors.
pub(super) fn are_usable(like: &CubeTensor, widths: [usize; 2]) -> bool {
    let number = elem(like);
    let fragment = MmaConfig {
        a_type: number,
        b_type: number,
        cd_type: ElemType::Float(FloatKind::F32),
        m: FRAGMENT as u32,
        n: COLUMNS as u32,
        k: FRAGMENT as u32,
    };
    let properties = like.client.properties();
    let planes = (properties.hardware.plane_size_min, properties.hardware.plane_size_max);
    number.size() == 2
        && like.meta.num_elements() > 0
        && widths.iter().all(|width| width.is_multiple_of(LANES))
        && planes == (PLANE_UNITS as u32, PLANE_UNITS as u32)
        && properties.features.matmul.mma.contains(&fragment)
        && properties.features.matmul.ldmatrix.contains(&number)
}

/// Rows of a tile.
const ROWS: usize = 128;

/// How tiles are computed on this device, of which an output of so many columns has `row_tiles` above each other.
///
/// Wide tiles read least, and what limits these products on an H200 is its second-level cache. But if there were fewer of them than the device has
/// processors, more of half the width are faster; and not every card has the shared memory (198 KiB for a block).
fn plan(like: &CubeTensor, row_tiles: usize, columns: usize) -> Plan {
    let properties = like.client.properties();
    let (hardware, asynchronous) = (&properties.hardware, properties.features.copy_async);
    let narrow = Plan { rows: ROWS, columns: 128, depth: 32, stages: if asynchronous { 3 } else { 2 }, asynchronous };
    let wide = Plan { columns: 256, depth: 64, ..narrow };
    let processors = hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
    let fill_the_device = row_tiles * columns.div_ceil(wide.columns) >= processors;
    let is_wide = asynchronous && fill_the_device && wide.memory() <= hardware.max_shared_memory_size;
    if is_wide { wide } else { narrow }
}

/// As [`grouped::linear`](super::grouped::linear).
pub(super) fn linear(x: CubeTensor, maps: Maps, offsets: CubeTensor) -> Linear {
    let [num_rows, inner] = x.meta.shape().dims();
    let plan = plan(&x, num_rows.div_ceil(ROWS), maps.columns());
    let Launch { grid, num_experts, epilogue, bias, pre, output } = Launch::new(&x, &maps, [plan.rows, plan.columns]);
    let (columns, dtypes) = (maps.columns(), elem_pair(&x, &offsets));
    linear_kernel::launch(
        &output.out.client,
        grid,
        CubeDim::new_1d(plan.units() as u32),
        LANES,
        x.into_tensor_arg(),
        maps.weight.into_tensor_arg(),
        bias.into_tensor_arg(),
        offsets.into_tensor_arg(),
        output.out.clone().into_tensor_arg(),
        pre.into_tensor_arg(),
        inner / LANES,
        columns / LANES,
        num_experts,
        maps.transposed,
        epilogue,
        plan,
        dtypes,
    );
    output
}

/// As [`grouped::weight_gradient`](super::grouped::weight_gradient).
pub(super) fn weight_gradient(x: CubeTensor, grad: CubeTensor, offsets: CubeTensor) -> CubeTensor {
    let ([_, d_in], [_, d_out]) = (x.meta.shape().dims(), grad.meta.shape().dims());
    let num_experts = offsets.meta.num_elements() - 1;
    let plan = plan(&x, num_experts * d_in.div_ceil(ROWS), d_out);
    let out = empty(&x, [num_experts, d_in, d_out]);
    let dtypes = elem_pair(&x, &offsets);
    let not_written = x.clone();
    weight_gradient_kernel::launch(
        &out.client,
        CubeCount::Static(d_out.div_ceil(plan.columns) as u32, d_in.div_ceil(plan.rows) as u32, num_experts as u32),
        CubeDim::new_1d(plan.units() as u32),
        LANES,
        x.into_tensor_arg(),
        grad.into_tensor_arg(),
        offsets.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        not_written.into_tensor_arg(),
        d_in / LANES,
        d_out / LANES,
        plan,
        dtypes,
    );
    out
}
