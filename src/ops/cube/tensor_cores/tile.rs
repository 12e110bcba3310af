//! One tile of a product, computed by a cube.
//!
//! Each plane computes a part of it in fragments of 16 x 8, with sums in f32. Factors pass through shared memory in pieces. Where the device copies
//! to shared memory by itself, several pieces are on their way while one is multiplied; elsewhere the next one is, in registers.
//!
//! Fragments are loaded by `ldmatrix`: CubeCL's fragments that hide their layout are read value by value on Hopper, which was measured to be
//! several times slower.

use cubecl::{
    cmma::{MatrixIdent, MmaDefinition},
    prelude::*,
};

use super::{
    plan::{COLUMNS, FRAGMENT, FRAGMENTS, LANES, PART, PLANE_UNITS, Plan, SUMS},
    share::{Piece, Share, copy, end_of_group, fetch, put, wait_for_groups},
};
use crate::ops::cube::{grouped::Epilogue, pointwise::finish};

/// Values of a register of a factor, or of two of the sums.
type Pair = Const<2>;
/// Four registers of the fragment `index` of a plane's part, at `depth` within the piece: 16 lines along the sum by 16 across it. Of the left
/// factor, the second register is eight rows further down; of the right one, it is further along the sum.
#[cube]
#[allow(clippy::too_many_arguments)]
fn fragment<F: Float, N: Size>(
    definition: &MmaDefinition<F, F, f32>,
    memory: &Shared<[Vector<F, N>]>,
    start: usize,
    part: usize,
    #[comptime] index: usize,
    #[comptime] depth: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] pitch: usize,
    #[comptime] along: bool,
) -> Array<Vector<F, Pair>> {
    let unit = UNIT_POS as usize % PLANE_UNITS;
    let (low, high) = (unit / 8 % 2, unit / 16);
    // Which eight across and which along the sum this unit's line is for.
    let (outer, inner) = if comptime!(ident == MatrixIdent::A) { (low, high) } else { (high, low) };
    let outer = part * PART + comptime!(index * FRAGMENT) + outer * 8;
    let inner = comptime!(depth) + inner * 8;
    let line = unit % 8;
    let first = if along { start + (outer + line) * pitch + inner / LANES } else { start + (inner + line) * pitch + outer / LANES };
    definition.load_matrix::<Vector<F, N>, Pair>(&memory[first..first + 1], ident, 4usize, comptime!(!along))
}

/// What a plane multiplies at a time, 16 along the sum: registers of its rows of the left factor and of its columns of the right one, which come
/// as two fragments at once. They are words of 32 bits: what is kept from one step to the next in pairs of 16 bits, CUDA's compiler takes apart and
/// puts together again.
#[derive(CubeType)]
struct Fragments {
    rows: Array<u32>,
    columns: Array<u32>,
}

#[cube]
impl Fragments {
    fn new() -> Fragments {
        Fragments { rows: Array::<u32>::new(4 * FRAGMENTS), columns: Array::<u32>::new(4 * FRAGMENTS) }
    }
}

/// Loads what is multiplied at `step` of the piece in `stage`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load<F: Float, N: Size>(
    fragments: &mut Fragments,
    definition: &MmaDefinition<F, F, f32>,
    left_memory: &Shared<[Vector<F, N>]>,
    right_memory: &Shared<[Vector<F, N>]>,
    stage: usize,
    #[comptime] step: usize,
    #[comptime] plan: Plan,
    #[comptime] left_along: bool,
    #[comptime] right_along: bool,
) {
    let plane = UNIT_POS as usize / PLANE_UNITS;
    let planes = comptime!(plan.columns / PART);
    let depth = comptime!(step * FRAGMENT);
    let start = stage * comptime!(plan.piece(plan.columns, right_along));
    #[unroll]
    for j in 0..FRAGMENTS {
        let pitch = comptime!(plan.width(plan.columns, right_along) + 1);
        let ident = comptime!(MatrixIdent::B);
        let loaded = fragment::<F, N>(definition, right_memory, start, plane % planes, j, depth, ident, pitch, right_along);
        #[unroll]
        for register in 0..4usize {
            fragments.columns[comptime!(4 * j + register)] = u32::reinterpret(loaded[register]);
        }
    }
    let start = stage * comptime!(plan.piece(plan.rows, left_along));
    #[unroll]
    for i in 0..FRAGMENTS {
        let pitch = comptime!(plan.width(plan.rows, left_along) + 1);
        let ident = comptime!(MatrixIdent::A);
        let loaded = fragment::<F, N>(definition, left_memory, start, plane / planes, i, depth, ident, pitch, left_along);
        #[unroll]
        for register in 0..4usize {
            fragments.rows[comptime!(4 * i + register)] = u32::reinterpret(loaded[register]);
        }
    }
}

