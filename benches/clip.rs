//! A sparse ViT-B/16 CLIP against the dense one, forward, batch 8; and embeddings alone against whole forward passes of the towers.
//!
//! ```sh
//! cargo bench --bench clip
//! ```

mod support;

use burn::tensor::{Distribution, Int, Tensor};
use burn_moe::clip::{Clip, ClipConfig, SparseClipConfig};
use criterion::{Criterion, criterion_group, criterion_main};
use support::{device, finish, paired};

const BATCH: usize = 8;

fn clip(criterion: &mut Criterion) {
    let device = device();
    let dense = ClipConfig::vit_b_16();
    let sparse = dense.clone().sparse(SparseClipConfig::clip_up());
    println!("FLOP ratio of sparse over dense: {:.3}", sparse.cost().gflops() / dense.cost().gflops());
    let images = Tensor::<4>::random([BATCH, 3, 224, 224], Distribution::Normal(0.0, 1.0), &device);
    // Captions that fill the context: the end-of-text token, CLIP's largest, in the last place.
    let text: Vec<i64> = (0..BATCH).flat_map(|_| (1..77).chain([49407])).collect();
    let text = Tensor::<1, Int>::from_ints(&text[..], &device).reshape([BATCH, 77]);
    let flops = 1e9 * BATCH as f64 * sparse.cost().gflops();
    let (dense, sparse) = (dense.init(&device), sparse.init(&device));
    let run = |model: &Clip| finish(|| model.forward(images.clone(), text.clone()).logits_per_image, &device);
    paired(criterion, "clip/b16/forward", 1.0, Some(flops), &mut || run(&dense), &mut || run(&sparse));

    // Captions of 5 to 15 words, about as many tokens, with start and end.
    let short: Vec<i64> = (0..64)
        .flat_map(|i| {
            (0..77).map(move |place| if place > 6 + i * 7 % 11 { 49407 * i64::from(place == 7 + i * 7 % 11) } else { 1 + place })
        })
        .collect();
    let short = Tensor::<1, Int>::from_ints(&short[..], &device).reshape([64, 77]);
    for (name, model) in [("dense", &dense), ("sparse", &sparse)] {
        for batch in [1, 8] {
            let images = images.clone().narrow(0, 0, batch);
            let [mut all, mut alone]: [Box<dyn FnMut() -> f64>; 2] = [
                Box::new(|| finish(|| model.vision.forward(images.clone()).embedding, &device)),
                Box::new(|| finish(|| model.vision.embedding(images.clone()), &device)),
            ];
            paired(criterion, &format!("clip/b16/{name}/image-{batch}"), 1.0, None, &mut all, &mut alone);
        }
        for (kind, text, batch) in [("full", &text, 1), ("full", &text, 8), ("short", &short, 1), ("short", &short, 64)] {
            let text = text.clone().narrow(0, 0, batch);
            let [mut all, mut alone]: [Box<dyn FnMut() -> f64>; 2] = [
                Box::new(|| finish(|| model.text.forward(text.clone()).embedding, &device)),
                Box::new(|| finish(|| model.text.embedding(text.clone()), &device)),
            ];
            paired(criterion, &format!("clip/b16/{name}/text-{kind}-{batch}"), 1.0, None, &mut all, &mut alone);
        }
    }
}

criterion_group!(benches, clip);
criterion_main!(benches);
