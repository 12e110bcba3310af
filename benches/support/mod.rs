//! What every bench does alike: paired timing, and inputs with routing to order.
#![allow(dead_code)] // Each bench uses its part.

#[path = "../../examples/support/device.rs"]
mod device;

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use burn::module::Param;
use burn::tensor::{Device, Distribution, FloatDType, IntDType, Tensor};
use burn_moe::{Capacity, MoeFeedForward, MoeFeedForwardConfig, TokenChoiceConfig};

use criterion::{Criterion, SamplingMode};
use device::device_by_name;

pub(crate) const EXPERTS: usize = 8;
pub(crate) const TOP_K: usize = 2;

/// One feed-forward layer of a CLIP.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) name: &'static str,
    pub(crate) tokens: usize,
    pub(crate) d_model: usize,
    pub(crate) d_ff: usize,
}

/// The device that `BURN_MOE_DEVICE` names, or the CPU; with `BURN_MOE_DTYPE` (`f32`, `f16`, `bf16`) its numbers are of that kind.
pub(crate) fn device() -> Device {
    let setting = |name, default: &str| std::env::var(name).unwrap_or(default.into());
    let mut device = device_by_name(&setting("BURN_MOE_DEVICE", "cpu")).unwrap_or_else(|error| panic!("BURN_MOE_DEVICE: {error}"));
    let dtype = match setting("BURN_MOE_DTYPE", "f32").as_str() {
        "f32" => return device,
        "f16" => FloatDType::F16,
        "bf16" => FloatDType::BF16,
        other => panic!("BURN_MOE_DTYPE is {other}: expected f32, f16 or bf16"),
    };
    device.configure((dtype, IntDType::I32)).unwrap_or_else(|error| panic!("BURN_MOE_DTYPE: {error}"));
    device
}

/// The shapes of a layer for `BURN_MOE_BATCH` samples, or for as many as a CPU has patience for.
pub(crate) fn shapes() -> [Shape; 3] {
    let batch = std::env::var("BURN_MOE_BATCH").ok().map(|batch| batch.parse().expect("BURN_MOE_BATCH is a number"));
    let of =
        |name, length, usual: usize, d_model| Shape { name, tokens: length * batch.unwrap_or(usual), d_model, d_ff: 4 * d_model };
    [of("b16-image", 197, 16, 768), of("b16-text", 77, 16, 512), of("l14", 257, 8, 1024)]
}

impl Shape {
    /// Floating-point operations of the active experts, forward.
    pub(crate) fn flops(&self) -> f64 {
        (TOP_K * 2 * 2 * self.tokens * self.d_model * self.d_ff) as f64
    }
}

/// How the tokens are spread over the experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Load {
    /// Exactly equal loads.
    Even,
    /// One expert with twice the mean load, the others equal.
    Skewed,
}

impl Load {
    pub(crate) const ALL: [Load; 2] = [Load::Even, Load::Skewed];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Load::Even => "even",
            Load::Skewed => "skewed",
        }
    }

    /// The first and second choice of a token.
    fn choices(self, token: usize, experts: usize) -> [usize; 2] {
        match self {
            Load::Even => [token % experts, (token + 1 + token / experts % (experts - 1)) % experts],
            // Every second token goes to expert 0: T/2 of 2 T choices, twice the mean of T/4 for 8 experts.
            Load::Skewed if token.is_multiple_of(2) => [0, 1 + token / 2 % (experts - 1)],
            Load::Skewed => {
                let first = token / 2 % (experts - 1);
                [1 + first, 1 + (first + 1 + token / (2 * (experts - 1)) % (experts - 2)) % (experts - 1)]
            }
        }
    }
}

/// Tokens `[T, D]` whose first `E` entries are their logits for [`with_plain_router`].
pub(crate) fn tokens(num_tokens: usize, d_model: usize, experts: usize, load: Load, device: &Device) -> Tensor<2> {
    let mut logits = vec![0.0f32; num_tokens * experts];
    for token in 0..num_tokens {
        let [first, second] = load.choices(token, experts);
        logits[token * experts + first] = 4.0;
        logits[token * experts + second] = 3.0;
    }
    let logits = Tensor::<1>::from_floats(&logits[..], device).reshape([num_tokens, experts]);
    let rest = Tensor::random([num_tokens, d_model - experts], Distribution::Normal(0.0, 1.0), device);
    Tensor::cat(vec![logits, rest], 1)
}

/// The layer with a router that reads a token's first `E` entries as its logits.
pub(crate) fn with_plain_router(mut layer: MoeFeedForward) -> MoeFeedForward {
    let [d_model, experts] = layer.router.weight.shape().dims();
    let mut identity = vec![0.0f32; d_model * experts];
    (0..experts).for_each(|e| identity[e * experts + e] = 1.0);
    let weight = Tensor::<1>::from_floats(&identity[..], &layer.router.weight.device()).reshape([d_model, experts]);
    layer.router.weight = Param::from_tensor(weight);
    layer
}

