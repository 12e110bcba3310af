//! Balancing by a bias, and normalised logits, in whole layers.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{DType, Device, FloatDType, Tensor};
use burn_moe::{
    AuxiliaryLossConfig, BalancingOptions, BalancingRule, Capacity, GateNormalization, MoeFeedForward, MoeFeedForwardConfig,
    RouterOptions, TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    kernels::{Kernels, with_kernels},
    loss::{load_balancing_loss, router_z_loss},
    stats::RoutingStats,
    transformer::MlpConfig,
    upcycle::{Probe, Reduction},
};

use super::{
    burns_own::quantizer,
    edge_cases::cast,
    support::{largest_difference, numbers, values},
};

/// Tokens of width 6, of which the last number is always 1.
fn tokens(count: usize, seed: u64, device: &Device) -> Tensor<2> {
    Tensor::cat(vec![numbers([count, 5], seed, device), Tensor::ones([count, 1], device)], 1)
}

/// A router of four experts that likes the first one best, and the last one least.
fn skewed(router: RouterOptions, device: &Device) -> MoeFeedForward {
    let choice = TokenChoiceConfig::of_top_k(1).with_training_capacity(Capacity::Dropless);
    let config = MoeFeedForwardConfig::new(6, 10, 4).with_router(router).with_assignment(choice.into());
    let mut layer = config.init(device);
    let offsets = Tensor::<2>::from_floats([[1.5, 0.5, -0.5, -1.5]], device);
    let weight = Tensor::cat(vec![numbers([5, 4], 7, device), offsets], 0);
    layer.router.weight = Param::from_tensor(weight);
    layer
}

#[test]
fn every_rule_evens_out_the_load_of_a_skewed_router() {
    let device = Device::default().autodiff();
    let sign = BalancingOptions::new(0.005);
    let by_z_score = sign.clone().with_rule(BalancingRule::ZScore);
    let with_all = by_z_score.clone().with_momentum(0.9).with_cap(Some(2.0)).with_warmup_steps(20);
    let capped = by_z_score.clone().with_cap(Some(0.05));
    let peak = |layer: &MoeFeedForward| RoutingStats::new(&layer.forward(tokens(2000, 1, &device)).routing).peak_load();
    let peaks = [None, Some(sign), Some(by_z_score), Some(with_all), Some(capped.clone())].map(|balancing| {
        let mut layer = skewed(RouterOptions::new().with_balancing(balancing), &device);
        let before = peak(&layer);
        assert!(before > 2.0, "{before}");
        for step in 0..300 {
            let routing = layer.forward(tokens(200, 100 + step, &device)).routing;
            layer = layer.update_balancing_bias(&routing);
        }
        if layer.router.balancing.as_ref() == Some(&capped) {
            let largest = layer.router.balancing_bias.as_ref().unwrap().val().abs().max().into_scalar::<f32>();
            assert_eq!(largest, 0.05);
        }
        (before, peak(&layer))
    });
    let [none, sign, by_z_score, with_all, capped] = peaks;
    assert_eq!(none.0, none.1);
    for (before, after) in [sign, by_z_score, with_all] {
        // Even but for what one step's 200 tokens differ from others by.
        assert!(after < 1.45, "{before} {after}");
    }
    assert!(capped.1 < capped.0 && capped.1 > 2.0, "the cap holds a part of the skew: {capped:?}");
}

const SCALE: f64 = 1.5;

