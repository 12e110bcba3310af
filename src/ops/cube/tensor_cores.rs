//! One linear map per expert on tensor cores, for f16 and bf16: one launch for all experts, with bias and activation before anything is written.
//!
//! A cube computes one tile of the output, each of its planes a quarter of it in fragments of 16 x 8 with sums in f32. Factors pass through
//! shared memory in pieces; while one piece is multiplied, the next is on its way in registers. There is nothing to tune, so the same
//! numbers give the same result in every process.
//!
//! Fragments are loaded by `ldmatrix`: CubeCL's fragments that hide their layout are read value by value on Hopper, which was measured to be
//! several times slower.

use burn_cubecl::tensor::CubeTensor;
use cubecl::{
    cmma::{MatrixIdent, MmaDefinition},
    ir::{ElemType, FloatKind, features::MmaConfig},
    prelude::*,
};

use super::{
    grouped::{Epilogue, Launch, Linear, Maps},
    launch::{elem, elem_pair, empty},
    pointwise::finish,
};

/// Rows and depth of a fragment of the left factor, and columns of two fragments of the right one, which are loaded together.
const FRAGMENT: usize = 16;
/// Columns of a fragment of the right factor and of the sums.
const COLUMNS: usize = 8;
/// Side of an output tile.
const TILE: usize = 128;
/// Length of the pieces in which factors pass through shared memory.
const DEPTH: usize = 32;
/// Planes along each side of a tile.
const PLANES: usize = 2;
const PLANE_UNITS: usize = 32;
const UNITS: usize = PLANES * PLANES * PLANE_UNITS;
/// Side of a plane's part of the tile, and how many times a fragment fits.
const PART: usize = TILE / PLANES;
const FRAGMENTS: usize = PART / FRAGMENT;
/// Values that a unit moves at once.
const LANES: usize = 8;
/// Vectors that a unit moves of each piece.
const STEPS: usize = TILE * DEPTH / LANES / UNITS;
/// Vectors from one line of a piece to the next in shared memory, padded by one against bank conflicts: of pieces whose lines go along the sum,
/// and of those whose lines go across.
const ALONG: usize = DEPTH / LANES + 1;
const ACROSS: usize = TILE / LANES + 1;
/// The larger of the two sizes of a piece, in vectors.
const PIECE: usize = TILE * ALONG;
/// From a line of a plane's sums to the next, in vectors.
const SUMS: usize = PART / LANES + 1;
/// Values of a register of a factor, or of two of the sums.
type Pair = Const<2>;
/// A vector in registers, as words of 32 bits: with values of 16 bits, the compiler repacks each vector as soon as it is loaded, and so waits
/// for it.
type Words = Vector<u32, Const<4>>;

/// Part of a matrix: its first vector, the vectors from one line to the next, and the lines and vectors that the matrix has from there on.
#[derive(CubeType)]
struct Piece {
    first: usize,
    pitch: usize,
    lines: usize,
    vectors: usize,
}

/// Whether the matrix has this vector of the piece.
#[cube]
fn has(piece: &Piece, line: usize, vector: usize) -> bool {
    line < piece.lines && vector < piece.vectors
}

/// Each unit's share of a piece. Positions beyond the matrix load its first vector; [`put`] replaces them by zeros, so that no load is waited
/// for here.
#[cube]
fn fetch<F: Float, N: Size>(source: &Tensor<Vector<F, N>>, piece: &Piece, #[comptime] along: bool) -> Array<Words> {
    let width = comptime!(if along { DEPTH / LANES } else { TILE / LANES });
    let mut share = Array::<Words>::new(STEPS);
    #[unroll]
    for step in 0..STEPS {
        let place = UNIT_POS as usize + step * UNITS;
        let line = place / width;
        let vector = place % width;
        let at = select(has(piece, line, vector), piece.first + line * piece.pitch + vector, 0usize);
        share[step] = Words::reinterpret(source[at]);
    }
    share
}

