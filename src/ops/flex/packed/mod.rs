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
use crate::ops::precision::{Precision, quantize};
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
    /// When `D` or `F` is 0, or `D` is above 65,536 and the precision is `Int8`: sums might not fit 32 bits.
    pub(crate) fn new(weights: &[f32], [num_experts, d_in, d_out]: [usize; 3], precision: Precision) -> Self {
        assert!(d_in > 0 && d_out > 0, "maps from {d_in} to {d_out} values: expected at least one");
        assert_eq!(weights.len(), num_experts * d_in * d_out, "weights of {num_experts} maps from {d_in} to {d_out}");
        let panels = match precision {
            Precision::F32 => Panels::F32(lines(weights, d_in, d_out, |value| value)),
            Precision::F16 => Panels::F16(lines(weights, d_in, d_out, |value| f16::from_f32(value).to_bits())),
            Precision::BF16 => Panels::BF16(lines(weights, d_in, d_out, |value| bf16::from_f32(value).to_bits())),
            Precision::Int8 => {
                assert!(d_in <= 1 << 16, "maps from {d_in} values are too long for 8 bits: at most 65536");
                let (bytes, scales) = quantize(weights, d_in, d_out);
                let sums = bytes.chunks_exact((d_in * d_out).max(1)).flat_map(|bytes| column_sums(bytes, d_out)).collect();
                Panels::Int8 { lines: groups(&bytes, d_in, d_out), scales, sums }
            }
        };
        Self { num_experts, d_in, d_out, panels }
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
}

impl fmt::Debug for PackedMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMaps {{ dims: {:?}, precision: {:?} }}", self.dims(), self.precision())
    }
}

fn column_sums(bytes: &[i8], d_out: usize) -> Vec<i32> {
    let mut sums = vec![0; d_out];
    for row in bytes.chunks_exact(d_out) {
        for (sum, byte) in sums.iter_mut().zip(row) {
            *sum += i32::from(*byte);
        }
    }
    sums
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
