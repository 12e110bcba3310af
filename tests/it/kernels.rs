//! Every kernel against plain tensor operations: outputs, and all gradients.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use burn_moe::{
    Activation, Capacity, ExpertChoiceConfig, ExpertOptions, FeedForwardForm, MoeFeedForwardConfig, MoeInput, RouterOptions,
    TokenChoiceConfig,
    kernels::{Kernels, with_kernels},
    transformer::{Mlp, MlpConfig},
};

use super::{
    outcome::{Outcome, assert_same, biased_router, run_layer},
    support::{largest_difference, mask, numbers, values},
};

const ACTIVATIONS: [Activation; 4] = [Activation::Gelu, Activation::QuickGelu, Activation::Relu, Activation::Silu];

#[test]
fn the_layer_and_its_gradients_do_not_depend_on_the_kernels() {
    let device = Device::default().autodiff();
    let sizes = [(1, 4, 8, 2), (7, 3, 5, 3), (64, 16, 64, 8), (257, 24, 40, 5), (33, 130, 200, 4)];
    for (i, (t, d, f, e)) in sizes.into_iter().enumerate() {
        for capacity in [Capacity::Dropless, Capacity::OfTokens(1.3), Capacity::Fixed(2)] {
            for (bias, skewed) in [(true, false), (false, false), (true, true)] {
                let activation = ACTIVATIONS[i % ACTIVATIONS.len()];
                let assignment = TokenChoiceConfig::new().with_training_capacity(capacity);
                let experts = ExpertOptions::new().with_bias(bias).with_activation(activation);
                let layer =
                    MoeFeedForwardConfig::new(d, f, e).with_assignment(assignment.into()).with_experts(experts).init(&device);
                let layer = if skewed { biased_router(layer) } else { layer };
                let x = if skewed { numbers([t, d], 3, &device).abs() } else { numbers([t, d], 3, &device) };
                let valid: Vec<bool> = (0..t).map(|t| t % 5 != 4).collect();
                let [fast, reference] = [Kernels::Fastest, Kernels::Reference].map(|k| run_layer(&layer, &x, &valid, k));
                assert_same(&fast, &reference, 1e-5, &format!("T {t} D {d} F {f} E {e} {capacity:?} bias {bias} skewed {skewed}"));
            }
        }
    }
}

#[test]
fn gated_and_shared_experts_and_expert_choice_do_not_depend_on_the_kernels() {
    let device = Device::default().autodiff();
    let config = MoeFeedForwardConfig::new(10, 24, 4);
    let clamped = ExpertOptions::swiglu().with_form(FeedForwardForm::ClampedGated { limit: 0.4, alpha: 1.702 });
    let cases = [
        config.clone().with_experts(ExpertOptions::swiglu()).with_shared_expert(Some(12)),
        config.clone().with_experts(ExpertOptions::geglu()),
        config.clone().with_experts(clamped).with_router(RouterOptions::new().with_bias(true)),
        config.clone().with_shared_expert(Some(12)).with_shared_expert_gate(true),
        config.with_assignment(ExpertChoiceConfig::new().into()),
    ];
    for config in cases {
        let layer = config.init(&device);
        let x = numbers([50, 10], 3, &device);
        let valid: Vec<bool> = (0..50).map(|t| t % 7 != 6).collect();
        let run = |kernels| {
            let mut outcome = run_layer(&layer, &x, &valid, kernels);
            // What `run_layer` does not look at, for a loss of another kind.
            with_kernels(kernels, || {
                let input = MoeInput::new(x.clone()).valid(mask(&valid, &device));
                let grads = layer.forward(input).output.square().sum().backward();
                let shared = layer.shared_expert.as_ref().and_then(|shared| shared.w_in.val().grad(&grads));
                outcome.extend(shared.map(|g| ("shared w_in", values(&g))));
            });
            outcome
        };
        assert_same(&run(Kernels::Fastest), &run(Kernels::Reference), 1e-5, &format!("{layer}"));
    }
}

