//! What more experts cost at equal active operations, and what more tokens cost per token.
//!
//! ```sh
//! cargo bench --bench scaling
//! ```
//!
//! `ratio scaling/experts/E/PASS` is the time with `E` experts over the time with 8 (T 8192, D 256, F 1024); `ratio scaling/tokens/T/PASS`
//! is the time per token of `T` tokens over that of 8192 (8 experts).

mod support;

use burn::module::Module;
use burn::tensor::Tensor;
use burn_moe::{Capacity, MoeFeedForward};
use criterion::{Criterion, criterion_group, criterion_main};
use support::{EXPERTS, Load, assert_load, backward, device, finish, paired, sparse_layer, tokens};

const TOKENS: usize = 8192;
const D_MODEL: usize = 256;
const D_FF: usize = 1024;

fn compare(
    criterion: &mut Criterion,
    name: &str,
    scale: f64,
    base: (&MoeFeedForward, &Tensor<2>),
    ours: (&MoeFeedForward, &Tensor<2>),
) {
    let device = base.1.device();
    let forward = |layer: &MoeFeedForward, x: &Tensor<2>| finish(|| layer.forward(x.clone()).output, &device);
    let both =
        |layer: &MoeFeedForward, x: &Tensor<2>| backward(|| layer.forward(x.clone().autodiff().require_grad()).output, &device);
    let (base_valid, ours_valid) = (base.0.valid(), ours.0.valid());
    let mut pass = |pass, base: &mut dyn FnMut() -> f64, ours: &mut dyn FnMut() -> f64| {
        paired(criterion, &format!("{name}/{pass}"), scale, None, base, ours);
    };
    pass("forward", &mut || forward(&base_valid, base.1), &mut || forward(&ours_valid, ours.1));
    pass("forward-backward", &mut || both(base.0, base.1), &mut || both(ours.0, ours.1));
}

fn scaling(criterion: &mut Criterion) {
    let inner = device();
    let device = inner.clone().autodiff();
    let layer = |experts| sparse_layer(D_MODEL, D_FF, experts, Capacity::Dropless, &device);
    let input = |num_tokens, experts| tokens(num_tokens, D_MODEL, experts, Load::Even, &inner);
    let (base, base_x) = (layer(EXPERTS), input(TOKENS, EXPERTS));
    for experts in [16, 32, 64, 128] {
        let (ours, x) = (layer(experts), input(TOKENS, experts));
        assert_load(&ours.valid(), &x, Load::Even);
        compare(criterion, &format!("scaling/experts/{experts}"), 1.0, (&base, &base_x), (&ours, &x));
    }
    for num_tokens in [256, 1024, 4096, 16384, 65536] {
        let x = input(num_tokens, EXPERTS);
        let per_token = TOKENS as f64 / num_tokens as f64;
        compare(criterion, &format!("scaling/tokens/{num_tokens}"), per_token, (&base, &base_x), (&base, &x));
    }
}

criterion_group!(benches, scaling);
criterion_main!(benches);
