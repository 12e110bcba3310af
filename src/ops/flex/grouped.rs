//! One linear map per expert over rows sorted by expert: no padding, and no work for an expert without rows.
//!
//! The work is cut into pieces of one expert and a range of rows (or, for weights, of input columns), each of which writes a part of the
//! output that no other piece touches; threads take pieces as they become free.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    buffer::Buffer,
    gemm::{Matrix, matmul},
    pointwise,
};
use crate::ops::Activation;

/// Pieces per thread: more even out the load, fewer spend less on packing weights.
const PIECES_PER_THREAD: usize = 4;
/// Rows below which a piece is not cut: the product would spend its time on packing weights.
const MIN_ROWS: usize = 64;
/// Input columns below which a weight gradient is not cut.
const MIN_COLUMNS: usize = 64;

/// The stacked weights `[E, D, F]`.
pub(super) struct Maps<'a> {
    pub weight: &'a [f32],
    pub d_in: usize,
    pub d_out: usize,
}

impl<'a> Maps<'a> {
    fn of(&self, expert: usize) -> Matrix<'a> {
        let size = self.d_in * self.d_out;
        Matrix::new(&self.weight[expert * size..(expert + 1) * size], self.d_in, self.d_out)
    }
}

/// A range of one expert's rows, or of the input columns of its weights.
struct Piece {
    expert: usize,
    range: Range<usize>,
}

/// Rows of all experts in pieces of nearly equal size.
fn row_pieces(offsets: &[usize]) -> Vec<Piece> {
    let num_rows = offsets[offsets.len() - 1];
    let most = num_rows.div_ceil(PIECES_PER_THREAD * rayon::current_num_threads()).max(MIN_ROWS);
    let mut pieces = Vec::new();
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let rows = bounds[0]..bounds[1];
        let parts = rows.len().div_ceil(most);
        pieces.extend(split(rows, parts).map(|range| Piece { expert, range }));
    }
    pieces
}

/// Input columns of every expert's weights, in more pieces the more rows the expert has.
fn column_pieces(offsets: &[usize], d_in: usize) -> Vec<Piece> {
    let num_rows = offsets[offsets.len() - 1];
    let rows_per_piece = num_rows.div_ceil(PIECES_PER_THREAD * rayon::current_num_threads()).max(1);
    let mut pieces = Vec::new();
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let parts = (bounds[1] - bounds[0]).div_ceil(rows_per_piece).clamp(1, d_in.div_ceil(MIN_COLUMNS).max(1));
        pieces.extend(split(0..d_in, parts).map(|range| Piece { expert, range }));
    }
    pieces
}

fn split(range: Range<usize>, parts: usize) -> impl Iterator<Item = Range<usize>> {
    let (start, len) = (range.start, range.len());
    (0..parts).map(move |part| start + len * part / parts..start + len * (part + 1) / parts)
}

/// The part of `out` that each piece writes, `width` values for each of its rows or columns.
fn parts<'a>(pieces: &[Piece], mut out: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
    let mut parts = Vec::with_capacity(pieces.len());
    for piece in pieces {
        let (own, rest) = out.split_at_mut(piece.range.len() * width);
        parts.push(own);
        out = rest;
    }
    debug_assert!(out.is_empty(), "pieces cover the output");
    parts
}

/// Lets threads take the pieces one by one.
fn for_each_piece(pieces: &[Piece], out: &mut [f32], width: usize, body: impl Fn(&Piece, &mut [f32]) + Sync) {
    let parts = parts(pieces, out, width);
    pieces.par_iter().zip(parts).with_max_len(1).for_each(|(piece, own)| body(piece, own));
}

fn rows_of<'a>(values: &'a [f32], width: usize, rows: &Range<usize>) -> Matrix<'a> {
    Matrix::new(&values[rows.start * width..rows.end * width], rows.len(), width)
}