/// `Σ_te cotangent[t, e] · softmax(λ · (z − mean) / std)[t, e]`, and the mean of `logsumexp(z)²`, of `z = x · w`, in f64.
fn by_hand(x: &[f64], w: &[f64], cotangent: &[f64], [num_tokens, d_model, num_experts]: [usize; 3]) -> (f64, f64, Vec<f64>) {
    let (mut sum, mut z_loss, mut all_probs) = (0.0, 0.0, Vec::new());
    for t in 0..num_tokens {
        let product = |e: usize| (0..d_model).map(|d| x[t * d_model + d] * w[d * num_experts + e]).sum::<f64>();
        let z: Vec<f64> = (0..num_experts).map(product).collect();
        z_loss += z.iter().map(|z| z.exp()).sum::<f64>().ln().powi(2) / num_tokens as f64;
        let mean = z.iter().sum::<f64>() / num_experts as f64;
        let std = (z.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / num_experts as f64).sqrt();
        let exp: Vec<f64> = z.iter().map(|z| (SCALE * (z - mean) / std).exp()).collect();
        let probs = exp.iter().map(|e| e / exp.iter().sum::<f64>());
        all_probs.extend(probs.clone());
        sum += probs.zip(&cotangent[t * num_experts..]).map(|(prob, cotangent)| prob * cotangent).sum::<f64>();
    }
    (sum, z_loss, all_probs)
}

#[test]
fn normalised_logits_and_their_gradients_are_those_of_the_formula() {
    let device = Device::default().autodiff();
    let sizes @ [num_tokens, d_model, num_experts] = [7, 5, 4];
    let x = numbers::<2>([num_tokens, d_model], 1, &device).require_grad();
    let cotangent = numbers::<2>([num_tokens, num_experts], 2, &device);
    let router = RouterOptions::new().with_logit_normalization(Some(SCALE));
    let choice =
        TokenChoiceConfig::new().with_gate_normalization(GateNormalization::None).with_training_capacity(Capacity::Dropless);
    let config = MoeFeedForwardConfig::new(d_model, 6, num_experts).with_router(router).with_assignment(choice.into());
    let mut layer = config.init(&device);
    layer.router.weight = Param::from_tensor(numbers([d_model, num_experts], 3, &device));
    let f64s = |tensor: &Tensor<2>| values(tensor).into_iter().map(f64::from).collect::<Vec<f64>>();
    let (host_x, host_w, host_cotangent) = (f64s(&x), f64s(&layer.router.weight.val()), f64s(&cotangent));
    let (_, z_loss, probs) = by_hand(&host_x, &host_w, &host_cotangent, sizes);
    let loss_at = |x: &[f64], w: &[f64]| {
        let (sum, z_loss, _) = by_hand(x, w, &host_cotangent, sizes);
        sum + z_loss
    };
    let slope = |numbers: &[f64], at: usize, loss: &dyn Fn(&[f64]) -> f64| {
        let moved = |by: f64| {
            let mut moved = numbers.to_vec();
            moved[at] += by;
            loss(&moved)
        };
        (moved(1e-6) - moved(-1e-6)) / 2e-6
    };
    let of_x: Vec<f32> = (0..host_x.len()).map(|at| slope(&host_x, at, &|x| loss_at(x, &host_w)) as f32).collect();
    let of_w: Vec<f32> = (0..host_w.len()).map(|at| slope(&host_w, at, &|w| loss_at(&host_x, w)) as f32).collect();
    for kernels in [Kernels::Fastest, Kernels::Reference] {
        let routing = with_kernels(kernels, || layer.forward(x.clone()).routing);
        let expected: Vec<f32> = probs.iter().map(|&prob| prob as f32).collect();
        assert!(largest_difference(&values(&routing.router.probs), &expected) < 1e-5);
        let found = router_z_loss(&routing);
        assert!((f64::from(found.clone().into_scalar::<f32>()) - z_loss).abs() < 1e-5 * z_loss, "of logits before");
        let grads = ((routing.router.probs.clone() * cotangent.clone()).sum() + found).backward();
        assert!(largest_difference(&values(&x.grad(&grads).unwrap()), &of_x) < 1e-4);
        assert!(largest_difference(&values(&layer.router.weight.val().grad(&grads).unwrap()), &of_w) < 1e-4);
        // Shares of the choices times mean probabilities.
        let requested = routing.plan.requested();
        let mean = |e: usize| (0..num_tokens).map(|t| probs[t * num_experts + e]).sum::<f64>() / num_tokens as f64;
        let share = |e: usize| requested[e] as f64 / (2 * num_tokens) as f64;
        let expected = num_experts as f64 * (0..num_experts).map(|e| share(e) * mean(e)).sum::<f64>();
        assert!((f64::from(load_balancing_loss(&routing).into_scalar::<f32>()) - expected).abs() < 1e-5);
        // Gates are probabilities, the highest of each token.
        let gates = values(&routing.plan.gates());
        for (gates, probs) in gates.chunks(2).zip(probs.chunks(num_experts)) {
            let mut probs = probs.to_vec();
            probs.sort_by(|a, b| b.total_cmp(a));
            assert!(gates.iter().zip(probs).all(|(gate, prob)| (f64::from(*gate) - prob).abs() < 1e-5), "{gates:?}");
        }
    }
}

