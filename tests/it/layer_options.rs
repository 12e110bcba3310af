//! Options that published layers brought: values by hand, and gradients by finite differences.

use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use burn_moe::{
    ExpertGroups, ExpertOptions, FeedForwardForm, GateNormalization, MoeFeedForward, MoeFeedForwardConfig, RouterOptions,
    RouterScore, TokenChoiceConfig,
};

use super::support::{largest_difference, numbers, values};

const LIMIT: f64 = 0.5;
const ALPHA: f64 = 1.3;

/// All of them in one layer, with weights large enough that limits matter.
fn layer(device: &Device) -> MoeFeedForward {
    let choice = TokenChoiceConfig::new().with_gate_scale(2.5).with_expert_groups(Some(ExpertGroups::new(2, 1)));
    let choice = choice.with_training_capacity(burn_moe::Capacity::Dropless);
    let experts = ExpertOptions::swiglu().with_form(FeedForwardForm::ClampedGated { limit: LIMIT, alpha: ALPHA });
    let config = MoeFeedForwardConfig::new(3, 5, 4)
        .with_router(RouterOptions::new().with_score(RouterScore::Sigmoid).with_bias(true))
        .with_assignment(choice.into())
        .with_experts(experts)
        .with_shared_expert(Some(6))
        .with_shared_expert_gate(true);
    let mut layer = config.init(device);
    layer.router.weight = Param::from_tensor(numbers([3, 4], 1, device) * 2.0);
    layer.router.bias = Some(Param::from_tensor(numbers([4], 2, device)));
    // The same in every run, so that the same steps pass a limit.
    let fill = |experts: &mut burn_moe::ExpertMlp, seed| {
        let weight = |param: &Param<Tensor<3>>, seed| Param::from_tensor(numbers(param.val().dims(), seed, device));
        let bias = |param: &Option<Param<Tensor<2>>>, seed| {
            param.as_ref().map(|param| Param::from_tensor(numbers(param.val().dims(), seed, device)))
        };
        experts.w_in = weight(&experts.w_in, seed);
        experts.w_gate = experts.w_gate.as_ref().map(|w_gate| weight(w_gate, seed + 1));
        experts.w_out = weight(&experts.w_out, seed + 2);
        (experts.b_in, experts.b_gate) = (bias(&experts.b_in, seed + 3), bias(&experts.b_gate, seed + 4));
        experts.b_out = bias(&experts.b_out, seed + 5);
    };
    fill(&mut layer.experts, 20);
    fill(layer.shared_expert.as_mut().expect("it was asked for"), 30);
    layer.shared_expert_gate = Some(Param::from_tensor(numbers([3, 1], 3, device)));
    layer
}

