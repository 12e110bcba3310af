//! Peak memory: what a layer needs and no more (a `[T, E, C]` tensor alone would take four times the larger bound here), and what gradient
//! checkpointing saves.
//!
//! A binary of its own, because the allocator counts for the whole process.

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::nn::transformer::PositionWiseFeedForwardConfig;
use burn::tensor::{Device, Distribution, Gradients, Tensor};
use burn_moe::transformer::MlpConfig;
use burn_moe::{Capacity, ExpertOptions, MoeFeedForward, MoeFeedForwardConfig, TokenChoiceConfig, kernels::release_idle_memory};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const TOKENS: usize = 4096;
const D_MODEL: usize = 64;
const D_FF: usize = 256;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

/// One test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes above the present level that `body` needed at its worst.
fn peak_of<R>(body: impl FnOnce() -> R) -> (f64, R) {
    // Otherwise memory that the kernels have from before would not count.
    release_idle_memory();
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let result = body();
    ((MEMORY.peak_usage() - before) as f64, result)
}

fn bytes(values: usize) -> f64 {
    (4 * values) as f64
}

#[test]
fn peak_memory_is_the_rows_their_hidden_activations_and_the_plan() {
    let _turn = alone();
    let device = Device::default().autodiff();
    let capacity = Capacity::Dropless;
    let assignment = TokenChoiceConfig::new().with_training_capacity(capacity).with_inference_capacity(capacity);
    let layer: MoeFeedForward = MoeFeedForwardConfig::new(D_MODEL, D_FF, EXPERTS).with_assignment(assignment.into()).init(&device);
    let x = Tensor::<2>::random([TOKENS, D_MODEL], Distribution::Normal(0.0, 1.0), &device);
    let forward = |x: Tensor<2>| layer.valid().forward(x.inner());
    let backward = |x: Tensor<2>| layer.forward(x.require_grad()).output.sum().backward();
    // Thread pools and lazily initialised parameters are not the layer's.
    drop((forward(x.clone()), backward(x.clone())));

    let rows = TOKENS * TOP_K;
    let parameters = layer.num_params();
    let (row, hidden, token) = (bytes(rows * D_MODEL), bytes(rows * D_FF), bytes(TOKENS * D_MODEL));
    // Logits, probabilities and gates with what came before them, the host's copy, and the plan: some tens of numbers a token.
    let routing = bytes(TOKENS * EXPERTS * 8);

    let (inference, _) = peak_of(|| forward(x.clone()));
    // The rows going in or coming out, the hidden activations, and the output.
    let bound = row + hidden + token + routing;
    println!("forward: {:.1} MB, bound {:.1} MB", inference / 1e6, bound / 1e6);
    assert!(inference < bound, "forward took {inference}, more than {bound}");

    let (training, _) = peak_of(|| backward(x.clone()));
    // Kept: rows in and out, hidden before and after the activation, and what the router read. On top of them a hidden gradient, each parameter's
    // gradient, the output, and the gradients of the tokens by router and experts.
    let bound = 2.0 * row + 3.0 * hidden + 4.0 * token + bytes(parameters) + routing;
    println!("forward and backward: {:.1} MB, bound {:.1} MB", training / 1e6, bound / 1e6);
    assert!(training < bound, "forward and backward took {training}, more than {bound}");
}

/// A module on another device, with trainable parameters of the same numbers.
struct On<'a>(&'a Device);

impl ModuleMapper for On<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| Tensor::from_data(value.into_data(), self.0).require_grad())
    }
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    tensor.try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// The gradients of all parameters.
struct GradientBits<'a>(&'a Gradients, Vec<Vec<u32>>);

impl ModuleVisitor for GradientBits<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.1.push(bits(param.val().grad(self.0).expect("a gradient for every parameter")));
    }
}

