//! Rows in bytes: each with a scale and a zero point of its own, so that no row depends on another.

use pulp::{Simd, WithSimd};

use super::dot::GROUP;
use crate::ops::flex::tiles::{self, PANEL};

/// `x ≈ scale · (byte − zero)`.
#[derive(Clone, Copy, Default)]
pub(super) struct RowScale {
    /// NaN for a row that is not finite, whose results are NaN.
    pub scale: f32,
    pub zero: i32,
}

/// Rows in tiles of bytes: for each group of inner indices, those of the tile's rows one after the other.
#[derive(Default)]
pub(super) struct QuantizedRows {
    /// With old values behind them.
    pub tiles: Vec<[u8; GROUP]>,
    pub scales: Vec<RowScale>,
}

/// Turns rows into bytes from 0 to `largest`.
pub(super) struct Quantize<'a> {
    pub rows: &'a [f32],
    pub d_in: usize,
    /// Rows of each tile but the last.
    pub tile_rows: usize,
    pub largest: u8,
    pub out: &'a mut QuantizedRows,
}

impl WithSimd for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rows, d_in, tile_rows, largest, out } = self;
        let len = d_in.div_ceil(GROUP);
        let QuantizedRows { tiles, scales } = out;
        let tiles = tiles::scratch(tiles, rows.len() / d_in * len, [0; GROUP]);
        scales.clear();
        let mut bytes = vec![[0; GROUP]; len];
        for (tile, tile_out) in rows.chunks(tile_rows * d_in).zip(tiles.chunks_mut(tile_rows * len)) {
            let height = tile.len() / d_in;
            for (place, row) in tile.chunks_exact(d_in).enumerate() {
                let scale = scale_of(row, largest);
                to_bytes(row, scale, largest, &mut bytes.as_flattened_mut()[..d_in]);
                scales.push(scale);
                for (out, bytes) in tile_out[place..].iter_mut().step_by(height).zip(&bytes) {
                    *out = *bytes;
                }
            }
        }
    }
}

/// The scale that takes the range of a row, and zero, to bytes.
#[inline(always)]
fn scale_of(row: &[f32], largest: u8) -> RowScale {
    const LANES: usize = 16;
    let (mut low, mut high, mut finite) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let (chunks, rest) = row.as_chunks::<LANES>();
    let mut add = |place: usize, value: f32| {
        low[place] = if value < low[place] { value } else { low[place] };
        high[place] = if value > high[place] { value } else { high[place] };
        // Zero, or NaN.
        finite[place] += value * 0.0;
    };
    for chunk in chunks {
        for (place, value) in chunk.iter().enumerate() {
            add(place, *value);
        }
    }
    for (place, value) in rest.iter().enumerate() {
        add(place, *value);
    }
    let low = low.into_iter().fold(0.0, f32::min);
    let high = high.into_iter().fold(0.0, f32::max);
    // In parts, as the range of finite values may not be finite.
    let scale = high / f32::from(largest) - low / f32::from(largest);
    // Values of no normal size are zeros.
    let scale = if scale < f32::MIN_POSITIVE { 0.0 } else { scale };
    let zero = if scale > 0.0 { (-low / scale).round().clamp(0.0, f32::from(largest)) as i32 } else { 0 };
    RowScale { scale: scale + finite.into_iter().sum::<f32>(), zero }
}

#[inline(always)]
fn to_bytes(row: &[f32], RowScale { scale, zero }: RowScale, largest: u8, out: &mut [u8]) {
    // Adding 1.5 · 2²³ leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let (inverse, zero, largest) = (if scale > 0.0 { 1.0 / scale } else { 0.0 }, zero as f32, f32::from(largest));
    for (out, value) in out.iter_mut().zip(row) {
        let value = value * inverse + zero;
        let value = if value < largest { value } else { largest };
        let value = if value > 0.0 { value } else { 0.0 };
        *out = (value + ROUND).to_bits() as u8;
    }
}

/// The products of floats that `sums`, products of bytes, stand for; written to `out`.
#[inline(always)]
pub(super) fn dequantize(
    sums: &[[i32; PANEL]],
    rows: &[RowScale],
    (scales, byte_sums): (&[f32], &[i32]),
    out: &mut [[f32; PANEL]],
) {
    for ((out, sums), row) in out.iter_mut().zip(sums).zip(rows) {
        for (((out, sum), scale), byte_sum) in out.iter_mut().zip(sums).zip(scales).zip(byte_sums) {
            *out = (sum - row.zero * byte_sum) as f32 * (row.scale * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::flex::tiles::TILE_ROWS;
    use pulp::Arch;

    fn quantized(rows: &[f32], d_in: usize) -> QuantizedRows {
        let mut out = QuantizedRows::default();
        Arch::new().dispatch(Quantize { rows, d_in, tile_rows: TILE_ROWS, largest: 255, out: &mut out });
        out
    }

    #[test]
    fn bytes_stand_for_the_values_to_half_a_step() {
        let d_in = 21;
        let rows: Vec<f32> = (0..13 * d_in).map(|i| ((i * 7919) % 1013) as f32 * 0.01 - 3.0 + (i / d_in) as f32).collect();
        let out = quantized(&rows, d_in);
        let len = d_in.div_ceil(GROUP);
        for (row, values) in rows.chunks_exact(d_in).enumerate() {
            let RowScale { scale, zero } = out.scales[row];
            let (tile, place) = (row / TILE_ROWS, row % TILE_ROWS);
            let height = (13 - tile * TILE_ROWS).min(TILE_ROWS);
            for (column, value) in values.iter().enumerate() {
                let byte = out.tiles[tile * TILE_ROWS * len + column / GROUP * height + place][column % GROUP];
                let found = scale * (i32::from(byte) - zero) as f32;
                assert!((found - value).abs() <= 0.51 * scale, "row {row}, column {column}: {found}, not {value}");
            }
        }
    }

    #[test]
    fn rows_of_zeros_stay_and_rows_that_are_not_finite_are_marked() {
        let rows = [[0.0; 4], [f32::NAN, 1.0, 2.0, 3.0], [1.0, f32::INFINITY, 0.0, 0.0], [f32::MAX, f32::MIN, 0.0, 0.0], [2.0; 4]];
        let out = quantized(rows.as_flattened(), 4);
        assert!(out.scales[0].scale == 0.0 && out.scales[1].scale.is_nan() && out.scales[2].scale.is_nan());
        assert!(out.scales[3].scale.is_finite() && (out.scales[4].scale * 255.0 - 2.0).abs() < 1e-6);
    }
}