#[test]
fn a_token_that_is_not_finite_changes_nothing_with_normalised_logits() {
    let device = Device::default().autodiff();
    let layer = skewed(RouterOptions::new().with_logit_normalization(Some(1.0)), &device);
    let run = |x: Tensor<2>, count: usize| {
        let result = layer.forward(x);
        let losses = AuxiliaryLossConfig::new().init().forward(std::slice::from_ref(&result.routing)).total;
        let grads = (result.output.clone().narrow(0, 0, count).square().sum() + losses).backward();
        let gradient = values(&layer.router.weight.val().grad(&grads).unwrap());
        (values(&result.output), gradient, result.routing.plan.non_finite_tokens().to_vec())
    };
    let good = tokens(6, 1, &device);
    let bad = Tensor::<2>::from_floats([[f32::NAN; 6], [f32::INFINITY; 6]], &device);
    let (expected, gradient, none) = run(good.clone(), 6);
    let (output, found, non_finite) = run(Tensor::cat(vec![good.clone(), bad], 0), 6);
    assert_eq!((none, non_finite), (vec![], vec![6, 7]));
    assert!(largest_difference(&output[..36], &expected) < 1e-6 && output[36..].iter().all(|value| value.is_nan()));
    assert!(largest_difference(&found, &gradient) < 1e-6 && gradient.iter().any(|slope| *slope != 0.0));
    // A token of zeros has equal logits: equal probabilities, and a finite gradient.
    let zeros = Tensor::cat(vec![good, Tensor::zeros([1, 6], &device)], 0).require_grad();
    let result = layer.forward(zeros.clone());
    let probs = values(&result.routing.router.probs);
    assert!(probs[24..].iter().all(|prob| (prob - 0.25).abs() < 1e-6), "{probs:?}");
    let grads = result.output.square().sum().backward();
    assert!(values(&zeros.grad(&grads).unwrap()).iter().all(|slope| slope.is_finite()));
}

#[test]
fn upcycled_layers_with_normalised_logits_compute_what_the_dense_network_does() {
    let device = Device::default();
    let dense = MlpConfig::new(6, 24).init(&device);
    let router = RouterOptions::new().with_logit_normalization(Some(2.0));
    let sparse = MoeFeedForwardConfig::new(6, 24, 4).with_router(router).init(&device);
    let probe = Probe::Tokens { tokens: numbers([2, 9, 6], 3, &device), valid: None };
    let upcycled = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default().with_probe(probe)).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5, "{}", upcycled.report);
    let average = upcycled.model.reduce(&Reduction::Average, &[0.25; 4], Some(numbers([9, 6], 3, &device))).unwrap();
    assert!(average.report.relative_deviation.unwrap() < 1e-6, "{:?}", average.report);
}

