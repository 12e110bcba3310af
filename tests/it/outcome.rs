//! What a layer makes of an input, and of a gradient.

use burn::module::Param;
use burn::tensor::Tensor;
use burn_moe::{
    MoeFeedForward, MoeInput,
    kernels::{Kernels, with_kernels},
};

use super::support::{largest_difference, mask, numbers, values};

/// Output and gradients by name, of `Σ output · cotangent`.
pub(crate) type Outcome = Vec<(&'static str, Vec<f32>)>;

/// Up to `tolerance` of the largest value of each tensor, and of 1.
pub(crate) fn assert_same(fast: &Outcome, reference: &Outcome, tolerance: f32, case: &str) {
    assert_eq!(fast.len(), reference.len());
    for ((name, fast), (_, reference)) in fast.iter().zip(reference) {
        let scale = reference.iter().fold(1.0f32, |max, v| max.max(v.abs()));
        let difference = largest_difference(fast, reference) / scale;
        assert!(difference < tolerance, "{case}: {name} differs by {difference:e}");
    }
}

pub(crate) fn run_layer(layer: &MoeFeedForward, x: &Tensor<2>, valid: &[bool], kernels: Kernels) -> Outcome {
    with_kernels(kernels, || {
        let x = x.clone().require_grad();
        let output = layer.forward(MoeInput::new(x.clone()).valid(mask(valid, &x.device()))).output;
        let grads = (output.clone() * numbers(output.dims(), 9, &output.device()).cast(output.dtype())).sum().backward();
        let gradient = |name, gradient: Option<Vec<f32>>| gradient.map(|values| (name, values));
        let of2 = |p: &Param<Tensor<2>>| p.val().grad(&grads).map(|g| values(&g));
        let of3 = |p: &Param<Tensor<3>>| p.val().grad(&grads).map(|g| values(&g));
        let experts = &layer.experts;
        let mut outcome = vec![("output", values(&output))];
        outcome.extend(gradient("x", x.grad(&grads).map(|g| values(&g))));
        outcome.extend(gradient("router", of2(&layer.router.weight)));
        let router_bias = layer.router.bias.as_ref().and_then(|bias| bias.val().grad(&grads));
        outcome.extend(gradient("router_bias", router_bias.map(|g| values(&g))));
        outcome.extend(gradient("shared_expert_gate", layer.shared_expert_gate.as_ref().and_then(of2)));
        outcome.extend(gradient("w_in", of3(&experts.w_in)));
        outcome.extend(gradient("b_in", experts.b_in.as_ref().and_then(of2)));
        outcome.extend(gradient("w_gate", experts.w_gate.as_ref().and_then(of3)));
        outcome.extend(gradient("b_gate", experts.b_gate.as_ref().and_then(of2)));
        outcome.extend(gradient("w_out", of3(&experts.w_out)));
        outcome.extend(gradient("b_out", experts.b_out.as_ref().and_then(of2)));
        outcome
    })
}

/// Scores that send every token to the same experts.
pub(crate) fn biased_router(mut layer: MoeFeedForward) -> MoeFeedForward {
    let [d, e] = layer.router.weight.shape().dims();
    let rows: Vec<f32> = (0..d * e).map(|i| 3.0 * (i % e) as f32).collect();
    let weight = Tensor::<1>::from_floats(&rows[..], &layer.router.weight.device()).reshape([d, e]);
    layer.router.weight = Param::from_tensor(weight);
    layer
}