/// Layers, each of which adds to its input, forward and backward with and without gradient checkpointing: all numbers are the same to the bit, and
/// the peak memory is at most `share` of what it is without.
fn checkpointing_saves<M: Module>(
    name: &str,
    share: f64,
    layer: impl Fn(&Device) -> M,
    forward: impl Fn(&M, Tensor<2>) -> Tensor<2>,
) {
    const LAYERS: usize = 8;
    const TOKENS: usize = 2048;
    let plain = Device::default();
    let layers: Vec<M> = (0..LAYERS).map(|_| layer(&plain)).collect();
    let x = Tensor::<2>::random([TOKENS, D_MODEL], Distribution::Normal(0.0, 1.0), &plain).into_data();
    let run = |device: Device| {
        let layers = layers.clone().map(&mut On(&device));
        let x = Tensor::<2>::from_data(x.clone(), &device).require_grad();
        let step = || {
            let output = layers.iter().fold(x.clone(), |x, layer| x.clone() + forward(layer, x));
            (output.clone().detach(), output.square().sum().backward())
        };
        // Thread pools are not the layers'.
        drop(step());
        let (peak, (output, gradients)) = peak_of(step);
        let mut of_parameters = GradientBits(&gradients, Vec::new());
        layers.visit(&mut of_parameters);
        (peak, (bits(output), bits(x.grad(&gradients).unwrap()), of_parameters.1))
    };
    let device = Device::default().autodiff();
    let (with, numbers_with) = run(device.clone().gradient_checkpointing());
    let (without, numbers_without) = run(device);
    println!("{name}: {:.1} MB, with checkpointing {:.1} MB, {:.2}", without / 1e6, with / 1e6, with / without);
    assert!(numbers_with == numbers_without, "{name}: other numbers with checkpointing");
    assert!(with < share * without, "{name}: {with} bytes with checkpointing, {without} without");
}

#[test]
fn gradient_checkpointing_saves_memory_and_changes_no_bit() {
    let _turn = alone();
    let burns = PositionWiseFeedForwardConfig::new(D_MODEL, D_FF).with_dropout(0.0);
    checkpointing_saves("burn's own", 0.7, |device| burns.init(device), |layer, x| layer.forward(x));
    let mlp = MlpConfig::new(D_MODEL, D_FF);
    checkpointing_saves("dense", 0.7, |device| mlp.init(device), |layer, x| layer.forward(x));
    for (name, experts) in [("experts", ExpertOptions::new()), ("gated experts", ExpertOptions::swiglu())] {
        let capacity = Capacity::Dropless;
        let assignment = TokenChoiceConfig::new().with_training_capacity(capacity).with_inference_capacity(capacity);
        let moe = MoeFeedForwardConfig::new(D_MODEL, D_FF, EXPERTS).with_assignment(assignment.into()).with_experts(experts);
        checkpointing_saves(name, 0.7, |device| moe.init(device), |layer, x| layer.forward(x).output);
    }
}

/// Evaluation at the size of a large data set: a matrix of all similarities would take 40 GB. By itself, as it takes minutes:
/// `cargo test --release --test memory -- --ignored --nocapture`.
#[cfg(feature = "clip")]
#[test]
#[ignore = "takes minutes"]
fn retrieval_among_100_000_images_stays_in_memory() {
    const COUNT: usize = 100_000;
    let _turn = alone();
    let device = Device::default();
    let random = || Tensor::<2>::random([COUNT, 512], Distribution::Normal(0.0, 1.0), &device);
    let images = random();
    // A text is its image and about twice as much noise.
    let texts = images.clone() + random() * 2.0;
    let own: Vec<usize> = (0..COUNT).collect();
    let start = std::time::Instant::now();
    let (peak, metrics) = peak_of(|| burn_moe::clip::RetrievalMetrics::new(images, texts, &own).unwrap());
    println!("{:.0} MB, {:.0} s, T2I R@1 {:.4}", peak / 1e6, start.elapsed().as_secs_f64(), metrics.text_to_image.r1);
    // Both sets of embeddings once more, normalised, and a block of similarities.
    assert!(peak < 2.5 * bytes(COUNT * 512), "{peak} bytes");
    assert!(metrics.text_to_image.r1 > 0.9);
}
