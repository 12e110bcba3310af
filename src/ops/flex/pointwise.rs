//! Activations, written so that the compiler turns them into vector instructions: no branch, no call.
//!
//! burn's CPU backend takes one scalar `erff` per element, which in a small model costs more than the matrix products.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::buffer::Buffer;
use crate::ops::Activation;

/// Elements that one task handles: enough to pay for the task, few enough to stay in the first-level cache.
const CHUNK: usize = 4096;

/// `out = act(x)`.
pub(super) fn activation(x: &[f32], activation: Activation) -> Buffer {
    let mut out = Buffer::new(x.len());
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| apply(out, x, activation));
    out
}

/// `grad · act'(x)`.
pub(super) fn activation_backward(x: &[f32], grad: &[f32], activation: Activation) -> Buffer {
    let mut out = Buffer::new(x.len());
    let tasks = out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK).zip(grad.par_chunks(CHUNK)));
    tasks.for_each(|(out, (x, grad))| Arch::new().dispatch(Slopes { out, x, grad, activation }));
    out
}

/// `out = act(x)` on the calling thread.
pub(super) fn apply(out: &mut [f32], x: &[f32], activation: Activation) {
    Arch::new().dispatch(Values { out, x, activation });
}

/// `out = act(x)`; a type of its own, as the compiler may leave a closure of this size out of the code for wider instructions.
pub(super) struct Values<'a> {
    pub out: &'a mut [f32],
    pub x: &'a [f32],
    pub activation: Activation,
}

impl WithSimd for Values<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        macro_rules! each {
            ($f:expr) => {
                for (out, &x) in self.out.iter_mut().zip(self.x) {
                    *out = $f(x);
                }
            };
        }
        match self.activation {
            Activation::Gelu => each!(gelu),
            Activation::GeluTanh => each!(gelu_tanh),
            Activation::QuickGelu => each!(quick_gelu),
            Activation::Relu => each!(relu),
            Activation::Silu => each!(silu),
        }
    }
}

/// `out = grad · act'(x)`.
struct Slopes<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    grad: &'a [f32],
    activation: Activation,
}

impl WithSimd for Slopes<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        macro_rules! each {
            ($f:expr) => {
                for (out, (&x, &grad)) in self.out.iter_mut().zip(self.x.iter().zip(self.grad)) {
                    *out = grad * $f(x);
                }
            };
        }
        match self.activation {
            Activation::Gelu => each!(gelu_slope),
            Activation::GeluTanh => each!(gelu_tanh_slope),
            Activation::QuickGelu => each!(quick_gelu_slope),
            Activation::Relu => each!(relu_slope),
            Activation::Silu => each!(silu_slope),
        }
    }
}

/// `pre += bias` row after row, then `out = act(pre)`, on the calling thread and in one pass over memory.
pub(super) fn bias_and_activation(pre: &mut [f32], out: &mut [f32], bias: &[f32], activation: Activation) {
    let block = block_of_rows(bias.len());
    for (pre, out) in pre.chunks_mut(block).zip(out.chunks_mut(block)) {
        add_bias(pre, bias);
        apply(out, pre, activation);
    }
}

/// `x = act(x + bias)` row after row, on the calling thread.
pub(super) fn bias_and_activation_in_place(x: &mut [f32], bias: &[f32], activation: Option<Activation>) {
    let Some(activation) = activation else {
        return add_bias(x, bias);
    };
    let mut pre = vec![0.0; block_of_rows(bias.len()).min(x.len())];
    for x in x.chunks_mut(block_of_rows(bias.len())) {
        let pre = &mut pre[..x.len()];
        pre.copy_from_slice(x);
        add_bias(pre, bias);
        apply(x, pre, activation);
    }
}

/// Values of as many whole rows as fit a chunk, at least one.
fn block_of_rows(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1) * width.max(1)
}

fn add_bias(values: &mut [f32], bias: &[f32]) {
    if bias.is_empty() {
        return;
    }
    Arch::new().dispatch(|| {
        for row in values.chunks_exact_mut(bias.len()) {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
            }
        }
    });
}

/// `sum += row` for every row of `values`, on the calling thread.
pub(super) fn add_rows(sum: &mut [f32], values: &[f32]) {
    Arch::new().dispatch(|| {
        for row in values.chunks_exact(sum.len()) {
            for (sum, value) in sum.iter_mut().zip(row) {
                *sum += value;
            }
        }
    });
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    let x = if x < -NORMAL_END { -NORMAL_END } else { x };
    x * normal_cdf(x)
}

/// `Φ(x) + x · φ(x)`.
#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    const DENSITY_AT_ZERO: f32 = 0.398_942_3;
    let cdf = normal_cdf(x);
    let x = between(x, -13.0, 13.0);
    cdf + x * DENSITY_AT_ZERO * exp(-0.5 * x * x)
}

/// `2 √(2/π)`, as `(1 + tanh(u)) / 2 = σ(2 u)`.
const TANH_SCALE: f32 = 1.595_769;
const TANH_CUBE: f32 = 0.044_715;

/// `x · σ(2 √(2/π) · (x + 0.044715 x³))`.
#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    let x = if x < -80.0 { -80.0 } else { x };
    x * sigmoid(TANH_SCALE * (x + TANH_CUBE * x * x * x))
}

/// The slope of [`gelu_tanh`].
#[inline(always)]
fn gelu_tanh_slope(x: f32) -> f32 {
    let x = between(x, -80.0, 80.0);
    let s = sigmoid(TANH_SCALE * (x + TANH_CUBE * x * x * x));
    s + x * s * (1.0 - s) * TANH_SCALE * (1.0 + 3.0 * TANH_CUBE * x * x)
}

