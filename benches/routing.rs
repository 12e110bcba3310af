//! Everything but the experts: scoring, slot assignment, dispatch and combine, as a share of the layer's time.
//!
//! ```sh
//! cargo bench --bench routing
//! ```
//!
//! The share is the time of the same layer with experts of hidden width 1 over the time of the whole layer: an upper bound, as what is
//! left of those experts counts as routing.

mod support;

use burn::module::Module;
use burn_moe::Capacity;
use criterion::{Criterion, criterion_group, criterion_main};
use support::{EXPERTS, Load, assert_load, backward, device, finish, paired, shapes, sparse_layer, tokens};

fn routing(criterion: &mut Criterion) {
    let inner = device();
    let device = inner.clone().autodiff();
    for shape in shapes() {
        let x = tokens(shape.tokens, shape.d_model, EXPERTS, Load::Even, &inner);
        let tracked = x.clone().autodiff().require_grad();
        for (name, capacity) in [("capacity", Capacity::OfTokens(2.0)), ("dropless", Capacity::Dropless)] {
            let layer = |d_ff| sparse_layer(shape.d_model, d_ff, EXPERTS, capacity, &device);
            let (whole, rest) = (layer(shape.d_ff), layer(1));
            let (whole_valid, rest_valid) = (whole.valid(), rest.valid());
            assert_load(&rest_valid, &x, Load::Even);
            paired(
                criterion,
                &format!("routing/{}/{name}/forward", shape.name),
                1.0,
                None,
                &mut || finish(|| whole_valid.forward(x.clone()).output, &inner),
                &mut || finish(|| rest_valid.forward(x.clone()).output, &inner),
            );
            paired(
                criterion,
                &format!("routing/{}/{name}/forward-backward", shape.name),
                1.0,
                None,
                &mut || backward(|| whole.forward(tracked.clone()).output, &device),
                &mut || backward(|| rest.forward(tracked.clone()).output, &device),
            );
        }
    }
}

criterion_group!(benches, routing);
criterion_main!(benches);
