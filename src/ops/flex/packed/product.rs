//! `act(x · weight + bias)` with packed weights.

use std::{cell::RefCell, ops::RangeInclusive};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    PackedMaps, Panels,
    dot::{Dot, GROUP},
    of_panel,
    pieces::{Piece, outputs, pieces},
    quantized::{Quantize, QuantizedRows, RowScale, dequantize},
    sixteen,
};
use crate::ops::{
    Activation,
    flex::{
        buffer::Buffer,
        pointwise,
        prefetch::Ahead,
        tiles::{self, Line, PANEL, TILE_ROWS},
    },
};

/// The most rows that are multiplied by one panel before the next: few enough to stay in a cache beside it.
const BLOCK_ROWS: usize = 216;
/// Tiles of a block for which the next panel is asked for: with fewer, memory is the limit in any case and the processor itself asks for what follows;
/// with more, arithmetic is.
const ASKED_FOR: RangeInclusive<usize> = 3..=16;
/// Inner indices that are added up in one go: a panel of so many stays in the second-level cache.
const BLOCK_INNER: usize = 4096;

/// `out[r] = act(x[r] · weight[e(r)] + bias[e(r)])`: `[R, D] -> [R, F]`.
pub(in crate::ops::flex) fn linear(
    x: &[f32],
    maps: &PackedMaps,
    bias: Option<&[f32]>,
    offsets: &[usize],
    activation: Option<Activation>,
) -> Buffer {
    let mut out = Buffer::new(offsets[offsets.len() - 1] * maps.d_out);
    let epilogue = Epilogue { bias, activation };
    let pieces = pieces(offsets, maps.panels_of_one(), rayon::current_num_threads());
    let mut queue: Vec<_> = pieces.iter().zip(outputs(&pieces, &mut out, maps.d_out)).collect();
    let run = |(piece, out): (&Piece, Vec<&mut [f32]>)| compute(x, maps, &epilogue, piece, out);
    if queue.len() < 2 {
        queue.into_iter().for_each(run);
    } else {
        // Threads take the pieces one by one, small ones last, so that they end together.
        queue.sort_by_key(|(piece, _)| std::cmp::Reverse(piece.work()));
        queue.into_iter().par_bridge().for_each(run);
    }
    out
}

/// What follows the product.
struct Epilogue<'a> {
    /// `[E, F]`
    bias: Option<&'a [f32]>,
    activation: Option<Activation>,
}

/// Memory of a thread that is used again.
#[derive(Default)]
struct Scratch {
    rows: Vec<f32>,
    lines: Vec<Line<f32>>,
    bytes: QuantizedRows,
}

fn compute(x: &[f32], maps: &PackedMaps, epilogue: &Epilogue, piece: &Piece, out: Vec<&mut [f32]>) {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::default();
    }
    SCRATCH.with_borrow_mut(|scratch| {
        let x = &x[piece.rows.start * maps.d_in..piece.rows.end * maps.d_in];
        let part = Part { x, maps, epilogue, piece, out, scratch };
        match &maps.panels {
            Panels::Int8 { .. } => part.in_bytes(Dot::fastest()),
            _ => Arch::new().dispatch(part),
        }
    });
}

/// Rows of each block, in whole tiles but for the last block, which has nearly as many: it reads as many weights as the others.
fn block_rows(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(BLOCK_ROWS).max(1)).next_multiple_of(TILE_ROWS).max(TILE_ROWS)
}

/// One piece of the work.
struct Part<'a> {
    x: &'a [f32],
    maps: &'a PackedMaps,
    epilogue: &'a Epilogue<'a>,
    piece: &'a Piece,
    out: Vec<&'a mut [f32]>,
    scratch: &'a mut Scratch,
}