/// Stores a unit's share of a piece in shared memory, with zeros beyond the matrix.
#[cube]
fn put<F: Float, N: Size>(
    share: &Array<Words>,
    memory: &mut Shared<[Vector<F, N>]>,
    start: usize,
    piece: &Piece,
    #[comptime] along: bool,
) {
    let width = comptime!(if along { DEPTH / LANES } else { TILE / LANES });
    let pitch = comptime!(if along { ALONG } else { ACROSS });
    #[unroll]
    for step in 0..STEPS {
        let place = UNIT_POS as usize + step * UNITS;
        let at = start + place / width * pitch + place % width;
        let value = select(has(piece, place / width, place % width), share[step], Words::new(0u32));
        memory[at] = Vector::reinterpret(value);
    }
}

/// Four registers of the fragment `index` of a plane's part, at `depth` within the piece: 16 lines along the sum by 16 across it. Of the left
/// factor, the second register is eight rows further down; of the right one, it is further along the sum.
#[cube]
fn fragment<F: Float, N: Size>(
    definition: &MmaDefinition<F, F, f32>,
    memory: &Shared<[Vector<F, N>]>,
    start: usize,
    part: usize,
    #[comptime] index: usize,
    #[comptime] depth: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] along: bool,
) -> Array<Vector<F, Pair>> {
    let unit = UNIT_POS as usize % PLANE_UNITS;
    let (low, high) = (unit / 8 % 2, unit / 16);
    // Which eight across and which along the sum this unit's line is for.
    let (outer, inner) = if comptime!(ident == MatrixIdent::A) { (low, high) } else { (high, low) };
    let outer = part * PART + comptime!(index * FRAGMENT) + outer * 8;
    let inner = comptime!(depth) + inner * 8;
    let line = unit % 8;
    let first =
        if along { start + (outer + line) * ALONG + inner / LANES } else { start + (inner + line) * ACROSS + outer / LANES };
    definition.load_matrix::<Vector<F, N>, Pair>(&memory[first..first + 1], ident, 4usize, comptime!(!along))
}

/// What is left of a matrix after `index` pieces.
#[cube]
fn piece_at(all: &Piece, index: usize, #[comptime] along: bool) -> Piece {
    if along {
        let vectors = index * (DEPTH / LANES);
        Piece { first: all.first + vectors, pitch: all.pitch, lines: all.lines, vectors: all.vectors - vectors }
    } else {
        let lines = index * DEPTH;
        Piece { first: all.first + lines * all.pitch, pitch: all.pitch, lines: all.lines - lines, vectors: all.vectors }
    }
}

/// A plane's part of the product of two factors, in `pieces` pieces.
#[cube]
#[allow(clippy::too_many_arguments)]
fn product<F: Float, N: Size>(
    left: &Tensor<Vector<F, N>>,
    right: &Tensor<Vector<F, N>>,
    left_piece: &Piece,
    right_piece: &Piece,
    pieces: usize,
    #[comptime] left_along: bool,
    #[comptime] right_along: bool,
) -> Sequence<Array<Vector<f32, Pair>>> {
    // Two of each: one is read while the other is written.
    let mut left_memory = Shared::<[Vector<F, N>]>::new_aligned_slice(2 * PIECE, 128usize);
    let mut right_memory = Shared::<[Vector<F, N>]>::new_aligned_slice(2 * PIECE, 128usize);
    let plane = UNIT_POS as usize / PLANE_UNITS;
    let definition = MmaDefinition::<F, F, f32>::new(FRAGMENT, COLUMNS, FRAGMENT);
    let mut sums = Sequence::<Array<Vector<f32, Pair>>>::new();
    #[unroll]
    for _ in 0..2 * FRAGMENTS * FRAGMENTS {
        let mut sum = Array::<Vector<f32, Pair>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }
    let first_left = piece_at(left_piece, 0usize, left_along);
    let first_right = piece_at(right_piece, 0usize, right_along);
    let mut left_share = fetch::<F, N>(left, &first_left, left_along);
    let mut right_share = fetch::<F, N>(right, &first_right, right_along);
    put::<F, N>(&left_share, &mut left_memory, 0usize, &first_left, left_along);
    put::<F, N>(&right_share, &mut right_memory, 0usize, &first_right, right_along);
    sync_cube();
    for index in 0..pieces {
        let more = index + 1 < pieces;
        if more {
            left_share = fetch::<F, N>(left, &piece_at(left_piece, index + 1, left_along), left_along);
            right_share = fetch::<F, N>(right, &piece_at(right_piece, index + 1, right_along), right_along);
        }
        let start = index % 2 * PIECE;
        #[unroll]
        for step in 0..DEPTH / FRAGMENT {
            let mut rights = Sequence::<Array<Vector<F, Pair>>>::new();
            #[unroll]
            for j in 0..FRAGMENTS {
                let pair = fragment::<F, N>(
                    &definition,
                    &right_memory,
                    start,
                    plane % PLANES,
                    j,
                    comptime!(step * FRAGMENT),
                    MatrixIdent::B,
                    right_along,
                );
                #[unroll]
                for half in 0..2usize {
                    let mut right = Array::<Vector<F, Pair>>::new(2usize);
                    right[0] = pair[comptime!(2 * half)];
                    right[1] = pair[comptime!(2 * half + 1)];
                    rights.push(right);
                }
            }
            #[unroll]
            for i in 0..FRAGMENTS {
                let row = fragment::<F, N>(
                    &definition,
                    &left_memory,
                    start,
                    plane / PLANES,
                    i,
                    comptime!(step * FRAGMENT),
                    MatrixIdent::A,
                    left_along,
                );
                #[unroll]
                for j in 0..2 * FRAGMENTS {
                    definition.execute_inplace(&row, rights.index(j), sums.index_mut(comptime!(2 * i * FRAGMENTS + j)));
                }
            }
        }
        if more {
            let start = (index + 1) % 2 * PIECE;
            put::<F, N>(&left_share, &mut left_memory, start, &piece_at(left_piece, index + 1, left_along), left_along);
            put::<F, N>(&right_share, &mut right_memory, start, &piece_at(right_piece, index + 1, right_along), right_along);
        }
        sync_cube();
    }
    sums
}