#[test]
fn experts_that_are_left_keep_their_state_of_balancing() {
    let device = Device::default();
    let balancing = BalancingOptions::new(0.5).with_rule(BalancingRule::ZScore).with_momentum(0.5).with_warmup_steps(4);
    let config = MoeFeedForwardConfig::new(6, 10, 4).with_router(RouterOptions::new().with_balancing(Some(balancing)));
    let mut layer = config.init(&device);
    assert_eq!(config.cost(1).params_total as usize, layer.num_params());
    layer.router = layer.router.update_balancing_bias(&[1, 4, 2, 9]);
    let state = |layer: &MoeFeedForward| {
        let router = &layer.router;
        [&router.balancing_bias, &router.balancing_momentum].map(|param| values(&param.as_ref().unwrap().val()))
    };
    let load = [0.1, 0.3, 0.2, 0.4];
    let pruned = layer.reduce(&Reduction::Prune { count: 2 }, &load, None).unwrap().model;
    let kept = |values: &Vec<f32>| vec![values[1], values[3]];
    assert_eq!(state(&pruned), state(&layer).each_ref().map(kept));
    assert_eq!(values(&pruned.router.balancing_warmup.as_ref().unwrap().val()), [0.25]);
    // It goes on.
    let moved = pruned.router.update_balancing_bias(&[2, 1]);
    assert_eq!(values(&moved.balancing_warmup.unwrap().val()), [0.5]);
    let average = layer.reduce(&Reduction::Average, &load, None).unwrap().model.router;
    assert!(average.balancing_bias.is_none() && average.balancing_momentum.is_none() && average.balancing_warmup.is_none());
    assert!(average.update_balancing_bias(&[3]).balancing_bias.is_none());
}

#[test]
fn a_record_of_burn_holds_the_state_of_balancing() {
    let device = Device::default();
    let balancing = BalancingOptions::new(0.5).with_momentum(0.5).with_warmup_steps(4);
    let config = MoeFeedForwardConfig::new(6, 10, 3).with_router(RouterOptions::new().with_balancing(Some(balancing)));
    let mut layer = config.init(&device);
    layer.router = layer.router.update_balancing_bias(&[1, 4, 2]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("layer.bpk");
    layer.clone().save_file(&file).unwrap();
    let loaded = config.init(&device).try_load_file(&file).unwrap();
    let next = |layer: &MoeFeedForward| {
        let router = layer.router.clone().update_balancing_bias(&[2, 2, 5]);
        [router.balancing_bias, router.balancing_momentum, router.balancing_warmup].map(|param| values(&param.unwrap().val()))
    };
    assert_eq!(next(&loaded), next(&layer));
    let json = folder.path().join("layer.json");
    config.save(&json).unwrap();
    let back = MoeFeedForwardConfig::load(&json).unwrap();
    assert_eq!(back.router, config.router);
}

#[test]
fn the_state_of_balancing_is_kept_in_32_bits_in_a_module_of_16() {
    for device in [Device::default(), Device::default().autodiff()] {
        for dtype in [FloatDType::BF16, FloatDType::F16] {
            let options = BalancingOptions::new(2f64.powi(-10)).with_momentum(0.5).with_warmup_steps(512);
            let router = RouterOptions::new().with_balancing(Some(options));
            let layer = cast(MoeFeedForwardConfig::new(6, 10, 2).with_router(router).init(&device), dtype);
            let mut layers = [layer.router.clone(), layer.router.quantize_weights(&mut quantizer())];
            for _ in 0..2000 {
                layers = layers.map(|router| router.update_balancing_bias(&[3, 1]));
            }
            for router in layers {
                let state = |param: &Option<Param<Tensor<1>>>| param.as_ref().unwrap().val();
                // The rate rises over 512 steps, and stays for the others; the mean of equal directions is nearly theirs.
                let expected = (513.0 / 2.0 + 1488.0) / 1024.0;
                let bias = values(&state(&router.balancing_bias));
                assert!((bias[0] + expected).abs() < 1e-3 && (bias[1] - expected).abs() < 1e-3, "{bias:?} {expected}");
                assert_eq!(values(&state(&router.balancing_warmup)), [1.0]);
                assert_eq!(state(&router.balancing_momentum).dtype(), DType::F32);
            }
        }
    }
}
