//! The forward pass of attention for heads that fill vectors: each head of a sample is two products of tiles, with a softmax between them in the
//! cache.

use std::{cell::RefCell, ops::Range};

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    buffer::Buffer,
    pointwise::exp,
    prefetch::Ahead,
    tiles::{self, Line, PANEL, TILE_ROWS},
};
use crate::ops::AttentionShape;

/// Heads of a sample are shared among threads only where there are fewer samples for each than this.
const SAMPLES_PER_THREAD: usize = 4;

/// Whether heads are wide enough.
pub(super) fn is_faster(shape: &AttentionShape) -> bool {
    shape.width / shape.heads >= PANEL
}

/// `[R, D]` three times, to `[R, D]`.
pub(super) fn forward(query: &[f32], key: &[f32], value: &[f32], shape: &AttentionShape) -> Buffer {
    let mut out = Buffer::new(query.len());
    let mut tasks = tasks(&mut out, shape, rayon::current_num_threads());
    let run = |task: &mut Task| {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        let rows = |values| rows_of(values, &task.rows, shape);
        let inputs = [rows(query), rows(key), rows(value)];
        SCRATCH.with_borrow_mut(|scratch| {
            let (heads, out) = (task.heads.clone(), &mut task.out);
            Arch::new().dispatch(Forward { inputs, heads, out, shape, scratch });
        });
    };
    if tasks.len() < 2 {
        tasks.iter_mut().for_each(run)
    } else {
        tasks.par_iter_mut().for_each(run)
    }
    out
}

/// Some heads of one sample.
struct Task<'a> {
    rows: Range<usize>,
    heads: Range<usize>,
    /// Of each row, the columns of these heads.
    out: Vec<&'a mut [f32]>,
}

fn rows_of<'a>(values: &'a [f32], rows: &Range<usize>, shape: &AttentionShape) -> &'a [f32] {
    &values[rows.start * shape.width..rows.end * shape.width]
}

fn tasks<'a>(out: &'a mut [f32], shape: &AttentionShape, threads: usize) -> Vec<Task<'a>> {
    let samples = shape.samples.len() - 1;
    let parts = match threads {
        1 => 1,
        _ => (SAMPLES_PER_THREAD * threads).div_ceil(samples.max(1)).min(shape.heads),
    };
    let mut rest = out;
    let mut tasks = Vec::with_capacity(samples * parts);
    for bounds in shape.samples.windows(2) {
        let rows = bounds[0]..bounds[1];
        let first = tasks.len();
        for part in 0..parts {
            let heads = shape.heads * part / parts..shape.heads * (part + 1) / parts;
            tasks.push(Task { rows: rows.clone(), heads, out: Vec::with_capacity(rows.len()) });
        }
        let (own, others) = rest.split_at_mut(rows.len() * shape.width);
        rest = others;
        for row in own.chunks_exact_mut(shape.width) {
            let mut row = row;
            for task in &mut tasks[first..] {
                let (own, others) = row.split_at_mut(task.heads.len() * (shape.width / shape.heads));
                task.out.push(own);
                row = others;
            }
        }
    }
    tasks
}

/// Memory of a thread that is used again.
#[derive(Default)]
struct Scratch {
    keys: Vec<Line<f32>>,
    values: Vec<Line<f32>>,
    tile: Vec<f32>,
    /// Rows of weights, in whole panels.
    weights: Vec<f32>,
}

/// Some heads of one sample; a type of its own, as the compiler may leave a closure of this size out of the code for wider instructions.
struct Forward<'a, 'b, 'c> {
    inputs: [&'a [f32]; 3],
    heads: Range<usize>,
    out: &'b mut [&'c mut [f32]],
    shape: &'a AttentionShape,
    scratch: &'b mut Scratch,
}

