//! Auxiliary losses at the values that papers and definitions give.

use burn::tensor::{Device, Tensor, TensorData};
use burn_moe::{
    AssignmentConfig, AuxiliaryLossConfig, ExpertChoiceConfig, GateNormalization, MoeFeedForwardConfig, MoeInput, RouterOptions,
    RouterScore, Routing, TokenChoiceConfig,
    clip::ClipAuxiliaryLossConfig,
    loss::{global_entropy_loss, importance_loss, load_balancing_loss, load_loss, local_entropy_loss, router_z_loss},
    routing::{AssignmentInput, DispatchPlan, Phase, RouterOutput, TokenMask},
};

use super::{
    edge_cases::panic_of,
    support::{mask, numbers, values},
};

fn routing<const T: usize, const E: usize>(probs: [[f32; E]; T], top_k: usize) -> Routing {
    let device = Device::default();
    let probs = Tensor::<2>::from_data(TensorData::from(probs), &device);
    let assignment: AssignmentConfig =
        TokenChoiceConfig::new().with_top_k(top_k).with_gate_normalization(GateNormalization::None).into();
    let plan = assignment.assign(&AssignmentInput::new(probs.clone(), Phase::Inference));
    let logits = probs.clone().log();
    Routing::new(RouterOutput::new(logits, probs), plan)
}

fn scalar(loss: Tensor<1>) -> f32 {
    loss.into_scalar::<f32>()
}

#[test]
fn load_balancing_has_the_value_of_vmoe_for_first_choices() {
    let gates = [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]];
    let loss = scalar(load_balancing_loss(&routing(gates, 1)));
    // 3 · (2/4 · 1.7/4 + 0 · 1.1/4 + 2/4 · 1.2/4) = 1.0875
    assert!((loss - 1.0875).abs() < 1e-6, "{loss}");
}

#[test]
fn importance_has_the_value_of_vmoe() {
    let gates = [[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]];
    // Importances 1.7, 1.1 and 1.2: variance 0.0688889, mean 4/3.
    let loss = scalar(importance_loss(&routing(gates, 1)));
    assert!((loss - 0.038_749_99).abs() < 1e-6, "{loss}");
    assert!(scalar(importance_loss(&routing([[0.25f32; 4]; 3], 2))).abs() < 1e-12);
    assert!((scalar(importance_loss(&routing([[1.0, 0.0, 0.0, 0.0]; 5], 1))) - 3.0).abs() < 1e-5);
}

#[test]
fn load_has_the_value_of_vmoe() {
    let device = Device::default();
    let tensor = |values: [[f32; 3]; 3]| Tensor::<2>::from_data(TensorData::from(values), &device);
    let logits = tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]);
    let noise = tensor([[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]);
    let mut routing = routing([[0.5, 0.3, 0.2]; 3], 2);
    routing.router.noise_std = Some(0.1);
    routing.router.logits = logits.clone() + noise;
    routing.router.clean_logits = logits;
    let loss = scalar(load_loss(&routing));
    assert!((loss - 0.485_738_65).abs() < 1e-6, "{loss}");
}

#[test]
#[should_panic(expected = "the load loss needs router noise: `RouterOptions::noise` above 0, in training")]
fn load_without_noise_is_refused() {
    load_loss(&routing([[0.5, 0.3, 0.2]; 3], 2));
}

#[test]
fn load_of_tokens_that_do_not_choose_is_refused() {
    let device = Device::default();
    let with_noise = |plan: DispatchPlan| {
        let zeros = Tensor::<2>::zeros([2, 3], &device);
        Routing::new(RouterOutput { noise_std: Some(0.5), ..RouterOutput::new(zeros.clone(), zeros) }, plan)
    };
    let scores = AssignmentInput::new(Tensor::ones([2, 3], &device), Phase::Training);
    let by_experts = AssignmentConfig::from(ExpertChoiceConfig::new()).assign(&scores);
    let four_choices = DispatchPlan::from_choices(3, Tensor::zeros([2, 4], &device), Tensor::ones([2, 4], &device));
    for (plan, choices) in [(by_experts, 3), (four_choices, 4)] {
        let text = format!("this plan has {choices} choices of each token among 3 experts");
        let panic = panic_of(|| load_loss(&with_noise(plan)));
        assert!(panic.contains(&text), "{panic}");
    }
}

#[test]
#[should_panic(expected = "the router z-loss is about a softmax")]
fn router_z_of_other_scores_is_refused() {
    let mut routing = routing([[0.5, 0.3, 0.2]; 3], 2);
    routing.router.score = RouterScore::Sigmoid;
    router_z_loss(&routing);
}

