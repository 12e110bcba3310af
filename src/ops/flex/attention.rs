//! Softmax attention within each sample, for samples of different lengths: each task computes one sample, head by head, in the cache.
//!
//! Nothing but the output is kept for the backward pass, which computes the weights again.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{buffer::Buffer, pointwise::exp};
use crate::ops::AttentionShape;

/// Values of one step of the inner loops: a vector of the widest instructions.
const LANES: usize = 16;
/// Rows that make a task of its own worth while.
const ROWS: usize = 64;

type Lanes = [f32; LANES];

/// Sums that are made at the same time, so that none waits for the one before it.
const CHAINS: usize = 4;

/// `[R, D]` three times, to `[R, D]`.
pub(super) fn forward(query: &[f32], key: &[f32], value: &[f32], shape: &AttentionShape) -> Buffer {
    let mut out = Buffer::new(query.len());
    let tasks: Vec<_> = split(&mut out, shape).into_iter().zip(shape.samples.windows(2)).collect();
    tasks.into_par_iter().with_min_len(samples_per_task(shape)).for_each_init(Scratch::default, |scratch, (out, sample)| {
        let inputs = [query, key, value].map(|values| rows(values, sample, shape));
        Arch::new().dispatch(Forward { inputs, out, shape, scratch });
    });
    out
}

/// The gradients of the three, from that of the output.
pub(super) fn backward(query: &[f32], key: &[f32], value: &[f32], grad: &[f32], shape: &AttentionShape) -> [Buffer; 3] {
    let mut out = [query, key, value].map(|values| Buffer::new(values.len()));
    let [to_query, to_key, to_value] = &mut out;
    let outs = split(to_query, shape).into_iter().zip(split(to_key, shape)).zip(split(to_value, shape));
    let tasks: Vec<_> = outs.zip(shape.samples.windows(2)).collect();
    tasks.into_par_iter().with_min_len(samples_per_task(shape)).for_each_init(
        Scratch::default,
        |scratch, (((to_query, to_key), to_value), sample)| {
            let inputs = [query, key, value, grad].map(|values| rows(values, sample, shape));
            Arch::new().dispatch(Backward { inputs, outs: [to_query, to_key, to_value], shape, scratch });
        },
    );
    out
}

/// One sample; a type of its own, as the compiler may leave a closure of this size out of the code for wider instructions.
struct Forward<'a> {
    inputs: [&'a [f32]; 3],
    out: &'a mut [f32],
    shape: &'a AttentionShape,
    scratch: &'a mut Scratch,
}

impl WithSimd for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { inputs: [query, key, value], out, shape, scratch } = self;
        for head in 0..shape.heads {
            let head = Head::new(shape, head, out.len() / shape.width);
            head.read(query, &mut scratch.query);
            head.read(key, &mut scratch.key);
            head.read(value, &mut scratch.value);
            head.transpose(&scratch.key, &mut scratch.key_columns);
            head.forward(scratch);
            head.write(&scratch.out, out);
        }
    }
}

/// One sample.
struct Backward<'a> {
    inputs: [&'a [f32]; 4],
    outs: [&'a mut [f32]; 3],
    shape: &'a AttentionShape,
    scratch: &'a mut Scratch,
}

impl WithSimd for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { inputs: [query, key, value, grad], outs: [to_query, to_key, to_value], shape, scratch } = self;
        for head in 0..shape.heads {
            let head = Head::new(shape, head, grad.len() / shape.width);
            head.read(query, &mut scratch.query);
            head.read(key, &mut scratch.key);
            head.read(value, &mut scratch.value);
            head.read(grad, &mut scratch.grad);
            head.transpose(&scratch.key, &mut scratch.key_columns);
            head.transpose(&scratch.value, &mut scratch.value_columns);
            head.backward(scratch);
            head.write(&scratch.to_query, to_query);
            head.write(&scratch.to_key, to_key);
            head.write(&scratch.to_value, to_value);
        }
    }
}

fn rows<'a>(values: &'a [f32], sample: &[usize], shape: &AttentionShape) -> &'a [f32] {
    &values[sample[0] * shape.width..sample[1] * shape.width]
}

/// The rows of each sample.
fn split<'a>(values: &'a mut [f32], shape: &AttentionShape) -> Vec<&'a mut [f32]> {
    let mut rest = values;
    let mut take = |sample: &[usize]| {
        let (rows, others) = std::mem::take(&mut rest).split_at_mut((sample[1] - sample[0]) * shape.width);
        rest = others;
        rows
    };
    shape.samples.windows(2).map(&mut take).collect()
}

