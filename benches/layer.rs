//! The sparse layer against burn's own dense feed-forward network of equal active operations (`F' = K · F`), timed in turn.
//!
//! ```sh
//! cargo bench --bench layer             # about ten minutes on two cores
//! cargo bench --bench layer -- b16-text # one shape
//! ```
//!
//! `ratio layer/SHAPE/CAPACITY/LOAD/PASS` is our time over burn's; `own-dense` in place of the capacity is this crate's dense network over
//! burn's. `gflops` lines stand beside the rate of a plain matrix product of the same run.

mod support;

use burn::module::Module;
use burn::nn::{Gelu, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use burn_moe::{Capacity, transformer::MlpConfig};
use criterion::{Criterion, criterion_group, criterion_main};
use support::{
    EXPERTS, Load, Shape, TOP_K, assert_load, backward, device, finish, paired, print_peak, shapes, sparse_layer, tokens,
};

/// burn's dense network.
#[derive(Module, Debug)]
struct Dense {
    linear_in: Linear,
    linear_out: Linear,
    gelu: Gelu,
}

impl Dense {
    fn new(shape: Shape, device: &Device) -> Self {
        let hidden = TOP_K * shape.d_ff;
        Self {
            linear_in: LinearConfig::new(shape.d_model, hidden).init(device),
            linear_out: LinearConfig::new(hidden, shape.d_model).init(device),
            gelu: Gelu::new(),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.linear_out.forward(self.gelu.forward(self.linear_in.forward(x)))
    }
}

/// Both passes of `ours` against `dense`, as `NAME/forward` and `NAME/forward-backward`.
fn both_passes<M: Module>(
    criterion: &mut Criterion,
    name: &str,
    flops: f64,
    x: &Tensor<2>,
    dense: &Dense,
    ours: &M,
    forward: fn(&M, Tensor<2>) -> Tensor<2>,
) {
    let device = x.device();
    let tracked = x.clone().autodiff().require_grad();
    let (dense_valid, ours_valid) = (dense.valid(), ours.valid());
    paired(
        criterion,
        &format!("{name}/forward"),
        1.0,
        Some(flops),
        &mut || finish(|| dense_valid.forward(x.clone()), &device),
        &mut || finish(|| forward(&ours_valid, x.clone()), &device),
    );
    paired(
        criterion,
        &format!("{name}/forward-backward"),
        1.0,
        Some(3.0 * flops),
        &mut || backward(|| dense.forward(tracked.clone()), &device),
        &mut || backward(|| forward(ours, tracked.clone()), &device),
    );
}

fn layer(criterion: &mut Criterion) {
    let inner = device();
    let device = inner.clone().autodiff();
    for shape in shapes() {
        print_peak(shape.tokens, shape.d_model, TOP_K * shape.d_ff, &inner);
        let dense = Dense::new(shape, &device);
        let x = tokens(shape.tokens, shape.d_model, EXPERTS, Load::Even, &inner);
        let own = MlpConfig::new(shape.d_model, TOP_K * shape.d_ff).init(&device);
        let name = format!("layer/{}/own-dense", shape.name);
        both_passes(criterion, &name, shape.flops(), &x, &dense, &own, |own, x| own.forward(x));
        for (capacity_name, capacity) in [("capacity", Capacity::OfTokens(2.0)), ("dropless", Capacity::Dropless)] {
            let sparse = sparse_layer(shape.d_model, shape.d_ff, EXPERTS, capacity, &device);
            for load in Load::ALL {
                let x = tokens(shape.tokens, shape.d_model, EXPERTS, load, &inner);
                assert_load(&sparse.valid(), &x, load);
                let name = format!("layer/{}/{capacity_name}/{}", shape.name, load.name());
                both_passes(criterion, &name, shape.flops(), &x, &dense, &sparse, |sparse, x| sparse.forward(x).output);
            }
        }
    }
}

criterion_group!(benches, layer);
criterion_main!(benches);
