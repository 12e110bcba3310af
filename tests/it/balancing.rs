//! Balancing by a bias, in whole layers.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use burn_moe::{
    BalancingOptions, BalancingRule, Capacity, MoeFeedForward, MoeFeedForwardConfig, RouterOptions, TokenChoiceConfig,
    stats::RoutingStats, upcycle::Reduction,
};

use super::support::{numbers, values};

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