impl WithSimd for Forward<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { inputs: [query, key, value], heads, out, shape, scratch } = self;
        let (width, head_width, len) = (shape.width, shape.width / shape.heads, out.len());
        let height = tiles::even_tile_rows(len, tiles::tile_rows(S::F32_LANES));
        let scale = 1.0 / (head_width as f32).sqrt();
        for (place, head) in heads.enumerate() {
            let start = head * head_width;
            let of_head = |values: &'_ [f32], row: usize| -> Range<usize> {
                debug_assert!(row * width + start + head_width <= values.len());
                row * width + start..row * width + start + head_width
            };
            transposed_panels(key, width, start..start + head_width, &mut scratch.keys);
            row_panels(value, width, start..start + head_width, &mut scratch.values);
            for first in (0..len).step_by(height) {
                let height = height.min(len - first);
                // How many rows the last of the tile looks at.
                let looks_at = if shape.causal { first + height } else { len };
                let (panels, padded) = (looks_at.div_ceil(PANEL), looks_at.div_ceil(PANEL) * PANEL);
                let tile = tiles::scratch(&mut scratch.tile, head_width.max(padded) * height, 0.0);
                for row in 0..height {
                    let values = &query[of_head(query, first + row)];
                    for (value, out) in values.iter().zip(tile[row..].iter_mut().step_by(height)) {
                        *out = value * scale;
                    }
                }
                let weights = tiles::scratch(&mut scratch.weights, height * padded, 0.0);
                for panel in 0..panels {
                    let lines = &scratch.keys[panel * head_width..(panel + 1) * head_width];
                    let mut sums = [[0.0; PANEL]; TILE_ROWS];
                    tiles::multiply(simd, &tile[..head_width * height], height, lines, Ahead::NONE, &mut sums[..height]);
                    for (sums, row) in sums[..height].iter().zip(weights.chunks_exact_mut(padded)) {
                        row[panel * PANEL..][..PANEL].copy_from_slice(sums);
                    }
                }
                let mut parts = [0.0; TILE_ROWS];
                for (row, weights) in weights.chunks_exact_mut(padded).enumerate() {
                    let count = if shape.causal { first + row + 1 } else { len };
                    parts[row] = softmax(weights, count);
                    for (weight, out) in weights[..looks_at].iter().zip(tile[row..].iter_mut().step_by(height)) {
                        *out = *weight;
                    }
                }
                for panel in 0..head_width.div_ceil(PANEL) {
                    let lines = &scratch.values[panel * len..panel * len + looks_at];
                    let mut sums = [[0.0; PANEL]; TILE_ROWS];
                    tiles::multiply(simd, &tile[..looks_at * height], height, lines, Ahead::NONE, &mut sums[..height]);
                    let columns = PANEL.min(head_width - panel * PANEL);
                    for ((sums, part), out) in sums[..height].iter().zip(parts).zip(&mut out[first..]) {
                        let out = &mut out[place * head_width + panel * PANEL..][..columns];
                        for (out, sum) in out.iter_mut().zip(sums) {
                            *out = sum * part;
                        }
                    }
                }
            }
        }
    }
}

/// Panels whose columns are the rows of `values`, of some of its columns: a line for each of these.
#[inline(always)]
fn transposed_panels(values: &[f32], width: usize, columns: Range<usize>, out: &mut Vec<Line<f32>>) {
    let head_width = columns.len();
    let rows = values.len() / width;
    let out = tiles::scratch(out, rows.div_ceil(PANEL) * head_width, Line([0.0; PANEL]));
    if !rows.is_multiple_of(PANEL) {
        out[rows / PANEL * head_width..].fill(Line([0.0; PANEL]));
    }
    for (row, values) in values.chunks_exact(width).enumerate() {
        let lines = &mut out[row / PANEL * head_width..][..head_width];
        for (line, value) in lines.iter_mut().zip(&values[columns.clone()]) {
            line.0[row % PANEL] = *value;
        }
    }
}

/// Panels of some columns of `values`: a line for each row, of old values behind the last column.
#[inline(always)]
fn row_panels(values: &[f32], width: usize, columns: Range<usize>, out: &mut Vec<Line<f32>>) {
    let len = values.len() / width;
    let out = tiles::scratch(out, columns.len().div_ceil(PANEL) * len, Line([0.0; PANEL]));
    for (row, values) in values.chunks_exact(width).enumerate() {
        for (panel, values) in values[columns.clone()].chunks(PANEL).enumerate() {
            out[panel * len + row].0[..values.len()].copy_from_slice(values);
        }
    }
}

/// Weights of the first `count` scores, up to the factor that it returns; zero for the others.
#[inline(always)]
fn softmax(scores: &mut [f32], count: usize) -> f32 {
    scores[count..].fill(f32::NEG_INFINITY);
    let mut most = [f32::NEG_INFINITY; PANEL];
    for scores in scores.as_chunks::<PANEL>().0 {
        for (most, score) in most.iter_mut().zip(scores) {
            *most = if *score > *most { *score } else { *most };
        }
    }
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for score in scores.iter_mut() {
        *score = exp(*score - most);
    }
    // `exp` is never quite zero.
    scores[count..].fill(0.0);
    let mut sums = [0.0; PANEL];
    for scores in scores.as_chunks::<PANEL>().0 {
        for (sum, score) in sums.iter_mut().zip(scores) {
            *sum += score;
        }
    }
    1.0 / sums.into_iter().sum::<f32>()
}
