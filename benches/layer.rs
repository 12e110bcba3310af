//! The sparse layer against a dense feed-forward network of equal active operations (`F' = K · F`), in the same run.
//!
//! ```sh
//! cargo bench --bench layer
//! ```

use std::hint::black_box;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use burn_moe::{Capacity, MlpConfig, MoeFeedForwardConfig, TokenChoiceConfig};
use criterion::{Criterion, criterion_group, criterion_main};

const TOKENS: usize = 2048;
const D_MODEL: usize = 256;
const D_FF: usize = 1024;

fn layer(criterion: &mut Criterion) {
    let device = Device::default().autodiff();
    let dense = MlpConfig::new(D_MODEL, 2 * D_FF).init(&device);
    let sparse = |capacity| {
        let assignment = TokenChoiceConfig::new().with_training_capacity(capacity).with_inference_capacity(capacity);
        MoeFeedForwardConfig::new(D_MODEL, D_FF, 8).with_assignment(assignment.into()).init(&device)
    };
    let x = Tensor::<2>::random([TOKENS, D_MODEL], Distribution::Normal(0.0, 1.0), &device);

    let mut group = criterion.benchmark_group("layer");
    group.sample_size(10);
    let mut measure = |name: &str, forward: &dyn Fn(Tensor<2>) -> Tensor<2>, backward: bool| {
        let x = if backward { x.clone().require_grad() } else { x.clone().inner() };
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let y = forward(x.clone());
                if backward {
                    black_box(y.sum().backward());
                } else {
                    black_box(y);
                }
                device.sync().expect("the device is there");
            });
        });
    };
    let valid = dense.valid();
    measure("dense/forward", &|x| valid.forward(x), false);
    measure("dense/forward-backward", &|x| dense.forward(x), true);
    for (name, capacity) in [("balanced", Capacity::OfTokens(2.0)), ("dropless", Capacity::Dropless)] {
        let moe = sparse(capacity);
        let valid = moe.valid();
        measure(&format!("{name}/forward"), &|x| valid.forward(x).output, false);
        measure(&format!("{name}/forward-backward"), &|x| moe.forward(x).output, true);
    }
    group.finish();
}

criterion_group!(benches, layer);
criterion_main!(benches);
