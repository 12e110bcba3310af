//! One tile of a product, computed by a cube.
//!
//! Each plane computes a quarter of it in fragments of 16 x 8, with sums in f32. Factors pass through shared memory in pieces; while one piece is
//! multiplied, the next is on its way in registers.
//!
//! Fragments are loaded by `ldmatrix`: CubeCL's fragments that hide their layout are read value by value on Hopper, which was measured to be
//! several times slower.

use cubecl::{
    cmma::{MatrixIdent, MmaDefinition},
    prelude::*,
};

use crate::ops::cube::{grouped::Epilogue, pointwise::finish};

/// Rows and depth of a fragment of the left factor, and columns of two fragments of the right one, which are loaded together.
pub(super) const FRAGMENT: usize = 16;
/// Columns of a fragment of the right factor and of the sums.
pub(super) const COLUMNS: usize = 8;
/// Side of an output tile.
pub(super) const TILE: usize = 128;
/// Length of the pieces in which factors pass through shared memory.
pub(super) const DEPTH: usize = 32;
/// Planes along each side of a tile.
const PLANES: usize = 2;
pub(super) const PLANE_UNITS: usize = 32;
pub(super) const UNITS: usize = PLANES * PLANES * PLANE_UNITS;
/// Side of a plane's part of the tile, and how many times a fragment fits.
const PART: usize = TILE / PLANES;
const FRAGMENTS: usize = PART / FRAGMENT;
/// Values that a unit moves at once.
pub(super) const LANES: usize = 8;
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
pub(super) struct Piece {
    pub(super) first: usize,
    pub(super) pitch: usize,
    pub(super) lines: usize,
    pub(super) vectors: usize,
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
pub(super) fn product<F: Float, N: Size>(
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
pub(super) fn write<F: Float, N: Size>(
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