impl WithSimd for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, maps, epilogue, piece, mut out, scratch } = self;
        let (d_in, block) = (maps.d_in, block_rows(out.len()));
        for (x, out) in x.chunks(block * d_in).zip(out.chunks_mut(block)) {
            let height = tiles::even_tile_rows(out.len(), tiles::tile_rows(S::F32_LANES));
            let rows = tiles::scratch(&mut scratch.rows, x.len(), 0.0);
            tiles::interleave(x, d_in, height, rows);
            for (place, panel) in piece.panels.clone().enumerate() {
                let at = piece.expert * maps.panels_of_one() + panel;
                let ahead = maps.ahead(panel, piece, out.len().div_ceil(height));
                let lines = match &maps.panels {
                    Panels::F32(lines) => of_panel(lines, at, d_in),
                    Panels::F16(lines) => sixteen::unpacked(of_panel(lines, at, d_in), sixteen::of_f16, &mut scratch.lines),
                    Panels::BF16(lines) => sixteen::unpacked(of_panel(lines, at, d_in), sixteen::of_bf16, &mut scratch.lines),
                    Panels::Int8 { .. } => unreachable!("bytes have a product of their own"),
                };
                for (place_of_tile, (tile, out)) in rows.chunks(height * d_in).zip(out.chunks_mut(height)).enumerate() {
                    let height = out.len();
                    let mut sums = [[0.0; PANEL]; TILE_ROWS];
                    let blocks = tile.chunks(BLOCK_INNER * height).zip(lines.chunks(BLOCK_INNER));
                    for (block, (tile, lines)) in blocks.enumerate() {
                        let ahead = ahead.after(place_of_tile * d_in + block * BLOCK_INNER);
                        tiles::multiply(simd, tile, height, lines, ahead, &mut sums[..height]);
                    }
                    epilogue.apply(simd, &mut sums, maps, piece.expert, panel);
                    write(&sums, out, place);
                }
            }
        }
    }
}

impl Part<'_> {
    fn in_bytes(self, dot: Dot) {
        let Self { x, maps, epilogue, piece, mut out, scratch } = self;
        let Panels::Int8 { lines, scales, sums: byte_sums } = &maps.panels else { unreachable!("weights are bytes") };
        let (d_in, len) = (maps.d_in, maps.d_in.div_ceil(GROUP));
        let (mut sums, mut values) = ([[0; PANEL]; TILE_ROWS], [[0.0; PANEL]; TILE_ROWS]);
        let block = block_rows(out.len());
        for (x, out) in x.chunks(block * d_in).zip(out.chunks_mut(block)) {
            let (bytes, tile_rows) = (&mut scratch.bytes, tiles::even_tile_rows(out.len(), TILE_ROWS));
            Arch::new().dispatch(Quantize { rows: x, d_in, tile_rows, largest: dot.largest(), out: bytes });
            for (place, panel) in piece.panels.clone().enumerate() {
                let at = piece.expert * maps.panels_of_one() + panel;
                let ahead = maps.ahead(panel, piece, out.len().div_ceil(tile_rows));
                let lines = of_panel(lines, at, len);
                let columns = maps.columns(piece.expert, panel);
                let of_columns = (&scales[columns.clone()], &byte_sums[columns]);
                let tiles = bytes.tiles.chunks(tile_rows * len).zip(bytes.scales.chunks(tile_rows));
                for (place_of_tile, ((tile, rows), out)) in tiles.zip(out.chunks_mut(tile_rows)).enumerate() {
                    let height = out.len();
                    dot.multiply(&tile[..height * len], height, lines, ahead.after(place_of_tile * len), &mut sums[..height]);
                    let (sums, values) = (&sums[..height], &mut values);
                    Arch::new().dispatch(Finish { sums, rows, of_columns, values, epilogue, maps, expert: piece.expert, panel });
                    write(values, out, place);
                }
            }
        }
    }
}