/// Writes a plane's part to the tile `target` of the output: `pre = sum + bias`, if it is kept, and `out = act(pre)`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write<F: Float, N: Size>(
    sums: &Sequence<Array<Vector<f32, Pair>>>,
    bias: &Tensor<Vector<F, N>>,
    out: &mut Tensor<Vector<F, N>>,
    pre: &mut Tensor<Vector<F, N>>,
    target: &Piece,
    first_bias: usize,
    #[comptime] epilogue: Epilogue,
) {
    let mut memory = Shared::<[Vector<f32, Pair>]>::new_aligned_slice(PLANES * PLANES * FRAGMENT * SUMS * LANES / 2, 128usize);
    let plane = UNIT_POS as usize / PLANE_UNITS;
    let unit = UNIT_POS as usize % PLANE_UNITS;
    let start = plane * (FRAGMENT * SUMS);
    let width = comptime!(PART / LANES);
    #[unroll]
    for i in 0..FRAGMENTS {
        #[unroll]
        for j in 0..2 * FRAGMENTS {
            let sum = sums.index(comptime!(2 * i * FRAGMENTS + j));
            let first = (start + unit / 4 * SUMS) * (LANES / 2) + comptime!(j * COLUMNS / 2) + unit % 4;
            memory[first] = sum[0];
            memory[first + comptime!(FRAGMENT / 2 * SUMS * LANES / 2)] = sum[1];
        }
        sync_plane();
        #[unroll]
        for step in 0..FRAGMENT * PART / LANES / PLANE_UNITS {
            let place = unit + step * PLANE_UNITS;
            let line = plane / PLANES * PART + i * FRAGMENT + place / width;
            let vector = plane % PLANES * width + place % width;
            if line < target.lines && vector < target.vectors {
                let mut value = memory.with_vector_size::<N>()[start + place / width * SUMS + place % width];
                if epilogue.bias {
                    value += Vector::<f32, N>::cast_from(bias[first_bias + vector]);
                }
                let at = target.first + line * target.pitch + vector;
                if epilogue.keep_pre {
                    pre[at] = Vector::cast_from(value);
                }
                out[at] = Vector::cast_from(finish::<N>(value, epilogue.activation));
            }
        }
        sync_plane();
    }
}