#[test]
fn strided_input_is_read_in_its_own_order() {
    let device = Device::default().autodiff();
    let layer = MoeFeedForwardConfig::new(6, 12, 3).init(&device);
    let x = numbers([6, 20], 1, &device).transpose();
    let copy = Tensor::<2>::from_data(x.to_data(), &device);
    let [strided, contiguous] = [x, copy].map(|x| run_layer(&layer, &x, &[true; 20], Kernels::Fastest));
    assert_same(&strided, &contiguous, 1e-5, "transposed input");
}

#[test]
fn frozen_weights_get_no_gradient_and_the_input_still_does() {
    let device = Device::default().autodiff();
    let layer = MoeFeedForwardConfig::new(6, 12, 3).init(&device).freeze();
    let x = numbers([20, 6], 1, &device);
    let [fast, reference] = [Kernels::Fastest, Kernels::Reference].map(|k| run_layer(&layer, &x, &[true; 20], k));
    assert_eq!(fast.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["output", "x"]);
    assert_same(&fast, &reference, 1e-5, "frozen");
}

fn run_mlp(mlp: &Mlp, x: &Tensor<3>, kernels: Kernels) -> Outcome {
    with_kernels(kernels, || {
        let x = x.clone().require_grad();
        let output = mlp.forward(x.clone());
        let grads = (output.clone() * numbers(output.dims(), 9, &output.device())).sum().backward();
        vec![
            ("output", values(&output)),
            ("x", values(&x.grad(&grads).unwrap())),
            ("w_in", values(&mlp.linear_in.weight.val().grad(&grads).unwrap())),
            ("b_in", values(&mlp.linear_in.bias.as_ref().unwrap().val().grad(&grads).unwrap())),
            ("w_out", values(&mlp.linear_out.weight.val().grad(&grads).unwrap())),
            ("b_out", values(&mlp.linear_out.bias.as_ref().unwrap().val().grad(&grads).unwrap())),
        ]
    })
}

#[test]
fn the_dense_network_and_its_gradients_do_not_depend_on_the_kernels() {
    let device = Device::default().autodiff();
    for activation in ACTIVATIONS {
        let mlp = MlpConfig::new(20, 70).with_activation(activation).init(&device);
        let x = numbers([3, 90, 20], 5, &device) * 3.0;
        let [fast, reference] = [Kernels::Fastest, Kernels::Reference].map(|k| run_mlp(&mlp, &x, k));
        assert_same(&fast, &reference, 1e-5, &format!("{activation:?}"));
    }
}

#[test]
fn the_activation_alone_does_not_depend_on_the_kernels() {
    let device = Device::default().autodiff();
    for activation in ACTIVATIONS {
        let [fast, reference] = [Kernels::Fastest, Kernels::Reference].map(|kernels| {
            with_kernels(kernels, || {
                let x = (numbers([5, 7, 11], 2, &device) * 6.0).swap_dims(0, 2).require_grad();
                let y = activation.forward(x.clone());
                let grads = (y.clone() * numbers(y.dims(), 4, &device)).sum().backward();
                vec![("output", values(&y)), ("x", values(&x.grad(&grads).unwrap()))]
            })
        });
        assert_same(&fast, &reference, 1e-5, &format!("{activation:?}"));
    }
}

#[test]
fn other_number_types_take_the_reference() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(6, 12, 3).init(&device);
    let x = numbers([20, 6], 1, &device);
    let single = values(&layer.forward(x.clone()).output);
    let wide = layer.map(&mut ToF64).forward(x.cast(burn::tensor::DType::F64)).output;
    assert_eq!(wide.dtype(), burn::tensor::DType::F64);
    assert!(largest_difference(&values(&wide.cast(burn::tensor::DType::F32)), &single) < 1e-5);
}

struct ToF64;

impl burn::module::ModuleMapper for ToF64 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value.cast(burn::tensor::DType::F64))
    }
}