fn samples_per_task(shape: &AttentionShape) -> usize {
    let rows = shape.samples.last().copied().unwrap_or(0);
    (ROWS * (shape.samples.len() - 1) / rows.max(1)).max(1)
}

/// What one head of one sample needs, kept from sample to sample. Rows have whole vectors, with zeros behind the head's own values.
#[derive(Default)]
struct Scratch {
    query: Vec<Lanes>,
    key: Vec<Lanes>,
    value: Vec<Lanes>,
    grad: Vec<Lanes>,
    key_columns: Vec<Lanes>,
    value_columns: Vec<Lanes>,
    out: Vec<Lanes>,
    to_query: Vec<Lanes>,
    to_key: Vec<Lanes>,
    to_value: Vec<Lanes>,
    weights: Vec<Lanes>,
    slopes: Vec<Lanes>,
}

/// One head of one sample.
#[derive(Clone, Copy)]
struct Head {
    /// Rows of the sample.
    len: usize,
    /// Width of all heads, of this one, and where it begins.
    width: usize,
    head_width: usize,
    start: usize,
    /// Vectors of a row of this head, and of one number for each row.
    row: usize,
    column: usize,
    causal: bool,
    scale: f32,
}

impl Head {
    #[inline(always)]
    fn new(shape: &AttentionShape, head: usize, len: usize) -> Self {
        let head_width = shape.width / shape.heads;
        Self {
            len,
            width: shape.width,
            head_width,
            start: head * head_width,
            row: head_width.div_ceil(LANES),
            column: len.div_ceil(LANES),
            causal: shape.causal,
            scale: 1.0 / (head_width as f32).sqrt(),
        }
    }

    #[inline(always)]
    fn read(&self, values: &[f32], out: &mut Vec<Lanes>) {
        out.clear();
        out.resize(self.len * self.row, [0.0; LANES]);
        for (values, out) in values.chunks_exact(self.width).zip(out.chunks_exact_mut(self.row)) {
            out.as_flattened_mut()[..self.head_width].copy_from_slice(&values[self.start..][..self.head_width]);
        }
    }

    #[inline(always)]
    fn write(&self, values: &[Lanes], out: &mut [f32]) {
        for (values, out) in values.chunks_exact(self.row).zip(out.chunks_exact_mut(self.width)) {
            out[self.start..][..self.head_width].copy_from_slice(&values.as_flattened()[..self.head_width]);
        }
    }

    #[inline(always)]
    fn transpose(&self, rows: &[Lanes], out: &mut Vec<Lanes>) {
        out.clear();
        out.resize(self.head_width * self.column, [0.0; LANES]);
        let out = out.as_flattened_mut();
        for (row, values) in rows.chunks_exact(self.row).enumerate() {
            for (column, value) in values.as_flattened()[..self.head_width].iter().enumerate() {
                out[column * self.column * LANES + row] = *value;
            }
        }
    }

    /// How many rows a row looks at.
    #[inline(always)]
    fn looks_at(&self, row: usize) -> usize {
        if self.causal { row + 1 } else { self.len }
    }

    /// `out[j] = a · b[j]` for the rows `b`, given by columns, in whole vectors up to `count`.
    #[inline(always)]
    fn products(&self, a: &[Lanes], columns: &[Lanes], count: usize, out: &mut [Lanes]) {
        for (block, out) in out[..count.div_ceil(LANES)].iter_mut().enumerate() {
            let row = |column: usize| &columns[column * self.column + block];
            let sums = sums(&a.as_flattened()[..self.head_width], row);
            *out = total(&sums);
        }
    }

    /// The weights of a row, zero beyond `count`.
    #[inline(always)]
    fn weights(&self, query: &[Lanes], columns: &[Lanes], count: usize, out: &mut [Lanes]) {
        self.products(query, columns, count, out);
        let blocks = count.div_ceil(LANES);
        let flat = out[..blocks].as_flattened_mut();
        flat[count..].fill(f32::NEG_INFINITY);
        let mut most = [f32::NEG_INFINITY; LANES];
        for block in &out[..blocks] {
            for (most, value) in most.iter_mut().zip(block) {
                *most = if *value > *most { *value } else { *most };
            }
        }
        let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
        for block in &mut out[..blocks] {
            for value in block {
                *value = exp((*value - most) * self.scale);
            }
        }
        // `exp` is never quite zero.
        out[..blocks].as_flattened_mut()[count..].fill(0.0);
        let mut sum = [0.0; LANES];
        for block in &out[..blocks] {
            for (sum, value) in sum.iter_mut().zip(block) {
                *sum += value;
            }
        }
        let part = 1.0 / sum.into_iter().sum::<f32>();
        for block in &mut out[..blocks] {
            for value in block {
                *value *= part;
            }
        }
    }