/// As [`row_tile`](super::grouped::row_tile). A plane loads the offsets of 32 experts at once, instead of waiting for one after the other.
#[cube]
fn row_tile<I: Int>(offsets: &Tensor<I>, tile: usize, num_experts: usize) -> (usize, usize, usize) {
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
        let tiles = (end - start).div_ceil(TILE as u32);
        let before = tiles_before + plane_inclusive_sum(tiles) - tiles;
        // One expert at most has the tile, so that sums over the plane are its own numbers.
        let mut its_expert = 0u32;
        let mut its_first = 0u32;
        let mut its_rows = 0u32;
        if tile >= before && tile < before + tiles {
            its_expert = candidate as u32;
            its_first = start + (tile - before) * TILE as u32;
            its_rows = (end - its_first).min(TILE as u32);
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
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let (expert, first_row, rows) = row_tile::<I>(offsets, CUBE_POS_Y as usize, num_experts);
    if rows == 0 {
        terminate!();
    }
    let first_column = CUBE_POS_X as usize * TILE;
    let first_vector = first_column / LANES;
    let left = Piece { first: first_row * inner, pitch: inner, lines: rows, vectors: inner };
    let weights = expert * inner * columns * LANES;
    let right = if transposed {
        Piece { first: weights + first_column * inner, pitch: inner, lines: columns * LANES - first_column, vectors: inner }
    } else {
        Piece { first: weights + first_vector, pitch: columns, lines: inner * LANES, vectors: columns - first_vector }
    };
    let pieces = (inner * LANES).div_ceil(DEPTH);
    let sums = product::<F, N>(x, weight, &left, &right, pieces, true, transposed);
    let target = Piece { first: first_row * columns + first_vector, pitch: columns, lines: rows, vectors: columns - first_vector };
    write::<F, N>(&sums, bias, out, pre, &target, expert * columns + first_vector, epilogue);
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
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let expert = CUBE_POS_Z as usize;
    let first_line = CUBE_POS_Y as usize * TILE;
    let first_vector = CUBE_POS_X as usize * (TILE / LANES);
    let first_in = first_line / LANES;
    let start = usize::cast_from(offsets[expert]);
    let rows = usize::cast_from(offsets[expert + 1]) - start;
    let left = Piece { first: start * d_in + first_in, pitch: d_in, lines: rows, vectors: d_in - first_in };
    let right = Piece { first: start * d_out + first_vector, pitch: d_out, lines: rows, vectors: d_out - first_vector };
    let sums = product::<F, N>(x, grad, &left, &right, rows.div_ceil(DEPTH), false, false);
    let lines = d_in * LANES - first_line;
    let first = (expert * d_in * LANES + first_line) * d_out + first_vector;
    let target = Piece { first, pitch: d_out, lines, vectors: d_out - first_vector };
    let epilogue = comptime!(Epilogue { bias: false, activation: None, keep_pre: false });
    write::<F, N>(&sums, grad, out, pre, &target, 0usize, epilogue);
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

/// As [`grouped::linear`](super::grouped::linear).
pub(super) fn linear(x: CubeTensor, maps: Maps, offsets: CubeTensor) -> Linear {
    let [_, inner] = x.meta.shape().dims();
    let Launch { grid, num_experts, epilogue, bias, pre, output } = Launch::new(&x, &maps, TILE);
    let (columns, dtypes) = (maps.columns(), elem_pair(&x, &offsets));
    linear_kernel::launch(
        &output.out.client,
        grid,
        CubeDim::new_1d(UNITS as u32),
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
        dtypes,
    );
    output
}

/// As [`grouped::weight_gradient`](super::grouped::weight_gradient).
pub(super) fn weight_gradient(x: CubeTensor, grad: CubeTensor, offsets: CubeTensor) -> CubeTensor {
    let ([_, d_in], [_, d_out]) = (x.meta.shape().dims(), grad.meta.shape().dims());
    let num_experts = offsets.meta.num_elements() - 1;
    let out = empty(&x, [num_experts, d_in, d_out]);
    let dtypes = elem_pair(&x, &offsets);
    let not_written = x.clone();
    weight_gradient_kernel::launch(
        &out.client,
        CubeCount::Static(d_out.div_ceil(TILE) as u32, d_in.div_ceil(TILE) as u32, num_experts as u32),
        CubeDim::new_1d(UNITS as u32),
        LANES,
        x.into_tensor_arg(),
        grad.into_tensor_arg(),
        offsets.into_tensor_arg(),
        out.clone().into_tensor_arg(),
        not_written.into_tensor_arg(),
        d_in / LANES,
        d_out / LANES,
        dtypes,
    );
    out
}