#[test]
fn entropies_are_those_of_each_token_and_of_their_mean() {
    let sure = routing([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], 1);
    let unsure = routing([[0.25f32; 4]; 2], 1);
    assert!(scalar(local_entropy_loss(&sure)).abs() < 1e-6);
    assert!((scalar(local_entropy_loss(&unsure)) - 4f32.ln()).abs() < 1e-6);
    // Two experts are used evenly: H = ln 2.
    assert!((scalar(global_entropy_loss(&sure, 4.0)) - 2f32.ln()).abs() < 1e-6);
    assert_eq!(scalar(global_entropy_loss(&sure, 2.0)), 0.0);
    assert_eq!(scalar(global_entropy_loss(&unsure, 3.0)), 0.0);
}

#[test]
fn load_balancing_is_one_at_balance_and_the_expert_count_at_collapse() {
    let balanced = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7]];
    assert!((scalar(load_balancing_loss(&routing(balanced, 1))) - 1.0).abs() < 1e-6);
    assert!((scalar(load_balancing_loss(&routing([[1.0, 0.0, 0.0, 0.0]; 5], 1))) - 4.0).abs() < 1e-6);
}

#[test]
fn router_z_of_zero_logits_is_the_squared_logarithm_of_the_expert_count() {
    let mut routing = routing([[0.125f32; 8]; 3], 2);
    routing.router.clean_logits = Tensor::zeros([3, 8], &Device::default());
    assert!((scalar(router_z_loss(&routing)) - 8f32.ln().powi(2)).abs() < 1e-5);
    // Logits beyond what exp can hold: logsumexp(1000, 1000, …) = 1000 + ln 8.
    routing.router.clean_logits = Tensor::full([3, 8], 1000.0, &Device::default());
    let loss = scalar(router_z_loss(&routing));
    assert!((loss / (1000.0 + 8f32.ln()).powi(2) - 1.0).abs() < 1e-5, "{loss}");
}

