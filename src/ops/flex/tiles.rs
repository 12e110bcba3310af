//! The inner product of what is packed: a tile of rows times a panel of columns, with all sums in registers.
//!
//! Each sum is over the inner indices in their order, so a row's result does not depend on the other rows of its tile.

use pulp::Simd;

/// Columns of a panel.
pub(super) const PANEL: usize = 32;
/// The most rows of a tile.
pub(super) const TILE_ROWS: usize = 12;

/// One inner index, or one group of them, of a panel; at the start of a cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line<T>(pub [T; PANEL]);

/// Rows of a tile: with two vectors of columns, as many sums as the registers hold.
pub(super) const fn tile_rows(lanes: usize) -> usize {
    if lanes >= 16 { TILE_ROWS } else { TILE_ROWS / 2 }
}

/// Copies rows into tiles: for each inner index, the values of the tile's rows one after the other.
#[inline(always)]
pub(super) fn interleave(rows: &[f32], d_in: usize, tile_rows: usize, out: &mut Vec<f32>) {
    out.clear();
    out.resize(rows.len(), 0.0);
    for (tile, out) in rows.chunks(tile_rows * d_in).zip(out.chunks_mut(tile_rows * d_in)) {
        let height = tile.len() / d_in;
        for (place, row) in tile.chunks_exact(d_in).enumerate() {
            for (value, out) in row.iter().zip(out[place..].iter_mut().step_by(height)) {
                *out = *value;
            }
        }
    }
}

/// `out += tile · panel`: a tile of `height` rows, as [`interleave`] makes them.
#[inline(always)]
pub(super) fn multiply<S: Simd>(simd: S, tile: &[f32], height: usize, panel: &[Line<f32>], out: &mut [[f32; PANEL]]) {
    match height {
        1 => columns::<S, 1>(simd, tile, panel, out),
        2 => columns::<S, 2>(simd, tile, panel, out),
        3 => columns::<S, 3>(simd, tile, panel, out),
        4 => columns::<S, 4>(simd, tile, panel, out),
        5 => columns::<S, 5>(simd, tile, panel, out),
        6 => columns::<S, 6>(simd, tile, panel, out),
        7 => columns::<S, 7>(simd, tile, panel, out),
        8 => columns::<S, 8>(simd, tile, panel, out),
        9 => columns::<S, 9>(simd, tile, panel, out),
        10 => columns::<S, 10>(simd, tile, panel, out),
        11 => columns::<S, 11>(simd, tile, panel, out),
        12 => columns::<S, 12>(simd, tile, panel, out),
        _ => unreachable!("a tile of {height} rows"),
    }
}

/// Two vectors of the panel's columns at a time.
#[inline(always)]
fn columns<S: Simd, const M: usize>(simd: S, tile: &[f32], panel: &[Line<f32>], out: &mut [[f32; PANEL]]) {
    let pairs = PANEL / S::F32_LANES / 2;
    for pair in 0..pairs {
        let mut sums = [[simd.splat_f32s(0.0); 2]; M];
        for (line, values) in panel.iter().zip(tile.as_chunks::<M>().0) {
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
