//! Moving rows: gathers in both directions, so that nothing is ever added to from two places.
//!
//! `row_choice` and `choice_row` are as in [`MoeOps`](crate::ops::extension::MoeOps).

use pulp::Arch;
use rayon::prelude::*;

use super::buffer::Buffer;
use crate::ops::NON_FINITE;

/// Values that one task moves.
const CHUNK: usize = 1 << 14;

fn rows_per_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// Calls `body` with each row's number and its values, many rows a task.
fn for_each_row(out: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    if width == 0 {
        return;
    }
    let rows = rows_per_task(width);
    out.par_chunks_mut(rows * width).enumerate().for_each(|(task, chunk)| {
        Arch::new().dispatch(|| {
            for (i, row) in chunk.chunks_exact_mut(width).enumerate() {
                body(task * rows + i, row);
            }
        });
    });
}

fn row_of(values: &[f32], width: usize, row: usize) -> &[f32] {
    &values[row * width..(row + 1) * width]
}

/// The choices of one token that have a row: their place among the token's choices, and their row.
fn rows_of(choice_row: &[i32], token: usize, num_choices: usize) -> impl Iterator<Item = (usize, usize)> {
    let choices = token * num_choices..(token + 1) * num_choices;
    choice_row[choices].iter().enumerate().filter(|(_, row)| **row >= 0).map(|(m, &row)| (m, row as usize))
}

/// `out[r] = x[t(r)]`; zeros for a row without a choice.
pub(super) fn gather(x: &[f32], width: usize, row_choice: &[i32], num_choices: usize) -> Buffer {
    let mut out = Buffer::new(row_choice.len() * width);
    for_each_row(&mut out, width, |r, row| match usize::try_from(row_choice[r]) {
        Ok(choice) => row.copy_from_slice(row_of(x, width, choice / num_choices)),
        Err(_) => row.fill(0.0),
    });
    out
}

/// `out[r] = gates[choice of r] · x[t(r)]`; zeros for a row without a choice.
pub(super) fn weighted_gather(x: &[f32], width: usize, gates: &[f32], row_choice: &[i32], num_choices: usize) -> Buffer {
    let mut out = Buffer::new(row_choice.len() * width);
    for_each_row(&mut out, width, |r, row| {
        let Ok(choice) = usize::try_from(row_choice[r]) else { return row.fill(0.0) };
        let gate = gates[choice];
        for (out, x) in row.iter_mut().zip(row_of(x, width, choice / num_choices)) {
            *out = gate * x;
        }
    });
    out
}

/// `out[t] = Σ_m rows[row of (t, m)]`.
pub(super) fn sum(rows: &[f32], width: usize, choice_row: &[i32], num_tokens: usize) -> Buffer {
    let num_choices = choice_row.len() / num_tokens;
    let mut out = Buffer::new(num_tokens * width);
    for_each_row(&mut out, width, |t, token| {
        token.fill(0.0);
        for (_, row) in rows_of(choice_row, t, num_choices) {
            for (out, x) in token.iter_mut().zip(row_of(rows, width, row)) {
                *out += x;
            }
        }
    });
    out
}

/// `out[t] = Σ_m gates[t, m] · rows[row of (t, m)]`; NaN for a token with a choice that is [`NON_FINITE`].
pub(super) fn weighted_sum(rows: &[f32], width: usize, gates: &[f32], choice_row: &[i32], num_tokens: usize) -> Buffer {
    let num_choices = choice_row.len() / num_tokens;
    let mut out = Buffer::new(num_tokens * width);
    for_each_row(&mut out, width, |t, token| {
        if choice_row[t * num_choices..(t + 1) * num_choices].contains(&NON_FINITE) {
            return token.fill(f32::NAN);
        }
        token.fill(0.0);
        for (m, row) in rows_of(choice_row, t, num_choices) {
            let gate = gates[t * num_choices + m];
            for (out, x) in token.iter_mut().zip(row_of(rows, width, row)) {
                *out += gate * x;
            }
        }
    });
    out
}

/// `out[t, m] = x[t] · rows[row of (t, m)]`, 0 for a choice without a row.
pub(super) fn products(x: &[f32], rows: &[f32], width: usize, choice_row: &[i32], num_choices: usize) -> Buffer {
    let mut out = Buffer::new(choice_row.len());
    out.fill(0.0);
    let tokens = rows_per_task(width);
    out.par_chunks_mut(tokens * num_choices).enumerate().for_each(|(task, chunk)| {
        Arch::new().dispatch(|| {
            for (i, products) in chunk.chunks_exact_mut(num_choices).enumerate() {
                let t = task * tokens + i;
                for (m, row) in rows_of(choice_row, t, num_choices) {
                    products[m] = dot(row_of(x, width, t), row_of(rows, width, row));
                }
            }
        });
    });
    out
}

/// Sixteen partial sums, in an order that does not depend on the processor's instruction set.
#[inline(always)]
fn dot(x: &[f32], y: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    let (x_blocks, y_blocks) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = x_blocks.remainder().iter().zip(y_blocks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in x_blocks.zip(y_blocks) {
        for lane in 0..LANES {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}