#[test]
fn losses_and_gradients_stay_finite_where_routing_is_extreme() {
    let device = Device::default().autodiff();
    let router = RouterOptions::new().with_noise(1.0);
    let layer = MoeFeedForwardConfig::new(4, 8, 4).with_router(router).init(&device);
    let every_loss =
        AuxiliaryLossConfig::new().with_importance(0.1).with_load(0.1).with_local_entropy(0.1).with_global_entropy(0.1);
    // Exact balance (no logits), one-hot routing (huge ones), one valid token, none.
    for (scale, valid) in
        [(0.0, vec![true; 6]), (1e4, vec![true; 6]), (1.0, [vec![true], vec![false; 5]].concat()), (1.0, vec![false; 6])]
    {
        let x = (numbers([6, 4], 9, &device) * scale).require_grad();
        let result = layer.forward(MoeInput::new(x.clone()).valid(mask(&valid, &device)));
        let losses = every_loss.init().forward(&[result.routing]);
        let total = losses.total.clone() + result.output.sum() * 0.0;
        let gradients = total.backward();
        let router = values(&layer.router.weight.grad(&gradients).unwrap());
        assert!(scalar(losses.total.clone()).is_finite() && router.iter().all(|g| g.is_finite()), "at {scale}, {valid:?}");
        if !valid.contains(&true) {
            assert_eq!(scalar(losses.total), 0.0);
            assert!(router.iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn no_token_at_all_has_no_loss_and_no_gradient() {
    let device = Device::default().autodiff();
    let layer = MoeFeedForwardConfig::new(4, 8, 4).init(&device);
    let result = layer.forward(Tensor::<2>::zeros([0, 4], &device));
    assert_eq!(result.output.dims(), [0, 4]);
    let total = AuxiliaryLossConfig::new().init().forward(&[result.routing]).total;
    assert_eq!(scalar(total), 0.0);
}

#[test]
fn padding_counts_in_no_loss() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(4, 8, 4).init(&device);
    let x = numbers([5, 4], 4, &device);
    let padded = Tensor::cat(vec![x.clone(), numbers([3, 4], 8, &device)], 0);
    let valid = mask(&[true, true, true, true, true, false, false, false], &device);
    let (alone, padded) = (layer.forward(x).routing, layer.forward(MoeInput::new(padded).valid(valid)).routing);
    for loss in [load_balancing_loss, router_z_loss, importance_loss, local_entropy_loss, |r: &Routing| global_entropy_loss(r, 4.0)]
    {
        assert!((scalar(loss(&alone)) - scalar(loss(&padded))).abs() < 1e-6);
    }
}

#[test]
fn tokens_that_are_all_not_finite_have_no_loss() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(4, 8, 4).init(&device);
    let routing = layer.forward(Tensor::<2>::full([3, 4], f32::NAN, &device)).routing;
    for loss in [load_balancing_loss, router_z_loss, importance_loss, local_entropy_loss, |r: &Routing| global_entropy_loss(r, 3.0)]
    {
        assert_eq!(scalar(loss(&routing)), 0.0);
    }
}

#[test]
fn the_total_is_the_weighted_mean_over_layers() {
    let (a, b) = (routing([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2]], 1), routing([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], 1));
    let output = AuxiliaryLossConfig::new().with_load_balancing(2.0).with_router_z(3.0).init().forward(&[a.clone(), b.clone()]);
    let mean = |loss: fn(&Routing) -> Tensor<1>| (scalar(loss(&a)) + scalar(loss(&b))) / 2.0;
    let expected = 2.0 * mean(load_balancing_loss) + 3.0 * mean(router_z_loss);
    assert!((scalar(output.total) - expected).abs() < 1e-5);
    assert_eq!(output.load_balancing.as_ref().unwrap().per_layer.dims(), [2]);
}

#[test]
#[should_panic(expected = "auxiliary losses need the routing of at least one layer, got none")]
fn no_layer_has_no_loss() {
    AuxiliaryLossConfig::new().init().forward(&[]);
}

#[test]
#[should_panic(expected = "`router_z` is -1: a loss weight must be finite and not negative")]
fn a_negative_weight_is_refused() {
    AuxiliaryLossConfig::new().with_router_z(-1.0).init();
}

/// A routing whose only parameters are its logits; noise is fixed, and so are the choices, which are those of `chosen_by`.
fn routing_of(logits: Tensor<2>, noise: Tensor<2>, chosen_by: Tensor<2>, valid: Option<Vec<bool>>) -> Routing {
    let softmax = |x: Tensor<2>| burn::tensor::activation::softmax(x, 1);
    let noisy = logits.clone() + noise;
    let (clean_probs, probs) = (softmax(logits.clone()), softmax(noisy.clone()));
    let assignment: AssignmentConfig = TokenChoiceConfig::new().into();
    let valid = valid.map(|valid| TokenMask::new(mask(&valid, &logits.device())));
    let input = AssignmentInput { valid: valid.clone(), ..AssignmentInput::new(softmax(chosen_by), Phase::Training) };
    let plan = assignment.assign(&input);
    let router = RouterOutput { clean_logits: logits, clean_probs, noise_std: Some(0.25), ..RouterOutput::new(noisy, probs) };
    Routing { valid, ..Routing::new(router, plan) }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let device = Device::default().autodiff();
    let logits = numbers([6, 4], 5, &device).require_grad();
    let noise = numbers([6, 4], 8, &device) * 0.25;
    let logits_before = logits.clone();
    type Loss = fn(&Routing) -> Tensor<1>;
    let losses: [(&str, Loss); 6] = [
        ("load balancing", load_balancing_loss),
        ("router z", router_z_loss),
        ("importance", importance_loss),
        ("load", load_loss),
        ("local entropy", local_entropy_loss),
        ("global entropy", |routing| global_entropy_loss(routing, 4.0)),
    ];
    for valid in [None, Some(vec![true, true, false, true, false, true])] {
        for (name, loss) in losses {
            let run = |logits: Tensor<2>| loss(&routing_of(logits, noise.clone(), logits_before.clone(), valid.clone()));
            let analytic = values(&logits.grad(&run(logits.clone()).backward()).unwrap());
            let plain = values(&logits);
            let mut largest = 0.0f32;
            for (i, found) in analytic.into_iter().enumerate() {
                let shifted = |by: f32| {
                    let mut moved = plain.clone();
                    moved[i] += by;
                    scalar(run(Tensor::from_data(TensorData::new(moved, [6, 4]), &device)))
                };
                let numeric = (shifted(5e-3) - shifted(-5e-3)) / 1e-2;
                assert!((found - numeric).abs() < 2e-3 * numeric.abs().max(1.0), "{name}[{i}]: {found}, numerically {numeric}");
                largest = largest.max(found.abs());
            }
            assert!(largest > 1e-3, "{name}: a gradient of nothing was compared");
        }
    }
}

#[test]
fn towers_are_weighted_apart() {
    let (image, text) = (routing([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2]], 1), routing([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]], 1));
    let weights = |balance: f64| AuxiliaryLossConfig::new().with_load_balancing(balance).with_router_z(0.0);
    let total = |config: ClipAuxiliaryLossConfig| {
        let output = config.init().forward(&[image.clone(), image.clone()], std::slice::from_ref(&text)).unwrap();
        scalar(output.total)
    };
    let balance = |routing: &Routing| scalar(load_balancing_loss(routing));
    // The mean over three layers, each with the weight of its tower.
    let apart = total(ClipAuxiliaryLossConfig { image: weights(2.0), text: weights(5.0) });
    assert!((apart - (2.0 * 2.0 * balance(&image) + 5.0 * balance(&text)) / 3.0).abs() < 1e-5);
    let together = weights(2.0).init().forward(&[image.clone(), image.clone(), text.clone()]).total;
    assert!((total(ClipAuxiliaryLossConfig::both(weights(2.0))) - scalar(together)).abs() < 1e-6);
    assert!(ClipAuxiliaryLossConfig::new().init().forward(&[], &[]).is_none(), "a dense model has no auxiliary loss");
}
