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

/// The work is cut where this many equal shares per thread meet: often enough that threads end together, and no more often, as
/// each piece packs its weights again.
const SHARES_PER_THREAD: usize = 2;
/// Rows or columns below which no piece is cut off: the product would spend its time on packing.
const MIN_LEN: usize = 64;

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
    /// How long it takes, in units of no meaning.
    work: usize,
}

/// Rows of all experts.
fn row_pieces(offsets: &[usize]) -> Vec<Piece> {
    cut(offsets.windows(2).map(|bounds| (bounds[0]..bounds[1], 1)))
}

/// Input columns of every expert's weights; a column costs as much as its expert has rows.
fn column_pieces(offsets: &[usize], d_in: usize) -> Vec<Piece> {
    cut(offsets.windows(2).map(|bounds| (0..d_in, bounds[1] - bounds[0])))
}

/// Cuts each expert's range where equal shares of all the work meet; `experts` are their ranges with the work of one element.
fn cut(experts: impl Iterator<Item = (Range<usize>, usize)> + Clone) -> Vec<Piece> {
    let total: usize = experts.clone().map(|(range, work)| range.len() * work).sum();
    let share = total.div_ceil(SHARES_PER_THREAD * rayon::current_num_threads()).max(1);
    let mut before = 0;
    let mut pieces = Vec::new();
    for (expert, (range, work)) in experts.enumerate() {
        let mut start = range.start;
        while start < range.end {
            let end = if work == 0 {
                range.end
            } else {
                let at = before + (start - range.start) * work;
                let to_next = (share - at % share).div_ceil(work);
                // A cut too near to the start or to the end is left out.
                let len = if to_next < MIN_LEN { to_next + share.div_ceil(work) } else { to_next };
                if start + len + MIN_LEN > range.end { range.end } else { start + len }
            };
            pieces.push(Piece { expert, range: start..end, work: (end - start) * work });
            start = end;
        }
        before += range.len() * work;
    }
    pieces
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

/// Calls `body` with each piece and the part of the output that belongs to it.
fn for_each_piece(pieces: &[Piece], out: &mut [f32], width: usize, body: impl Fn(&Piece, &mut [f32]) + Sync) {
    largest_first(pieces, parts(pieces, out, width), body);
}

/// Lets threads take the pieces one by one, small ones last, so that they end together.
fn largest_first<T: Send>(pieces: &[Piece], parts: Vec<T>, body: impl Fn(&Piece, T) + Sync) {
    let mut queue: Vec<(&Piece, T)> = pieces.iter().zip(parts).collect();
    queue.sort_by_key(|(piece, _)| std::cmp::Reverse(piece.work));
    queue.into_iter().par_bridge().for_each(|(piece, part)| body(piece, part));
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
            let both = parts(&pieces, &mut pre, width).into_iter().zip(parts(&pieces, &mut out, width)).collect();
            largest_first(&pieces, both, |piece, (pre, out)| {
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

    #[test]
    fn threads_that_take_the_largest_piece_left_end_together() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for loads in [vec![788; 8], vec![1576, 675, 675, 675, 676, 676, 676, 675], vec![6000, 0, 50, 254], vec![6304]] {
            let offsets: Vec<usize> = std::iter::once(0)
                .chain(loads.iter().scan(0, |sum, load| {
                    *sum += load;
                    Some(*sum)
                }))
                .collect();
            let mut work: Vec<usize> = pool.install(|| row_pieces(&offsets)).iter().map(|piece| piece.work).collect();
            assert!(work.len() <= loads.len() + 2 * SHARES_PER_THREAD, "{loads:?} in {} pieces", work.len());
            work.sort_unstable();
            let mut ends = [0, 0];
            while let Some(next) = work.pop() {
                *ends.iter_mut().min().unwrap() += next;
            }
            assert!(ends[0].abs_diff(ends[1]) <= 2 * MIN_LEN, "{loads:?}: {ends:?}");
        }
    }
}