#[inline(always)]
fn quick_gelu(x: f32) -> f32 {
    swish(x, 1.702)
}

#[inline(always)]
fn quick_gelu_slope(x: f32) -> f32 {
    swish_slope(x, 1.702)
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    swish(x, 1.0)
}

#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    swish_slope(x, 1.0)
}

/// NaN stays NaN.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[inline(always)]
fn relu_slope(x: f32) -> f32 {
    if x > 0.0 { 1.0 } else { 0.0 }
}

/// `x · σ(c · x)`.
#[inline(always)]
fn swish(x: f32, c: f32) -> f32 {
    let x = if x < -80.0 { -80.0 } else { x };
    x * sigmoid(c * x)
}

/// The slope of [`swish`].
#[inline(always)]
fn swish_slope(x: f32, c: f32) -> f32 {
    let x = between(x, -80.0, 80.0);
    let s = sigmoid(c * x);
    s + c * x * s * (1.0 - s)
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Beyond it Φ is 0 or 1 to within 1e-7.
const NORMAL_END: f32 = 5.2;

/// Φ(x), the normal distribution function, as `1/2 + x · P(x²) / Q(x²)`; the error is at most 2e-7.
///
/// The coefficients are a weighted least-squares fit to `erf` in f64 over `|x| ≤ 5.2`, re-weighted until the largest error was level.
#[inline(always)]
fn normal_cdf(x: f32) -> f32 {
    let x = between(x, -NORMAL_END, NORMAL_END);
    let u = x * x;
    let p = 2.403_909_7e-8;
    let p = p * u + 6.462_521_6e-6;
    let p = p * u + 1.651_495_5e-4;
    let p = p * u + 4.657_541e-3;
    let p = p * u + 3.335_701_8e-2;
    let p = p * u + 3.989_421_5e-1;
    let q = 1.242_982_8e-6;
    let q = q * u + 7.316_541e-5;
    let q = q * u + 1.863_384_9e-3;
    let q = q * u + 2.838_986_6e-2;
    let q = q * u + 2.502_789_6e-1;
    let q = q * u + 1.0;
    0.5 + x * p / q
}

/// `eˣ`: `2ⁿ · eʳ` with `n` the nearest integer to `x / ln 2`; the relative error is at most 2e-7, and the ends are held at
/// `e^±87`.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = between(x, -87.0, 87.0);
    // Adding 1.5 · 2²³ leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first with few bits, so that `n · LN2_HIGH` is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let p = 1.0 / 5040.0;
    let p = p * r + 1.0 / 720.0;
    let p = p * r + 1.0 / 120.0;
    let p = p * r + 1.0 / 24.0;
    let p = p * r + 1.0 / 6.0;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    p * power
}

/// Two comparisons in an order that lets NaN through.
#[inline(always)]
fn between(x: f32, low: f32, high: f32) -> f32 {
    let x = if x > high { high } else { x };
    if x < low { low } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distribution function by Simpson's rule over its density, in f64.
    fn cdf_by_hand(x: f64) -> f64 {
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let steps = 2000;
        let h = x / steps as f64;
        let inner: f64 = (1..steps).map(|i| density(i as f64 * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        0.5 + h / 3.0 * (density(0.0) + inner + density(x))
    }

    fn sigmoid_by_hand(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn every_activation_and_its_slope_equal_the_formula() {
        let x: Vec<f32> = (-1200..=1200).map(|i| i as f32 * 0.01).collect();
        let ones = vec![1.0; x.len()];
        type Formula = fn(f64) -> (f64, f64);
        let formulas: [(Activation, Formula); 5] = [
            (Activation::Gelu, |x| {
                let (cdf, density) = (cdf_by_hand(x), (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt());
                (x * cdf, cdf + x * density)
            }),
            (Activation::GeluTanh, |x| {
                let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                let slope = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
                (0.5 * x * (1.0 + u.tanh()), 0.5 * (1.0 + u.tanh()) + 0.5 * x * (1.0 - u.tanh().powi(2)) * slope)
            }),
            (Activation::QuickGelu, |x| {
                let s = sigmoid_by_hand(1.702 * x);
                (x * s, s + 1.702 * x * s * (1.0 - s))
            }),
            (Activation::Relu, |x| (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 })),
            (Activation::Silu, |x| {
                let s = sigmoid_by_hand(x);
                (x * s, s + x * s * (1.0 - s))
            }),
        ];
        for (kind, formula) in formulas {
            let (values, slopes) = (activation(&x, kind), activation_backward(&x, &ones, kind));
            for ((&x, &value), &slope) in x.iter().zip(&values[..]).zip(&slopes[..]) {
                let (expected, expected_slope) = formula(f64::from(x));
                assert!(
                    (f64::from(value) - expected).abs() < 1e-6 * expected.abs().max(1.0),
                    "{kind:?}({x}) = {value}, not {expected}"
                );
                assert!((f64::from(slope) - expected_slope).abs() < 3e-6, "{kind:?}'({x}) = {slope}, not {expected_slope}");
            }
        }
    }

    #[test]
    fn the_ends_are_finite_and_nan_stays_nan() {
        for kind in [Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu, Activation::Silu] {
            let x = [f32::MAX, f32::MIN, f32::NAN];
            let [high, low, nan] = activation(&x, kind)[..] else { unreachable!() };
            assert!((high / f32::MAX - 1.0).abs() < 1e-6 && low.abs() < 1e-5 && nan.is_nan(), "{kind:?}: {high} {low} {nan}");
            let [high, low, _] = activation_backward(&x, &[1.0; 3], kind)[..] else { unreachable!() };
            assert!((high - 1.0).abs() < 1e-6 && low.abs() < 1e-5, "{kind:?}: {high} {low}");
        }
    }
}
