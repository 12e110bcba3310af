//! Maps whose weights were packed once, for inference: in the order in which a product reads them, in 32, 16 or 8 bits.
//!
//! A product then copies no weights, which costs as much as the product itself where an expert has few rows. The result of a row does not depend
//! on the rows beside it, to the bit.

mod dot;
mod pieces;
mod product;
mod quantized;
mod sixteen;

use std::fmt;

use half::{bf16, f16};
use rayon::prelude::*;

use super::tiles::{Line, PANEL};
use crate::ops::Precision;
use dot::GROUP;
pub(super) use product::linear;

/// One linear map per expert, `[E, D, F]`, packed: panels of 32 output columns, the last of each expert filled up with zeros.
pub(crate) struct PackedMaps {
    num_experts: usize,
    d_in: usize,
    d_out: usize,
    panels: Panels,
}

/// Panels of all experts, one after the other; each has a line for each inner index.
enum Panels {
    F32(Vec<Line<f32>>),
    F16(Vec<Line<u16>>),
    BF16(Vec<Line<u16>>),
    /// A line for each group of inner indices. Each output column has a scale, and the sum of its bytes.
    Int8 {
        lines: Vec<Line<[i8; GROUP]>>,
        scales: Vec<f32>,
        sums: Vec<i32>,
    },
}

impl PackedMaps {
    /// Of the weights `[E, D, F]`.
    ///
    /// # Panics
    /// When `D` is above 65,536 and the precision is `Int8`: sums might not fit 32 bits.
    pub(crate) fn new(weights: &[f32], [num_experts, d_in, d_out]: [usize; 3], precision: Precision) -> Self {
        assert_eq!(weights.len(), num_experts * d_in * d_out, "weights of {num_experts} maps from {d_in} to {d_out}");
        let panels = match precision {
            Precision::F32 => Panels::F32(lines(weights, d_in, d_out, |value| value)),
            Precision::F16 => Panels::F16(lines(weights, d_in, d_out, |value| f16::from_f32(value).to_bits())),
            Precision::BF16 => Panels::BF16(lines(weights, d_in, d_out, |value| bf16::from_f32(value).to_bits())),
            Precision::Int8 => {
                let (bytes, scales) = quantize(weights, d_in, d_out);
                return Self::from_bytes(&bytes, scales, [num_experts, d_in, d_out]);
            }
        };
        Self { num_experts, d_in, d_out, panels }
    }

    /// Of bytes `[E, D, F]` and the scale of each output column, `[E, F]`.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub(crate) fn from_bytes(bytes: &[i8], scales: Vec<f32>, [num_experts, d_in, d_out]: [usize; 3]) -> Self {
        assert!(d_in <= 1 << 16, "maps from {d_in} values are too long for 8 bits: at most 65536");
        assert_eq!((bytes.len(), scales.len()), (num_experts * d_in * d_out, num_experts * d_out), "bytes and scales");
        let of_expert = |bytes: &[i8]| {
            let mut sums = vec![0; d_out];
            for row in bytes.chunks_exact(d_out) {
                for (sum, byte) in sums.iter_mut().zip(row) {
                    *sum += i32::from(*byte);
                }
            }
            sums
        };
        let sums = bytes.chunks_exact(d_in * d_out).flat_map(of_expert).collect();
        Self { num_experts, d_in, d_out, panels: Panels::Int8 { lines: groups(bytes, d_in, d_out), scales, sums } }
    }

    /// `[E, D, F]`
    pub(crate) fn dims(&self) -> [usize; 3] {
        [self.num_experts, self.d_in, self.d_out]
    }

    pub(crate) fn precision(&self) -> Precision {
        match self.panels {
            Panels::F32(_) => Precision::F32,
            Panels::F16(_) => Precision::F16,
            Panels::BF16(_) => Precision::BF16,
            Panels::Int8 { .. } => Precision::Int8,
        }
    }

    /// Panels of one expert.
    fn panels_of_one(&self) -> usize {
        self.d_out.div_ceil(PANEL)
    }

    /// The weights that products are made with, `[E, D, F]`.
    pub(crate) fn unpacked(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.num_experts * self.d_in * self.d_out];
        out.par_chunks_mut((self.d_in * self.d_out).max(1)).enumerate().for_each(|(expert, out)| {
            for panel in 0..self.panels_of_one() {
                let (at, first) = (expert * self.panels_of_one() + panel, panel * PANEL);
                let width = PANEL.min(self.d_out - first);
                let mut write = |row: usize, values: &[f32; PANEL]| {
                    out[row * self.d_out + first..][..width].copy_from_slice(&values[..width]);
                };
                match &self.panels {
                    Panels::F32(lines) => {
                        of_panel(lines, at, self.d_in).iter().enumerate().for_each(|(row, line)| write(row, &line.0))
                    }
                    Panels::F16(lines) => {
                        let values = |line: &Line<u16>| line.0.map(sixteen::of_f16);
                        of_panel(lines, at, self.d_in).iter().enumerate().for_each(|(row, line)| write(row, &values(line)));
                    }
                    Panels::BF16(lines) => {
                        let values = |line: &Line<u16>| line.0.map(sixteen::of_bf16);
                        of_panel(lines, at, self.d_in).iter().enumerate().for_each(|(row, line)| write(row, &values(line)));
                    }
                    Panels::Int8 { lines, scales, .. } => {
                        let scales = &scales[expert * self.d_out + first..][..width];
                        for row in 0..self.d_in {
                            let line = &of_panel(lines, at, self.d_in.div_ceil(GROUP))[row / GROUP];
                            let mut values = [0.0; PANEL];
                            for ((value, bytes), scale) in values.iter_mut().zip(&line.0).zip(scales) {
                                *value = f32::from(bytes[row % GROUP]) * scale;
                            }
                            write(row, &values);
                        }
                    }
                }
            }
        });
        out
    }

    /// The bytes `[E, D, F]` and the scale of each output column `[E, F]`, of weights in 8 bits.
    pub(crate) fn bytes(&self) -> Option<(Vec<i8>, &[f32])> {
        let Panels::Int8 { lines, scales, .. } = &self.panels else { return None };
        let mut out = vec![0; self.num_experts * self.d_in * self.d_out];
        let len = self.d_in.div_ceil(GROUP);
        for (row, out) in out.chunks_exact_mut(self.d_out.max(1)).enumerate() {
            let (expert, row) = (row / self.d_in, row % self.d_in);
            for (panel, out) in out.chunks_mut(PANEL).enumerate() {
                let line = &of_panel(lines, expert * self.panels_of_one() + panel, len)[row / GROUP];
                for (out, bytes) in out.iter_mut().zip(&line.0) {
                    *out = bytes[row % GROUP];
                }
            }
        }
        Some((out, scales))
    }
}