fn rows<const D: usize>(tensor: &Tensor<D>, width: usize) -> Vec<Vec<f64>> {
    values(tensor).chunks(width).map(|row| row.iter().map(|&value| f64::from(value)).collect()).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `x · W[e] + b[e]` of `[E, D, F]` and `[E, F]`.
fn linear(x: &[f64], weight: &Param<Tensor<3>>, bias: &Option<Param<Tensor<2>>>, expert: usize) -> Vec<f64> {
    let [_, d_in, d_out] = weight.val().dims();
    let weight = &rows(&weight.val(), d_out)[expert * d_in..];
    let bias = &rows(&bias.as_ref().unwrap().val(), d_out)[expert];
    (0..d_out).map(|f| bias[f] + x.iter().zip(weight).map(|(x, row)| x * row[f]).sum::<f64>()).collect()
}

fn expert_by_hand(experts: &burn_moe::ExpertMlp, x: &[f64], expert: usize) -> Vec<f64> {
    let gate = linear(x, experts.w_gate.as_ref().unwrap(), &experts.b_gate, expert);
    let up = linear(x, &experts.w_in, &experts.b_in, expert);
    let hidden = gate.iter().zip(up).map(|(gate, up)| {
        let gate = gate.min(LIMIT);
        gate * sigmoid(ALPHA * gate) * (up.clamp(-LIMIT, LIMIT) + 1.0)
    });
    linear(&hidden.collect::<Vec<_>>(), &experts.w_out, &experts.b_out, expert)
}

#[test]
fn they_compute_what_their_definitions_say() {
    let device = Device::default();
    let layer = layer(&device);
    let x = numbers::<2>([40, 3], 4, &device) * 2.0;
    let found = rows(&layer.forward(x.clone()).output, 3);
    let router = rows(&layer.router.weight.val(), 4);
    let bias = &rows(&layer.router.bias.as_ref().unwrap().val(), 4)[0];
    let shared_gate = &rows(&layer.shared_expert_gate.as_ref().unwrap().val(), 3)[0];
    for (x, found) in rows(&x, 3).iter().zip(found) {
        let score = |expert: usize| sigmoid(bias[expert] + x.iter().zip(&router).map(|(x, row)| x * row[expert]).sum::<f64>());
        // Two groups of two: both experts of the better one.
        let first = if score(0) + score(1) >= score(2) + score(3) { 0 } else { 2 };
        let sum = score(first) + score(first + 1);
        let mut expected = expert_by_hand(layer.shared_expert.as_ref().unwrap(), x, 0);
        let gate = sigmoid(x.iter().zip(shared_gate).map(|(x, w)| x * w).sum());
        expected.iter_mut().for_each(|value| *value *= gate);
        for expert in [first, first + 1] {
            let own = expert_by_hand(&layer.experts, x, expert);
            expected.iter_mut().zip(own).for_each(|(sum_of, own)| *sum_of += 2.5 * score(expert) / sum * own);
        }
        let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(difference < 1e-5, "{found:?} {expected:?}");
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = Device::default().autodiff();
    let layer = layer(&device);
    let x = numbers::<2>([9, 3], 4, &device).require_grad();
    let cotangent = numbers::<2>([9, 3], 12, &device);
    let loss = |layer: &MoeFeedForward, x: &Tensor<2>| (layer.forward(x.clone()).output * cotangent.clone()).sum();
    let grads = loss(&layer, &x).backward();
    let step = 5e-3;
    let check = |name: &str, found: Vec<f32>, moved: &dyn Fn(usize, f32) -> f32| {
        let here = loss(&layer, &x).into_scalar::<f32>();
        let mut compared = 0;
        for (index, found) in found.iter().enumerate() {
            let (up, down) = (moved(index, step), moved(index, -step));
            // A step over a limit, or to another group, says nothing about the gradient.
            if (up - 2.0 * here + down).abs() > 2e-5 {
                continue;
            }
            compared += 1;
            let slope = (up - down) / (2.0 * step);
            assert!((found - slope).abs() < 5e-3 * slope.abs().max(1.0), "{name}[{index}]: {found}, numerically {slope}");
        }
        assert!(2 * compared > found.len(), "{name}: only {compared} of {} were compared", found.len());
        assert!(found.iter().any(|slope| slope.abs() > 1e-3), "{name}: {found:?}");
    };
    fn nudge<const D: usize>(tensor: Tensor<D>, index: usize, by: f32) -> Tensor<D> {
        let mut data = values(&tensor);
        data[index] += by;
        Tensor::<D>::from_data(TensorData::new(data, tensor.dims()), &tensor.device()).require_grad()
    }
    check("tokens", values(&x.grad(&grads).unwrap()), &|i, by| loss(&layer, &nudge(x.clone(), i, by)).into_scalar::<f32>());
    macro_rules! check_param {
        ($param:expr, $place:ident => $replace:expr) => {
            check(stringify!($param), values(&$param(&layer).val().grad(&grads).unwrap()), &|i, by| {
                let mut $place = layer.clone();
                let moved = Param::from_tensor(nudge($param(&layer).val(), i, by));
                $replace(&mut $place, moved);
                loss(&$place, &x).into_scalar::<f32>()
            });
        };
    }
    type M = MoeFeedForward;
    check_param!((|l: &M| l.router.weight.clone()), l => |l: &mut M, p| l.router.weight = p);
    check_param!((|l: &M| l.router.bias.clone().unwrap()), l => |l: &mut M, p| l.router.bias = Some(p));
    check_param!((|l: &M| l.shared_expert_gate.clone().unwrap()), l => |l: &mut M, p| l.shared_expert_gate = Some(p));
    check_param!((|l: &M| l.experts.w_gate.clone().unwrap()), l => |l: &mut M, p| l.experts.w_gate = Some(p));
    check_param!((|l: &M| l.experts.b_gate.clone().unwrap()), l => |l: &mut M, p| l.experts.b_gate = Some(p));
    check_param!((|l: &M| l.experts.w_in.clone()), l => |l: &mut M, p| l.experts.w_in = p);
    check_param!((|l: &M| l.experts.w_out.clone()), l => |l: &mut M, p| l.experts.w_out = p);
}

#[test]
fn options_without_a_meaning_are_refused() {
    let text = |config: MoeFeedForwardConfig| config.validate().unwrap_err().to_string();
    let config = MoeFeedForwardConfig::new(4, 8, 4);
    assert!(text(config.clone().with_shared_expert_gate(true)).contains("there is no shared expert"));
    let clamped = |limit, alpha| ExpertOptions::swiglu().with_form(FeedForwardForm::ClampedGated { limit, alpha });
    assert!(text(config.clone().with_experts(clamped(0.0, 1.0))).contains("`form.limit` is 0"));
    assert!(text(config.clone().with_experts(clamped(1.0, f64::NAN))).contains("`form.alpha` is NaN"));
    let choice = TokenChoiceConfig::new().with_gate_scale(f64::INFINITY);
    assert!(text(config.clone().with_assignment(choice.into())).contains("`gate_scale` is inf"));
    let choice = TokenChoiceConfig::new().with_expert_groups(Some(ExpertGroups::new(3, 1)));
    assert!(text(config.with_assignment(choice.into())).contains("must divide `num_experts` (4)"));
}

#[test]
fn normalised_gates_sum_to_the_scale() {
    let device = Device::default();
    for normalization in [GateNormalization::BeforeDrop, GateNormalization::AfterDrop] {
        let choice = TokenChoiceConfig::new().with_gate_scale(0.7).with_gate_normalization(normalization);
        let layer = MoeFeedForwardConfig::new(4, 8, 4).with_assignment(choice.into()).init(&device);
        let gates = layer.forward(numbers::<2>([20, 4], 1, &device)).routing.plan.gates();
        assert!(largest_difference(&values(&gates.sum_dim(1)), &[0.7; 20]) < 1e-6);
    }
}