/// Adds the products of fragments to a plane's sums.
#[cube]
fn multiply<F: Float>(fragments: &Fragments, definition: &MmaDefinition<F, F, f32>, sums: &mut Sequence<Array<Vector<f32, Pair>>>) {
    #[unroll]
    for i in 0..FRAGMENTS {
        let mut row = Array::<Vector<F, Pair>>::new(4usize);
        #[unroll]
        for register in 0..4usize {
            row[register] = Vector::reinterpret(fragments.rows[comptime!(4 * i + register)]);
        }
        #[unroll]
        for j in 0..2 * FRAGMENTS {
            let mut column = Array::<Vector<F, Pair>>::new(2usize);
            column[0] = Vector::reinterpret(fragments.columns[comptime!(2 * j)]);
            column[1] = Vector::reinterpret(fragments.columns[comptime!(2 * j + 1)]);
            definition.execute_inplace(&row, &column, sums.index_mut(comptime!(2 * i * FRAGMENTS + j)));
        }
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
    #[comptime] plan: Plan,
    #[comptime] left_along: bool,
    #[comptime] right_along: bool,
) -> Sequence<Array<Vector<f32, Pair>>> {
    let (rows, columns, stages) = comptime!((plan.rows, plan.columns, plan.stages));
    let (left_size, right_size) = comptime!((plan.piece(rows, left_along), plan.piece(columns, right_along)));
    let mut left_memory = Shared::<[Vector<F, N>]>::new_aligned_slice(comptime!(stages * left_size), 128usize);
    let mut right_memory = Shared::<[Vector<F, N>]>::new_aligned_slice(comptime!(stages * right_size), 128usize);
    let definition = MmaDefinition::<F, F, f32>::new(FRAGMENT, COLUMNS, FRAGMENT);
    let mut sums = Sequence::<Array<Vector<f32, Pair>>>::new();
    #[unroll]
    for _ in 0..2 * FRAGMENTS * FRAGMENTS {
        let mut sum = Array::<Vector<f32, Pair>>::new(2usize);
        sum[0] = Vector::new(0.0f32);
        sum[1] = Vector::new(0.0f32);
        sums.push(sum);
    }
    let left_share = Share::new(left_piece, plan, rows, left_along);
    let right_share = Share::new(right_piece, plan, columns, right_along);
    let mut even = Fragments::new();
    if comptime!(plan.asynchronous) {
        let mut odd = Fragments::new();
        // Behind the last piece there are only zeros, which are copied too: so a group ends with each piece.
        #[unroll]
        for index in 0..comptime!(stages - 1) {
            copy::<F, N>(left, &mut left_memory, comptime!(index * left_size), &left_share, index, plan, rows, left_along);
            copy::<F, N>(right, &mut right_memory, comptime!(index * right_size), &right_share, index, plan, columns, right_along);
            end_of_group();
        }
        wait_for_groups(comptime!(stages - 2));
        sync_cube();
        load(&mut even, &definition, &left_memory, &right_memory, 0usize, 0usize, plan, left_along, right_along);
        let steps = comptime!(plan.depth / FRAGMENT);
        let mut free = comptime!(stages - 1).runtime();
        let mut stage = 0usize;
        for index in 0..pieces {
            let next = select(stage == comptime!(stages - 1), 0usize, stage + 1);
            #[unroll]
            for step in 0..steps {
                // Fragments of the next step are loaded while those of this one are multiplied.
                let after = comptime!((step + 1) % steps);
                if comptime!(after == 0) {
                    wait_for_groups(comptime!(stages - 2));
                    // Everyone's part of the next piece is there, and nobody reads this one any more.
                    sync_cube();
                }
                let stage_after = if comptime!(after == 0) { next } else { stage };
                if comptime!(step % 2 == 0) {
                    load(&mut odd, &definition, &left_memory, &right_memory, stage_after, after, plan, left_along, right_along);
                } else {
                    load(&mut even, &definition, &left_memory, &right_memory, stage_after, after, plan, left_along, right_along);
                }
                if comptime!(step == 0) {
                    let ahead = index + comptime!(stages - 1);
                    copy::<F, N>(left, &mut left_memory, free * left_size, &left_share, ahead, plan, rows, left_along);
                    copy::<F, N>(right, &mut right_memory, free * right_size, &right_share, ahead, plan, columns, right_along);
                    end_of_group();
                }
                if comptime!(step % 2 == 0) {
                    multiply(&even, &definition, &mut sums);
                } else {
                    multiply(&odd, &definition, &mut sums);
                }
            }
            free = stage;
            stage = next;
        }
        wait_for_groups(0usize);
    } else {
        let mut left_words = fetch::<F, N>(left, &left_share, 0usize, plan, rows, left_along);
        let mut right_words = fetch::<F, N>(right, &right_share, 0usize, plan, columns, right_along);
        put::<F, N>(&left_words, &mut left_memory, 0usize, &left_share, 0usize, plan, rows, left_along);
        put::<F, N>(&right_words, &mut right_memory, 0usize, &right_share, 0usize, plan, columns, right_along);
        sync_cube();
        for index in 0..pieces {
            let next = index + 1;
            let more = next < pieces;
            if more {
                left_words = fetch::<F, N>(left, &left_share, next, plan, rows, left_along);
                right_words = fetch::<F, N>(right, &right_share, next, plan, columns, right_along);
            }
            #[unroll]
            for step in 0..comptime!(plan.depth / FRAGMENT) {
                load(&mut even, &definition, &left_memory, &right_memory, index % stages, step, plan, left_along, right_along);
                multiply(&even, &definition, &mut sums);
            }
            if more {
                let stage = next % stages;
                put::<F, N>(&left_words, &mut left_memory, stage * left_size, &left_share, next, plan, rows, left_along);
                put::<F, N>(&right_words, &mut right_memory, stage * right_size, &right_share, next, plan, columns, right_along);
            }
            sync_cube();
        }
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
    #[comptime] plan: Plan,
    #[comptime] epilogue: Epilogue,
) {
    let size = comptime!(plan.written_at_once() / 2);
    let mut memory = Shared::<[Vector<f32, Pair>]>::new_aligned_slice(size, 128usize);
    let plane = UNIT_POS as usize / PLANE_UNITS;
    let planes = comptime!(plan.columns / PART);
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
            let line = plane / planes * PART + i * FRAGMENT + place / width;
            let vector = plane % planes * width + place % width;
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