    /// `out = Σ_j weights[j] · rows[j]` over the first `count` rows.
    #[inline(always)]
    fn weighted_sum(&self, weights: &[Lanes], rows: &[Lanes], count: usize, out: &mut [Lanes]) {
        for (block, out) in out.iter_mut().enumerate() {
            let row = |row: usize| &rows[row * self.row + block];
            let sums = sums(&weights.as_flattened()[..count], row);
            *out = total(&sums);
        }
    }

    #[inline(always)]
    fn forward(&self, scratch: &mut Scratch) {
        let Scratch { query, key_columns, value, out, weights, .. } = scratch;
        weights.resize(weights.len().max(self.column), [0.0; LANES]);
        out.resize(out.len().max(self.len * self.row), [0.0; LANES]);
        for row in 0..self.len {
            let (count, at) = (self.looks_at(row), row * self.row..(row + 1) * self.row);
            self.weights(&query[at.clone()], key_columns, count, weights);
            self.weighted_sum(weights, value, count, &mut out[at]);
        }
    }

    #[inline(always)]
    fn backward(&self, scratch: &mut Scratch) {
        let Scratch { query, key, grad, key_columns, value_columns, to_query, to_key, to_value, weights, slopes, .. } = scratch;
        for columns in [&mut *weights, &mut *slopes] {
            columns.resize(columns.len().max(self.column), [0.0; LANES]);
        }
        to_query.resize(to_query.len().max(self.len * self.row), [0.0; LANES]);
        for sums in [&mut *to_key, &mut *to_value] {
            sums.clear();
            sums.resize(self.len * self.row, [0.0; LANES]);
        }
        for row in 0..self.len {
            let (count, at) = (self.looks_at(row), row * self.row..(row + 1) * self.row);
            let blocks = count.div_ceil(LANES);
            let (query, grad) = (&query[at.clone()], &grad[at.clone()]);
            self.weights(query, key_columns, count, weights);
            self.products(grad, value_columns, count, slopes);
            let mut mean = [0.0; LANES];
            for (weights, slopes) in weights[..blocks].iter().zip(&slopes[..blocks]) {
                for ((mean, weight), slope) in mean.iter_mut().zip(weights).zip(slopes) {
                    *mean += weight * slope;
                }
            }
            let mean: f32 = mean.into_iter().sum();
            for (weights, slopes) in weights[..blocks].iter().zip(&mut slopes[..blocks]) {
                for (weight, slope) in weights.iter().zip(slopes) {
                    *slope = weight * (*slope - mean) * self.scale;
                }
            }
            self.weighted_sum(slopes, key, count, &mut to_query[at]);
            let (weights, slopes) = (weights.as_flattened(), slopes.as_flattened());
            for other in 0..count {
                let at = other * self.row..(other + 1) * self.row;
                for ((to_key, to_value), (query, grad)) in
                    to_key[at.clone()].iter_mut().zip(&mut to_value[at]).zip(query.iter().zip(grad))
                {
                    add(to_key, slopes[other], query);
                    add(to_value, weights[other], grad);
                }
            }
        }
    }
}

/// `sum += a · b`. Where processors have no instruction for both at once, asking for it would be a call.
#[inline(always)]
fn add(sum: &mut Lanes, a: f32, b: &Lanes) {
    for (sum, b) in sum.iter_mut().zip(b) {
        *sum = if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) { a.mul_add(*b, *sum) } else { *sum + a * b };
    }
}

/// `Σ_i factors[i] · row(i)`, in parts.
#[inline(always)]
fn sums<'a>(factors: &[f32], row: impl Fn(usize) -> &'a Lanes) -> [Lanes; CHAINS] {
    let mut sums = [[0.0; LANES]; CHAINS];
    let (groups, rest) = factors.as_chunks::<CHAINS>();
    for (group, factors) in groups.iter().enumerate() {
        for chain in 0..CHAINS {
            add(&mut sums[chain], factors[chain], row(group * CHAINS + chain));
        }
    }
    for (place, factor) in rest.iter().enumerate() {
        add(&mut sums[0], *factor, row(groups.len() * CHAINS + place));
    }
    sums
}

#[inline(always)]
fn total(sums: &[Lanes; CHAINS]) -> Lanes {
    let mut total = sums[0];
    for sums in &sums[1..] {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total += sum;
        }
    }
    total
}
