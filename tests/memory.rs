//! The layer's peak memory: what it needs and no more. A `[T, E, C]` tensor alone would take four times the larger bound here.
//!
//! A binary of its own, because the allocator counts for the whole process.

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use burn_moe::{Capacity, MoeFeedForward, MoeFeedForwardConfig, TokenChoiceConfig};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const TOKENS: usize = 4096;
const D_MODEL: usize = 64;
const D_FF: usize = 256;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

/// Bytes above the present level that `body` needed at its worst.
fn peak_of<R>(body: impl FnOnce() -> R) -> (f64, R) {
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
    // Kept: rows in and out, hidden before and after the activation. On top of them a hidden gradient, and each parameter's gradient.
    let bound = 2.0 * row + 3.0 * hidden + token + bytes(parameters) + routing;
    println!("forward and backward: {:.1} MB, bound {:.1} MB", training / 1e6, bound / 1e6);
    assert!(training < bound, "forward and backward took {training}, more than {bound}");
}

/// Evaluation at the size of a large data set: a matrix of all similarities would take 40 GB. By itself, as it takes minutes:
/// `cargo test --release --test memory -- --ignored --nocapture`.
#[cfg(feature = "clip")]
#[test]
#[ignore = "takes minutes"]
fn retrieval_among_100_000_images_stays_in_memory() {
    const COUNT: usize = 100_000;
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
