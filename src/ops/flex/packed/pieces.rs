//! Which thread computes what: pieces of some rows of one expert and some of its panels.

use std::ops::Range;

use crate::ops::flex::tiles::{PANEL, TILE_ROWS};

/// Pieces of each thread, so that threads end together where experts have different loads.
const PIECES_PER_THREAD: usize = 4;
/// The same of a single map.
const PIECES_OF_SINGLE_MAP: usize = 2;
/// Panels below which no piece is cut: it would copy its rows for too few columns.
const MIN_PANELS: usize = 4;
/// Rows below which no piece is cut where there are no more columns to cut.
const MIN_ROWS: usize = 24;
/// Rows of a piece down to which rows are cut and not columns: reading weights again costs less than copying rows again.
const MANY_ROWS: usize = 36;

/// Some rows of one expert, and some of its panels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub expert: usize,
    pub rows: Range<usize>,
    pub panels: Range<usize>,
}

impl Piece {
    pub(super) fn work(&self) -> usize {
        self.rows.len() * self.panels.len()
    }
}

/// All of the work: by rows while pieces have many; by columns, where each piece copies the same rows, for what is wanted beyond that.
pub(super) fn pieces(offsets: &[usize], panels: usize, threads: usize) -> Vec<Piece> {
    let num_rows = offsets[offsets.len() - 1];
    let share = (num_rows * panels).div_ceil(threads * PIECES_PER_THREAD).max(1);
    let mut pieces = Vec::new();
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let rows = bounds[0]..bounds[1];
        if rows.is_empty() {
            continue;
        }
        // One thread gains nothing by pieces. Those of a single map take equally long, but threads do not have equal speed.
        let wanted = match threads {
            1 => 1,
            _ if rows.len() == num_rows => threads * PIECES_OF_SINGLE_MAP,
            _ => (rows.len() * panels).div_ceil(share),
        };
        let by_rows = wanted.min(rows.len() / MANY_ROWS).max(1);
        let by_columns = wanted.div_ceil(by_rows).min(panels.div_ceil(MIN_PANELS)).max(1);
        let by_rows = wanted.div_ceil(by_columns).min(rows.len().div_ceil(MIN_ROWS)).max(1);
        for rows in parts(&rows, by_rows, TILE_ROWS) {
            for panels in parts(&(0..panels), by_columns, 1) {
                pieces.push(Piece { expert, rows: rows.clone(), panels });
            }
        }
    }
    pieces
}

/// A range in at most `count` parts of nearly the same length, a multiple of `unit` in all but the last.
fn parts(range: &Range<usize>, count: usize, unit: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *range;
    let units = (end - start).div_ceil(unit);
    let at = move |part: usize| (start + units * part / count * unit).min(end);
    (0..count).map(move |part| at(part)..at(part + 1)).filter(|part| !part.is_empty())
}

/// The rows that each piece writes, of its columns alone; `out` has `d_out` values in each row.
pub(super) fn outputs<'a>(pieces: &[Piece], out: &'a mut [f32], d_out: usize) -> Vec<Vec<&'a mut [f32]>> {
    let mut outputs: Vec<Vec<&mut [f32]>> = pieces.iter().map(|piece| Vec::with_capacity(piece.rows.len())).collect();
    // Pieces of the same rows stand together, in the order of their columns, and cover all of them.
    let mut rest = out;
    let mut first = 0;
    while first < pieces.len() {
        let rows = &pieces[first].rows;
        let together =
            pieces[first..].iter().take_while(|piece| piece.rows == *rows && piece.expert == pieces[first].expert).count();
        let (own, others) = rest.split_at_mut(rows.len() * d_out);
        for row in own.chunks_exact_mut(d_out) {
            let mut row = row;
            for (piece, output) in pieces[first..first + together].iter().zip(&mut outputs[first..]) {
                let columns = (piece.panels.len() * PANEL).min(row.len());
                let (own, others) = row.split_at_mut(columns);
                output.push(own);
                row = others;
            }
        }
        rest = others;
        first += together;
    }
    debug_assert!(rest.is_empty(), "pieces cover the output");
    outputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_value_once_whatever_the_loads() {
        for threads in [1, 2, 3, 16] {
            for offsets in [vec![0, 7], vec![0, 400], vec![0, 0, 3, 3, 900, 901], vec![0, 64, 128, 192, 256]] {
                for d_out in [1, 32, 33, 200, 3072] {
                    let pieces = pieces(&offsets, usize::div_ceil(d_out, PANEL), threads);
                    let mut out = vec![0.0; offsets.last().unwrap() * d_out];
                    for (piece, rows) in pieces.iter().zip(outputs(&pieces, &mut out, d_out)) {
                        assert_eq!(rows.len(), piece.rows.len());
                        assert!(offsets[piece.expert] <= piece.rows.start && piece.rows.end <= offsets[piece.expert + 1]);
                        for (row, values) in piece.rows.clone().zip(rows) {
                            for (column, value) in values.iter_mut().enumerate() {
                                *value += (row * d_out + piece.panels.start * PANEL + column) as f32 + 1.0;
                            }
                        }
                    }
                    assert!(out.iter().enumerate().all(|(at, value)| *value == at as f32 + 1.0));
                    if threads == 1 {
                        assert!(pieces.len() < offsets.len());
                    }
                }
            }
        }
    }

    #[test]
    fn threads_have_equal_shares() {
        for (offsets, panels) in [(vec![0, 197], 96), (vec![0, 197], 24), (vec![0, 50, 90, 197, 300, 394], 96), (vec![0, 1], 96)] {
            let pieces = pieces(&offsets, panels, 2);
            let mut work: Vec<usize> = pieces.iter().map(Piece::work).collect();
            work.sort_unstable();
            let mut ends = [0, 0];
            while let Some(next) = work.pop() {
                *ends.iter_mut().min().unwrap() += next;
            }
            assert!(ends[0].abs_diff(ends[1]) * 8 <= ends[0] + ends[1], "{offsets:?}: {ends:?}");
        }
    }
}