impl PackedMaps {
    /// What to ask for while `tiles` tiles are multiplied by a panel: the panel behind it, if the piece has one.
    fn ahead(&self, panel: usize, piece: &Piece, tiles: usize) -> Ahead {
        if panel + 1 == piece.panels.end || !ASKED_FOR.contains(&tiles) {
            return Ahead::NONE;
        }
        let next = piece.expert * self.panels_of_one() + panel + 1;
        let (d_in, groups) = (self.d_in, self.d_in.div_ceil(GROUP));
        match &self.panels {
            Panels::F32(lines) => Ahead::new(of_panel(lines, next, d_in), tiles, d_in),
            Panels::F16(lines) | Panels::BF16(lines) => Ahead::new(of_panel(lines, next, d_in), tiles, d_in),
            Panels::Int8 { lines, .. } => Ahead::new(of_panel(lines, next, groups), tiles, groups),
        }
    }

    /// The columns of a panel among those of all experts.
    fn columns(&self, expert: usize, panel: usize) -> std::ops::Range<usize> {
        let (start, end) = (panel * PANEL, ((panel + 1) * PANEL).min(self.d_out));
        expert * self.d_out + start..expert * self.d_out + end
    }
}

/// From products of bytes to results.
struct Finish<'a> {
    sums: &'a [[i32; PANEL]],
    rows: &'a [RowScale],
    of_columns: (&'a [f32], &'a [i32]),
    values: &'a mut [[f32; PANEL]; TILE_ROWS],
    epilogue: &'a Epilogue<'a>,
    maps: &'a PackedMaps,
    expert: usize,
    panel: usize,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        dequantize(self.sums, self.rows, self.of_columns, self.values);
        self.epilogue.apply(simd, self.values, self.maps, self.expert, self.panel);
    }
}

impl Epilogue<'_> {
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, values: &mut [[f32; PANEL]; TILE_ROWS], maps: &PackedMaps, expert: usize, panel: usize) {
        if let Some(bias) = self.bias {
            let bias = &bias[maps.columns(expert, panel)];
            for values in values.iter_mut() {
                for (value, bias) in values.iter_mut().zip(bias) {
                    *value += bias;
                }
            }
        }
        if let Some(activation) = self.activation {
            let before = *values;
            pointwise::Values { out: values.as_flattened_mut(), x: before.as_flattened(), activation }.with_simd(simd);
        }
    }
}

/// Writes a tile to the columns of a piece's panel, all but the last of which are whole.
#[inline(always)]
fn write(values: &[[f32; PANEL]], out: &mut [&mut [f32]], panel: usize) {
    for (values, out) in values.iter().zip(out) {
        let out = &mut out[panel * PANEL..];
        match out.first_chunk_mut::<PANEL>() {
            Some(out) => *out = *values,
            None => out.copy_from_slice(&values[..out.len()]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::precision::Precision;

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_any_number_of_rows() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        // More inner indices than are added up in one go, once; rows that fill tiles and blocks, and rows that do not.
        for (d_in, d_out, counts) in [(37, 200, &[2, 13, 50, 77, 216, 217, 400][..]), (BLOCK_INNER + 5, 33, &[26, 50])] {
            let weights: Vec<f32> = (0..d_in * d_out).map(|i| ((i * 37) % 101) as f32 * 0.01 - 0.5).collect();
            for precision in [Precision::F32, Precision::BF16, Precision::Int8] {
                let maps = PackedMaps::new(&weights, [1, d_in, d_out], precision);
                for count in counts {
                    let x: Vec<f32> = (0..count * d_in).map(|i| ((i * 7919) % 1013) as f32 * 0.002 - 1.0).collect();
                    let of = |x: &[f32]| linear(x, &maps, None, &[0, x.len() / d_in], Some(Activation::Gelu));
                    let all = pool.install(|| of(&x));
                    for row in [0, 1, 11, 12, count / 2, count - 1] {
                        let row = row.min(count - 1);
                        let alone = of(&x[row * d_in..(row + 1) * d_in]);
                        assert!(alone[..] == all[row * d_out..(row + 1) * d_out], "{precision:?}, row {row} of {count}");
                        assert!(alone.iter().all(|value| value.is_finite()));
                    }
                }
            }
        }
    }
}