impl fmt::Debug for PackedMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMaps {{ dims: {:?}, precision: {:?} }}", self.dims(), self.precision())
    }
}

fn of_panel<T>(lines: &[Line<T>], panel: usize, len: usize) -> &[Line<T>] {
    &lines[panel * len..(panel + 1) * len]
}

/// The panels of all experts' values, `[E, D, F]`, each made by `f`.
fn lines<T: Copy + Default + Send>(values: &[f32], d_in: usize, d_out: usize, f: impl Fn(f32) -> T + Sync) -> Vec<Line<T>> {
    let (count, size) = (d_out.div_ceil(PANEL), (d_in * d_out).max(1));
    let mut lines = vec![Line([T::default(); PANEL]); values.len() / size * count * d_in];
    lines.par_chunks_mut(d_in.max(1)).enumerate().for_each(|(panel, lines)| {
        let (values, first) = (&values[panel / count * size..], panel % count * PANEL);
        let width = PANEL.min(d_out - first);
        for (row, line) in lines.iter_mut().enumerate() {
            for (out, value) in line.0.iter_mut().zip(&values[row * d_out + first..][..width]) {
                *out = f(*value);
            }
        }
    });
    lines
}

/// As [`lines`], of bytes, whose lines are of groups of inner indices; the last is filled up with zeros.
fn groups(bytes: &[i8], d_in: usize, d_out: usize) -> Vec<Line<[i8; GROUP]>> {
    let (count, size, len) = (d_out.div_ceil(PANEL), (d_in * d_out).max(1), d_in.div_ceil(GROUP));
    let mut lines = vec![Line([[0; GROUP]; PANEL]); bytes.len() / size * count * len];
    lines.par_chunks_mut(len.max(1)).enumerate().for_each(|(panel, lines)| {
        let (bytes, first) = (&bytes[panel / count * size..], panel % count * PANEL);
        let width = PANEL.min(d_out - first);
        for row in 0..d_in {
            for (out, byte) in lines[row / GROUP].0.iter_mut().zip(&bytes[row * d_out + first..][..width]) {
                out[row % GROUP] = *byte;
            }
        }
    });
    lines
}

/// Weights `[E, D, F]` in 8 bits with the scale of each output column, `[E, F]`: the largest of a column is 127 or −127.
fn quantize(weights: &[f32], d_in: usize, d_out: usize) -> (Vec<i8>, Vec<f32>) {
    let size = (d_in * d_out).max(1);
    let of_expert = |weights: &[f32]| {
        let mut largest = vec![0f32; d_out];
        for row in weights.chunks_exact(d_out) {
            for (largest, weight) in largest.iter_mut().zip(row) {
                *largest = largest.max(weight.abs());
            }
        }
        largest.into_iter().map(|largest| largest / 127.0).collect::<Vec<_>>()
    };
    let scales: Vec<f32> = weights.par_chunks_exact(size).flat_map_iter(of_expert).collect();
    let mut bytes = vec![0; weights.len()];
    let experts = bytes.par_chunks_exact_mut(size).zip(weights.par_chunks_exact(size)).zip(scales.par_chunks_exact(d_out.max(1)));
    experts.for_each(|((bytes, weights), scales)| {
        for (bytes, weights) in bytes.chunks_exact_mut(d_out).zip(weights.chunks_exact(d_out)) {
            for ((byte, weight), scale) in bytes.iter_mut().zip(weights).zip(scales) {
                // A column of zeros has a scale of zero.
                *byte = if *scale > 0.0 { (weight / scale).round() as i8 } else { 0 };
            }
        }
    });
    (bytes, scales)
}
