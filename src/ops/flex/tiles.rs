//! The inner product of what is packed: a tile of rows times a panel of columns, with all sums in registers.
//!
//! Each sum is over the inner indices in their order, so a row's result does not depend on the other rows of its tile.

use pulp::Simd;

use super::prefetch::Ahead;

/// Columns of a panel.
pub(super) const PANEL: usize = 32;
/// The most rows of a tile.
pub(super) const TILE_ROWS: usize = 12;

/// `by_height!(rows, M => call::<M>())`: a call for each number of rows that a tile may have.
macro_rules! by_height {
    ($height:expr, $m:ident => $call:expr) => {
        by_height!($height, $m => $call; 1 2 3 4 5 6 7 8 9 10 11 12)
    };
    ($height:expr, $m:ident => $call:expr; $($rows:literal)*) => {
        match $height {
            $($rows => {
                const $m: usize = $rows;
                $call
            })*
            height => unreachable!("a tile of {height} rows"),
        }
    };
}

/// One inner index, or one group of them, of a panel; at the start of a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line<T>(pub [T; PANEL]);

/// Rows of a tile: with two vectors of columns, as many sums as the registers hold.
pub(super) const fn tile_rows(lanes: usize) -> usize {
    if lanes >= 16 { TILE_ROWS } else { TILE_ROWS / 2 }
}

/// Rows of each tile, at most `largest`, such that the last has nearly as many: a tile of few rows waits for its own sums.
pub(super) fn even_tile_rows(rows: usize, largest: usize) -> usize {
    rows.div_ceil(rows.div_ceil(largest).max(1)).max(1)
}

/// The first `len` values of memory that is used again, which may be old ones.
#[inline(always)]
pub(super) fn scratch<T: Copy>(memory: &mut Vec<T>, len: usize, zero: T) -> &mut [T] {
    if memory.len() < len {
        memory.resize(len, zero);
    }
    &mut memory[..len]
}

/// Copies rows into tiles, one after the other: for each inner index, the values of the tile's rows.
#[inline(always)]
pub(super) fn interleave(rows: &[f32], d_in: usize, tile_rows: usize, out: &mut [f32]) {
    for (tile, out) in rows.chunks(tile_rows * d_in).zip(out.chunks_mut(tile_rows * d_in)) {
        by_height!(tile.len() / d_in, M => interleave_tile::<M>(tile, d_in, out))
    }
}

#[inline(always)]
fn interleave_tile<const M: usize>(tile: &[f32], d_in: usize, out: &mut [f32]) {
    /// Values of each row that are moved at a time: a cache line.
    const RUN: usize = 16;
    let rows: [&[f32]; M] = std::array::from_fn(|row| &tile[row * d_in..(row + 1) * d_in]);
    let (blocks, rest) = out.as_chunks_mut::<M>().0.as_chunks_mut::<RUN>();
    for (block, out) in blocks.iter_mut().enumerate() {
        for (place, row) in rows.iter().enumerate() {
            let row: &[f32; RUN] = row[block * RUN..].first_chunk().expect("a block is inside of its row");
            for (out, value) in out.iter_mut().zip(row) {
                out[place] = *value;
            }
        }
    }
    let first = d_in - rest.len();
    for (index, out) in rest.iter_mut().enumerate() {
        for (out, row) in out.iter_mut().zip(rows) {
            *out = row[first + index];
        }
    }
}

/// `out += tile · panel`: a tile of `height` rows, as [`interleave`] makes them. What is `ahead` is asked for, a step for each inner index.
#[inline(always)]
pub(super) fn multiply<S: Simd>(simd: S, tile: &[f32], height: usize, panel: &[Line<f32>], ahead: Ahead, out: &mut [[f32; PANEL]]) {
    by_height!(height, M => columns::<M, S>(simd, tile, panel, ahead, out))
}

/// Two vectors of the panel's columns at a time.
#[inline(always)]
fn columns<const M: usize, S: Simd>(simd: S, tile: &[f32], panel: &[Line<f32>], ahead: Ahead, out: &mut [[f32; PANEL]]) {
    let pairs = PANEL / S::F32_LANES / 2;
    for pair in 0..pairs {
        let (mut sums, mut ahead) = ([[simd.splat_f32s(0.0); 2]; M], ahead);
        for (line, values) in panel.iter().zip(tile.as_chunks::<M>().0) {
            ahead.step();
            let line = S::as_simd_f32s(&line.0).0;
            let (left, right) = (line[2 * pair], line[2 * pair + 1]);
            for (sums, value) in sums.iter_mut().zip(values) {
                let value = simd.splat_f32s(*value);
                sums[0] = simd.mul_add_e_f32s(value, left, sums[0]);
                sums[1] = simd.mul_add_e_f32s(value, right, sums[1]);
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            let out = S::as_mut_simd_f32s(out).0;
            out[2 * pair] = simd.add_f32s(out[2 * pair], sums[0]);
            out[2 * pair + 1] = simd.add_f32s(out[2 * pair + 1], sums[1]);
        }
    }
}