/// A layer with one capacity for training and inference, and [`with_plain_router`].
pub(crate) fn sparse_layer(d_model: usize, d_ff: usize, experts: usize, capacity: Capacity, device: &Device) -> MoeFeedForward {
    let assignment = TokenChoiceConfig::new().with_training_capacity(capacity).with_inference_capacity(capacity);
    with_plain_router(MoeFeedForwardConfig::new(d_model, d_ff, experts).with_assignment(assignment.into()).init(device))
}

/// Checks that the loads are what the bench says they are.
pub(crate) fn assert_load(layer: &MoeFeedForward, x: &Tensor<2>, load: Load) {
    let routing = layer.forward(x.clone()).routing;
    let requested = routing.plan.requested();
    let (busiest, mean) =
        (*requested.iter().max().unwrap() as f64, requested.iter().sum::<usize>() as f64 / requested.len() as f64);
    let expected = if load == Load::Even { 1.0 } else { 2.0 };
    assert!((busiest / mean - expected).abs() < 0.01, "loads {requested:?}: expected the busiest at {expected} times the mean");
}

/// Calls of what is timed before the device is waited for: one on a CPU, and elsewhere `BURN_MOE_CALLS` (20), so that the time is that of the
/// device's work and not that of starting it and hearing of its end.
fn calls(device: &Device) -> usize {
    if *device == Device::default() || *device == Device::default().autodiff() {
        return 1;
    }
    std::env::var("BURN_MOE_CALLS").map_or(20, |calls| calls.parse().expect("BURN_MOE_CALLS is a number"))
}

/// Seconds of one call of `forward` and of the backward pass of its sum, waited for.
pub(crate) fn backward(forward: impl Fn() -> Tensor<2>, device: &Device) -> f64 {
    timed(|| forward().sum().backward(), device)
}

/// Seconds of one call of `forward`, waited for.
pub(crate) fn finish(forward: impl Fn() -> Tensor<2>, device: &Device) -> f64 {
    timed(forward, device)
}

fn timed<R>(call: impl Fn() -> R, device: &Device) -> f64 {
    let calls = calls(device);
    let start = Instant::now();
    // Results live to the end: a device that works lazily may leave out what nobody holds.
    let results: Vec<R> = (0..calls).map(|_| call()).collect();
    device.sync().expect("the device is there");
    let seconds = start.elapsed().as_secs_f64() / calls as f64;
    black_box(results);
    seconds
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Criterion's report of `body`, which says how many seconds a call took, and the median of them; none when a filter on the command line left it out.
pub(crate) fn median_seconds(criterion: &mut Criterion, name: &str, body: &mut dyn FnMut() -> f64) -> Option<f64> {
    let mut times = Vec::new();
    sampled(criterion, name, &mut || {
        let seconds = body();
        times.push(seconds);
        Duration::from_secs_f64(seconds)
    });
    let times = times.split_off(1.min(times.len()));
    (!times.is_empty()).then(|| median(times))
}

/// Few samples of something slow, under criterion.
fn sampled(criterion: &mut Criterion, name: &str, body: &mut dyn FnMut() -> Duration) {
    let (group, rest) = name.split_once('/').expect("a name of several parts");
    let mut group = criterion.benchmark_group(group);
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(50)).measurement_time(Duration::from_millis(500));
    group.bench_function(rest, |bencher| bencher.iter_custom(|iterations| (0..iterations).map(|_| body()).sum()));
    group.finish();
}

/// Times `base` and `ours` in turn and prints the median of their ratios, times `scale`, as `ratio NAME VALUE`; criterion reports
/// `ours`, and a line `time NAME MILLISECONDS` says its median. `flops` are those of one call of `ours`, for a line `gflops NAME VALUE`.
pub(crate) fn paired(
    criterion: &mut Criterion,
    name: &str,
    scale: f64,
    flops: Option<f64>,
    base: &mut dyn FnMut() -> f64,
    ours: &mut dyn FnMut() -> f64,
) {
    let mut pairs = Vec::new();
    sampled(criterion, name, &mut || {
        let pair = (base(), ours());
        pairs.push(pair);
        Duration::from_secs_f64(pair.1)
    });
    // The first pair pays for cold caches; nothing was run when a filter on the command line left this bench out.
    let pairs = pairs.split_off(1.min(pairs.len()));
    if pairs.is_empty() {
        return;
    }
    println!("ratio {name} {:.3}", scale * median(pairs.iter().map(|(base, ours)| ours / base).collect()));
    let seconds = median(pairs.iter().map(|(_, ours)| *ours).collect());
    println!("time {name} {:.2}", 1e3 * seconds);
    if let Some(flops) = flops {
        println!("gflops {name} {:.1}", flops / seconds / 1e9);
    }
}

/// Prints the rate of the largest plain matrix product of this run, in GFLOP/s: what the others are held against.
pub(crate) fn print_peak(rows: usize, inner: usize, cols: usize, device: &Device) {
    let random = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Default, device);
    let (lhs, rhs) = (random([rows, inner]), random([inner, cols]));
    let rates = (0..6).map(|_| (2 * rows * inner * cols) as f64 / finish(|| lhs.clone().matmul(rhs.clone()), device) / 1e9);
    println!("gflops matmul/{rows}x{inner}x{cols} {:.1}", median(rates.skip(1).collect()));
}