/// `out = act(x · weight + bias)`, and what `act` was applied to if it is kept.
pub(super) fn linear(
    x: &[f32],
    maps: &Maps,
    bias: &[f32],
    offsets: &[usize],
    activation: Option<Activation>,
    keep_pre: bool,
) -> (Buffer, Option<Buffer>) {
    let width = maps.d_out;
    let affine = |piece: &Piece, out: &mut [f32]| matmul(out, rows_of(x, maps.d_in, &piece.range), maps.of(piece.expert));
    let bias_of = |piece: &Piece| &bias[piece.expert * width..(piece.expert + 1) * width];
    let pieces = row_pieces(offsets);
    let mut out = Buffer::new(offsets[offsets.len() - 1] * width);
    match activation {
        Some(activation) if keep_pre => {
            let mut pre = Buffer::new(out.len());
            let out_parts = parts(&pieces, &mut out, width);
            let pre_parts = parts(&pieces, &mut pre, width);
            pieces.par_iter().zip(pre_parts.into_par_iter().zip(out_parts)).with_max_len(1).for_each(|(piece, (pre, out))| {
                affine(piece, pre);
                pointwise::bias_and_activation(pre, out, bias_of(piece), activation);
            });
            (out, Some(pre))
        }
        _ => {
            for_each_piece(&pieces, &mut out, width, |piece, out| {
                affine(piece, out);
                pointwise::bias_and_activation_in_place(out, bias_of(piece), activation);
            });
            (out, None)
        }
    }
}

/// `out[r] = grad[r] · weight[e(r)]ᵀ`.
pub(super) fn backward_x(grad: &[f32], maps: &Maps, offsets: &[usize]) -> Buffer {
    let mut out = Buffer::new(offsets[offsets.len() - 1] * maps.d_in);
    for_each_piece(&row_pieces(offsets), &mut out, maps.d_in, |piece, out| {
        matmul(out, rows_of(grad, maps.d_out, &piece.range), maps.of(piece.expert).transposed());
    });
    out
}

/// `out[e] = Σ_{r of e} x[r]ᵀ · grad[r]`.
pub(super) fn backward_weight(x: &[f32], grad: &[f32], [d_in, d_out]: [usize; 2], offsets: &[usize]) -> Buffer {
    let num_experts = offsets.len() - 1;
    let mut out = Buffer::new(num_experts * d_in * d_out);
    for_each_piece(&column_pieces(offsets, d_in), &mut out, d_out, |piece, out| {
        let rows = offsets[piece.expert]..offsets[piece.expert + 1];
        if rows.is_empty() {
            return out.fill(0.0);
        }
        let x = rows_of(x, d_in, &rows).columns(piece.range.start, piece.range.end);
        matmul(out, x.transposed(), rows_of(grad, d_out, &rows));
    });
    out
}

/// `out[e] = Σ_{r of e} grad[r]`.
pub(super) fn backward_bias(grad: &[f32], d_out: usize, offsets: &[usize]) -> Buffer {
    let mut out = Buffer::new((offsets.len() - 1) * d_out);
    if d_out > 0 {
        out.par_chunks_mut(d_out).enumerate().for_each(|(expert, sum)| {
            sum.fill(0.0);
            pointwise::add_rows(sum, &grad[offsets[expert] * d_out..offsets[expert + 1] * d_out]);
        });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_row_once_whatever_the_loads() {
        for loads in [vec![0, 0, 0], vec![1], vec![1000, 0, 3, 64, 65, 5000], vec![200; 8]] {
            let mut offsets = vec![0];
            for load in &loads {
                offsets.push(offsets.last().unwrap() + load);
            }
            let mut next = 0;
            for piece in row_pieces(&offsets) {
                assert_eq!(piece.range.start, next);
                assert!(piece.range.start >= offsets[piece.expert] && piece.range.end <= offsets[piece.expert + 1]);
                next = piece.range.end;
            }
            assert_eq!(next, *offsets.last().unwrap());
            let columns: usize = column_pieces(&offsets, 130).iter().map(|piece| piece.range.len()).sum();
            assert_eq!(columns, loads.len() * 130);
        }
    }
}
