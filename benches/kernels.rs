//! Dispatch, combine, the experts and the whole layer, beside what the device reaches with a plain copy and a plain matrix product of the same run.
//!
//! ```sh
//! cargo bench --bench kernels
//! BURN_MOE_DEVICE=cuda BURN_MOE_DTYPE=bf16 BURN_MOE_BATCH=64 cargo bench --no-default-features --features flex,cuda,fusion --bench kernels
//! ```
//!
//! `share kernels/SHAPE/OPERATION` is the operation's bytes a second over those of a copy (for `experts` and `layer`, operations a second over those of a
//! matrix product). Bytes are those that must move: every row read once and written once, and the output of each token.

mod support;

use burn::tensor::{Distribution, Tensor};
use burn_moe::{
    AssignmentConfig, Capacity, TokenChoiceConfig,
    routing::{AssignmentInput, Dispatcher, Phase},
};
use criterion::{Criterion, criterion_group, criterion_main};
use support::{EXPERTS, Load, TOP_K, backward, device, finish, median_seconds, shapes, sparse_layer, tokens};

fn kernels(criterion: &mut Criterion) {
    let inner = device();
    let tracked_device = inner.clone().autodiff();
    for shape in shapes() {
        let x = tokens(shape.tokens, shape.d_model, EXPERTS, Load::Even, &inner);
        let size = x.dtype().size();
        let token_bytes = (shape.tokens * shape.d_model * size) as f64;
        let row_bytes = TOP_K as f64 * token_bytes;
        let name = |operation: &str| format!("kernels/{}/{operation}", shape.name);

        // As many bytes as a dispatch moves.
        let rows = Tensor::<2>::random([TOP_K * shape.tokens, shape.d_model], Distribution::Default, &inner);
        let copied = median_seconds(criterion, &name("copy"), &mut || finish(|| rows.clone() + 1.0, &inner));
        let copy_rate = copied.map(|seconds| 2.0 * row_bytes / seconds);
        if let Some(rate) = copy_rate {
            println!("gigabytes {} {:.1}", name("copy"), rate / 1e9);
        }

        let scores = x.clone().slice([0..shape.tokens, 0..EXPERTS]).cast(burn::tensor::DType::F32);
        let config = TokenChoiceConfig::new().with_inference_capacity(Capacity::Dropless);
        let plan = AssignmentConfig::from(config).assign(&AssignmentInput::new(scores, Phase::Inference));
        let dispatcher = Dispatcher::new(&plan, &x);
        let (tracked_x, tracked_rows) = (x.clone().autodiff().require_grad(), rows.clone().autodiff().require_grad());
        let report = |operation: &str, bytes: f64, seconds: Option<f64>| {
            let Some(seconds) = seconds else { return };
            println!("gigabytes {} {:.1}", name(operation), bytes / seconds / 1e9);
            if let Some(rate) = copy_rate {
                println!("share {} {:.3}", name(operation), bytes / seconds / rate);
            }
        };
        let seconds = median_seconds(criterion, &name("dispatch"), &mut || finish(|| dispatcher.dispatch(x.clone()), &inner));
        report("dispatch", token_bytes + row_bytes, seconds);
        let seconds = median_seconds(criterion, &name("combine"), &mut || finish(|| dispatcher.combine(rows.clone()), &inner));
        report("combine", token_bytes + row_bytes, seconds);
        // The forward pass, a gradient of ones, and the backward pass: three times the bytes, one third of them written only.
        let mut there_and_back = || backward(|| dispatcher.dispatch(tracked_x.clone()), &tracked_device);
        let seconds = median_seconds(criterion, &name("dispatch-backward"), &mut there_and_back);
        report("dispatch-backward", 2.0 * (token_bytes + row_bytes) + row_bytes, seconds);
        let mut there_and_back = || backward(|| dispatcher.combine(tracked_rows.clone()), &tracked_device);
        let seconds = median_seconds(criterion, &name("combine-backward"), &mut there_and_back);
        report("combine-backward", 2.0 * (token_bytes + row_bytes) + token_bytes, seconds);

        // Both passes of the experts and of the whole layer; both passes have three times the operations of the forward pass.
        let layer = sparse_layer(shape.d_model, shape.d_ff, EXPERTS, Capacity::Dropless, &inner);
        let tracked_layer = sparse_layer(shape.d_model, shape.d_ff, EXPERTS, Capacity::Dropless, &tracked_device);
        let by_expert = [EXPERTS, TOP_K * shape.tokens / EXPERTS, shape.d_model];
        let slots = rows.reshape(by_expert);
        let experts = || layer.experts.forward(slots.clone()).flatten::<2>(0, 1);
        let tracked_experts = || tracked_layer.experts.forward(tracked_rows.clone().reshape(by_expert)).flatten::<2>(0, 1);
        let tracked_x = x.clone().autodiff().require_grad();
        let passes: [(&str, f64, &dyn Fn() -> f64); 4] = [
            ("experts", 1.0, &|| finish(experts, &inner)),
            ("experts-backward", 3.0, &|| backward(tracked_experts, &tracked_device)),
            ("layer", 1.0, &|| finish(|| layer.forward(x.clone()).output, &inner)),
            ("layer-backward", 3.0, &|| backward(|| tracked_layer.forward(tracked_x.clone()).output, &tracked_device)),
        ];
        let mut rates = Vec::new();
        for (operation, times, pass) in passes {
            if let Some(seconds) = median_seconds(criterion, &name(operation), &mut || pass()) {
                let rate = times * shape.flops() / seconds;
                println!("time {} {:.3}", name(operation), 1e3 * seconds);
                println!("teraflops {} {:.2}", name(operation), rate / 1e12);
                rates.push((operation, rate));
            }
        }
        // burn tunes it first, which may take longer than all the rest.
        let [lhs, rhs] = [[TOP_K * shape.tokens, shape.d_model], [shape.d_model, shape.d_ff]]
            .map(|dims| Tensor::<2>::random(dims, Distribution::Default, &inner));
        let mut product = || finish(|| lhs.clone().matmul(rhs.clone()), &inner);
        if let Some(seconds) = median_seconds(criterion, &name("matmul"), &mut product) {
            let product_rate = shape.flops() / 2.0 / seconds;
            println!("teraflops {} {:.2}", name("matmul"), product_rate / 1e12);
            for (operation, rate) in rates {
                println!("share {} {:.3}", name(operation), rate / product_rate);
            }
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
