//! The layer against a naive loop, and the relations it must keep.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use burn_moe::{
    Activation, BalancingOptions, Capacity, ExpertChoiceConfig, ExpertOptions, FillOrder, GateNormalization, MoeFeedForward,
    MoeFeedForwardConfig, MoeInput, RouterOptions, RouterScore, Routing, SoftMoeFeedForwardConfig, TokenChoiceConfig, TokenGroups,
    clip::{ClipConfig, TextConfig, VisionConfig},
    kernels::{Kernels, with_kernels},
    stats::RoutingStats,
    transformer::{EncoderConfig, Padding, Protection, RoutedLayerConfig, SparseEncoderConfig, TokenMarks},
};
use proptest::prelude::*;

use super::support::{largest_difference, mask, numbers, values};

#[derive(Debug, Clone)]
struct Case {
    t: usize,
    d: usize,
    f: usize,
    e: usize,
    k: usize,
    capacity: Capacity,
    normalization: GateNormalization,
    order: FillOrder,
    group: usize,
    valid: Vec<bool>,
    protected: Vec<bool>,
    score: RouterScore,
    /// The balancing bias of each expert.
    bias: Vec<f32>,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    let sizes = (0usize..30, 1usize..9, 1usize..12, 1usize..7, any::<u64>());
    sizes.prop_flat_map(|(t, d, f, e, seed)| {
        let capacity = prop_oneof![
            Just(Capacity::Dropless),
            (1usize..8).prop_map(Capacity::Fixed),
            (0.2f64..3.0).prop_map(Capacity::OfTokens),
            (0.2f64..3.0).prop_map(Capacity::OfBalancedLoad),
        ];
        let normalization =
            prop_oneof![Just(GateNormalization::None), Just(GateNormalization::BeforeDrop), Just(GateNormalization::AfterDrop)];
        let valid = prop::collection::vec(prop::bool::weighted(0.8), t);
        let order = prop_oneof![Just(FillOrder::ChoiceMajor), Just(FillOrder::TokenMajor), Just(FillOrder::BatchPriority)];
        let protected = prop::collection::vec(prop::bool::weighted(0.1), t);
        let groups: Vec<usize> = (1..=t.max(1)).filter(|size| t % size == 0).collect();
        let score = prop_oneof![Just(RouterScore::Softmax), Just(RouterScore::Sigmoid)];
        let bias = prop_oneof![Just(vec![0.0; e]), prop::collection::vec(-0.5f32..0.5, e)];
        let routing = (score, bias, normalization, order);
        (1..=e.min(4), capacity, routing, prop::sample::select(groups), valid, protected).prop_map(
            move |(k, capacity, (score, bias, normalization, order), group, valid, protected)| {
                let normalization = if k == 1 { GateNormalization::None } else { normalization };
                Case { t, d, f, e, k, capacity, normalization, order, group, valid, protected, score, bias, seed }
            },
        )
    })
}

fn layer(case: &Case, device: &Device) -> MoeFeedForward {
    device.seed(case.seed);
    let assignment = TokenChoiceConfig::new()
        .with_top_k(case.k)
        .with_gate_normalization(case.normalization)
        .with_fill_order(case.order)
        .with_groups(TokenGroups::OfSize(case.group))
        .with_training_capacity(case.capacity)
        .with_inference_capacity(case.capacity);
    let router = RouterOptions::new().with_init_std(1.0).with_score(case.score).with_balancing(Some(BalancingOptions::new(1e-3)));
    let mut layer = MoeFeedForwardConfig::new(case.d, case.f, case.e)
        .with_assignment(assignment.into())
        .with_router(router)
        .with_experts(ExpertOptions::new().with_activation(Activation::Relu))
        .init(device);
    layer.router.balancing_bias = layer.router.balancing_bias.map(|bias| bias.map(|_| Tensor::from_floats(&case.bias[..], device)));
    layer
}

/// The definition, token by token, in f64: who has a slot, with which gate, and the output.
fn naive(case: &Case, layer: &MoeFeedForward, x: &[f32]) -> (Vec<f32>, usize) {
    let Case { t, d, e, k, .. } = *case;
    let router = values(&layer.router.weight.val());
    let probs: Vec<Vec<f64>> = (0..t).map(|i| naive_scores(case, x, &router, i)).collect();
    let chosen: Vec<Vec<usize>> = probs
        .iter()
        .map(|p| {
            let mut order: Vec<usize> = (0..e).collect();
            let biased = |j: usize| p[j] + f64::from(case.bias[j]);
            order.sort_by(|&a, &b| biased(b).total_cmp(&biased(a)).then(a.cmp(&b)));
            order[..k].to_vec()
        })
        .collect();
    let slots = case.capacity.slots(case.group, k, e).unwrap_or(usize::MAX);
    let mut rows = 0;
    let mut kept = vec![vec![false; k]; t];
    for group in 0..t / case.group {
        let mut load = vec![0; e];
        for protected in [true, false] {
            let mut tokens: Vec<usize> = (group * case.group..(group + 1) * case.group)
                .filter(|&i| case.valid[i] && case.protected[i] == protected)
                .collect();
            if case.order == FillOrder::BatchPriority {
                let largest = |i: usize| probs[i].iter().copied().fold(f64::MIN, f64::max);
                tokens.sort_by(|&a, &b| largest(b).total_cmp(&largest(a)));
            }
            let choices: Vec<(usize, usize)> = match case.order {
                FillOrder::TokenMajor => tokens.iter().flat_map(|&i| (0..k).map(move |rank| (i, rank))).collect(),
                _ => (0..k).flat_map(|rank| tokens.iter().map(move |&i| (i, rank))).collect(),
            };
            for (i, rank) in choices {
                let expert = chosen[i][rank];
                kept[i][rank] = load[expert] < slots;
                load[expert] += usize::from(kept[i][rank]);
            }
        }
        rows += load.iter().sum::<usize>();
    }
    let mut output = vec![0.0; t * d];
    for i in 0..t {
        let over = |of: &dyn Fn(usize) -> bool| (0..k).filter(|&r| of(r)).map(|r| probs[i][chosen[i][r]]).sum::<f64>();
        let divisor = match case.normalization {
            GateNormalization::None => 1.0,
            GateNormalization::BeforeDrop | GateNormalization::ConstantOne => over(&|_| true),
            GateNormalization::AfterDrop => over(&|r| kept[i][r]),
        };
        for rank in (0..k).filter(|&r| kept[i][r]) {
            let j = chosen[i][rank];
            let computed = naive_expert(layer, &x[i * d..(i + 1) * d], j);
            for (sum, value) in output[i * d..].iter_mut().zip(computed) {
                *sum += (probs[i][j] / divisor * value) as f32;
            }
        }
    }
    (output, rows)
}

/// A token's scores, in f64.
fn naive_scores(case: &Case, x: &[f32], router: &[f32], token: usize) -> Vec<f64> {
    let logit = |j: usize| (0..case.d).map(|c| f64::from(x[token * case.d + c]) * f64::from(router[c * case.e + j])).sum::<f64>();
    let logits: Vec<f64> = (0..case.e).map(logit).collect();
    let sum: f64 = logits.iter().map(|l| l.exp()).sum();
    match case.score {
        RouterScore::Softmax => logits.iter().map(|l| l.exp() / sum).collect(),
        RouterScore::Sigmoid => logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect(),
    }
}

/// What a ReLU expert makes of one token, in f64.
fn naive_expert(layer: &MoeFeedForward, x: &[f32], expert: usize) -> Vec<f64> {
    let [_, d, f] = layer.experts.dims();
    let [w_in, w_out] = [&layer.experts.w_in, &layer.experts.w_out].map(|w| values(&w.val()));
    let [b_in, b_out] = [&layer.experts.b_in, &layer.experts.b_out].map(|b| values(&b.as_ref().unwrap().val()));
    let at = |w: &[f32], i: usize| f64::from(w[i]);
    let hidden = |h: usize| {
        let sum: f64 = (0..d).map(|c| at(x, c) * at(&w_in, (expert * d + c) * f + h)).sum();
        (sum + at(&b_in, expert * f + h)).max(0.0)
    };
    let hidden: Vec<f64> = (0..f).map(hidden).collect();
    let output = |c: usize| (0..f).map(|h| hidden[h] * at(&w_out, (expert * f + h) * d + c)).sum::<f64>();
    (0..d).map(|c| output(c) + at(&b_out, expert * d + c)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn it_computes_what_a_naive_loop_computes(case in cases()) {
        let device = Device::default();
        let layer = layer(&case, &device);
        let x = numbers([case.t, case.d], case.seed, &device);
        let (expected, rows) = naive(&case, &layer, &values(&x));
        for kernels in [Kernels::Fastest, Kernels::Reference] {
            let input = MoeInput::new(x.clone()).valid(mask(&case.valid, &device)).protected(mask(&case.protected, &device));
            let result = with_kernels(kernels, || layer.forward(input));
            prop_assert!(largest_difference(&values(&result.output), &expected) < 1e-4, "{:?}", kernels);
            prop_assert_eq!(result.routing.plan.num_rows(), rows);
        }
    }

    #[test]
    fn expert_choice_computes_what_a_naive_loop_computes(case in cases()) {
        let device = Device::default();
        // An even share is what "balanced load" means to an expert that chooses.
        let capacity = if case.capacity == Capacity::Dropless { Capacity::OfTokens(2.0) } else { case.capacity };
        let config = ExpertChoiceConfig::new().with_capacity(capacity).with_groups(TokenGroups::OfSize(case.group));
        let layer = MoeFeedForward { assignment: config.into(), ..layer(&case, &device) };
        let (x, router) = (numbers([case.t, case.d], case.seed, &device), values(&layer.router.weight.val()));
        let plain = values(&x);
        let scores: Vec<Vec<f64>> = (0..case.t).map(|i| naive_scores(&case, &plain, &router, i)).collect();
        let mut expected = vec![0.0f32; case.t * case.d];
        let mut loads = vec![0; case.e];
        for group in (0..case.t).collect::<Vec<_>>().chunks(case.group) {
            let slots = capacity.slots(group.len(), 1, case.e).unwrap();
            for expert in 0..case.e {
                let mut tokens: Vec<usize> = group.iter().copied().filter(|&i| case.valid[i]).collect();
                tokens.sort_by(|&a, &b| scores[b][expert].total_cmp(&scores[a][expert]));
                for &token in tokens.iter().take(slots) {
                    loads[expert] += 1;
                    let computed = naive_expert(&layer, &plain[token * case.d..][..case.d], expert);
                    for (sum, value) in expected[token * case.d..].iter_mut().zip(computed) {
                        *sum += (scores[token][expert] * value) as f32;
                    }
                }
            }
        }
        for kernels in [Kernels::Fastest, Kernels::Reference] {
            let input = MoeInput::new(x.clone()).valid(mask(&case.valid, &device));
            let result = with_kernels(kernels, || layer.forward(input));
            prop_assert!(largest_difference(&values(&result.output), &expected) < 1e-4, "{:?}", kernels);
            prop_assert_eq!(result.routing.plan.load(), loads.clone());
        }
    }

    #[test]
    fn a_protected_choice_is_dropped_only_for_other_protected_choices(case in cases()) {
        let Some(slots) = case.capacity.slots(case.group, case.k, case.e) else { return Ok(()) };
        let device = Device::default();
        let layer = layer(&case, &device);
        let x = numbers([case.t, case.d], case.seed, &device);
        let input = MoeInput::new(x.clone()).valid(mask(&case.valid, &device)).protected(mask(&case.protected, &device));
        let plan = layer.forward(input).routing.plan;
        // Without a limit every choice has a row, which tells the expert it names.
        let dropless = TokenChoiceConfig::new().with_top_k(case.k).with_gate_normalization(case.normalization);
        let all = MoeFeedForward { assignment: dropless.into(), ..layer }.forward(x).routing.plan;
        let expert_of = |choice: usize| all.row_expert()[all.choice_row()[choice] as usize];
        for group in 0..case.t / case.group {
            let tokens = (group * case.group..(group + 1) * case.group).filter(|&i| case.valid[i] && case.protected[i]);
            let choices: Vec<usize> = tokens.flat_map(|i| i * case.k..(i + 1) * case.k).collect();
            for &choice in choices.iter().filter(|&&choice| plan.choice_row()[choice] < 0) {
                let rivals = choices.iter().filter(|&&other| expert_of(other) == expert_of(choice)).count();
                prop_assert!(rivals > slots, "choice {} was dropped, and only {} wanted its {} slots", choice, rivals, slots);
            }
        }
    }

    #[test]
    fn slots_are_conserved(case in cases()) {
        let device = Device::default();
        let x = numbers([case.t, case.d], case.seed, &device);
        let routing = layer(&case, &device).forward(MoeInput::new(x).valid(mask(&case.valid, &device))).routing;
        let plan = &routing.plan;
        let num_valid = case.valid.iter().filter(|&&v| v).count();
        prop_assert_eq!(plan.requested().iter().sum::<usize>(), num_valid * case.k);
        if let Some(slots) = case.capacity.slots(case.group, case.k, case.e) {
            let groups = case.t / case.group;
            prop_assert!(plan.load().iter().all(|&load| load <= slots * groups), "an expert is over its capacity");
        }
        // Every row is named by exactly one choice, and belongs to that choice's token.
        let mut seen = vec![false; plan.num_rows()];
        for (choice, &row) in plan.choice_row().iter().enumerate().filter(|(_, row)| **row >= 0) {
            prop_assert!(!std::mem::replace(&mut seen[row as usize], true));
            prop_assert_eq!(plan.row_token()[row as usize] as usize, choice / case.k);
        }
        prop_assert!(seen.into_iter().all(|seen| seen));
        // Gates: zero without a slot; together one where nothing was dropped and they are normalized.
        for (token, (gates, rows)) in values(&plan.gates()).chunks(case.k).zip(plan.choice_row().chunks(case.k)).enumerate() {
            prop_assert!(gates.iter().zip(rows).all(|(gate, row)| *row >= 0 || *gate == 0.0));
            let all = rows.iter().all(|row| *row >= 0);
            if case.valid[token] && all && case.normalization != GateNormalization::None {
                prop_assert!((gates.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            }
        }
        let stats = RoutingStats::new(&routing);
        prop_assert!((0.0..=1.0).contains(&stats.dropped) && stats.entropy <= (case.e as f64).ln() + 1e-5);
    }

    #[test]
    fn what_padding_holds_changes_nothing(case in cases(), poison in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(7.0)]) {
        let device = Device::default();
        let layer = layer(&case, &device);
        let x = numbers([case.t, case.d], case.seed, &device);
        let valid = mask(&case.valid, &device);
        let run = |x| layer.forward(MoeInput::new(x).valid(valid.clone()));
        let poisoned = x.clone().mask_fill(valid.clone().bool_not().unsqueeze_dim::<2>(1), poison);
        let (clean, dirty) = (run(x), run(poisoned));
        prop_assert_eq!(values(&clean.output), values(&dirty.output));
        prop_assert_eq!(clean.routing.plan.choice_row(), dirty.routing.plan.choice_row());
        for (row, valid) in values(&clean.output).chunks(case.d).zip(&case.valid) {
            prop_assert!(*valid || row.iter().all(|v| *v == 0.0), "padding came out as {row:?}");
        }
    }

    #[test]
    fn without_drops_a_token_alone_comes_out_as_in_any_batch(mut case in cases()) {
        (case.capacity, case.group) = (Capacity::Dropless, 1);
        let device = Device::default();
        let layer = layer(&case, &device);
        let x = numbers([case.t, case.d], case.seed, &device);
        let together = values(&layer.forward(x.clone()).output);
        for token in 0..case.t {
            let alone = values(&layer.forward(x.clone().narrow(0, token, 1)).output);
            prop_assert!(largest_difference(&alone, &together[token * case.d..][..case.d]) < 1e-6);
        }
    }

    #[test]
    fn without_drops_permuting_tokens_permutes_outputs(mut case in cases()) {
        (case.capacity, case.group) = (Capacity::Dropless, 1);
        let device = Device::default();
        let layer = layer(&case, &device);
        let x = numbers([case.t, case.d], case.seed, &device);
        let flipped = layer.forward(x.clone().flip([0])).output.flip([0]);
        prop_assert!(largest_difference(&values(&flipped), &values(&layer.forward(x).output)) < 1e-6);
    }

    #[test]
    fn permuting_tokens_permutes_outputs_where_experts_choose_and_where_they_mix(mut case in cases()) {
        prop_assume!(case.t > 0);
        case.group = case.t;
        let device = Device::default();
        let chosen = MoeFeedForward { assignment: ExpertChoiceConfig::new().into(), ..layer(&case, &device) };
        let soft = SoftMoeFeedForwardConfig::new(case.d, case.f, case.e).with_init_std(1.0).init(&device);
        let x = numbers([case.t, case.d], case.seed, &device);
        let flipped = x.clone().flip([0]);
        let pairs = [
            (chosen.forward(x.clone()).output, chosen.forward(flipped.clone()).output),
            (soft.forward(x).output, soft.forward(flipped).output),
        ];
        for (straight, flipped) in pairs {
            prop_assert!(largest_difference(&values(&flipped.flip([0])), &values(&straight)) < 1e-5);
        }
    }

    #[test]
    fn a_token_that_is_not_finite_touches_no_other(case in cases(), bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY)], at in any::<prop::sample::Index>()) {
        prop_assume!(case.t > 1);
        let device = Device::default();
        let layer = layer(&case, &device);
        let token = at.index(case.t);
        let mut valid = vec![true; case.t];
        let x = numbers([case.t, case.d], case.seed, &device);
        let flags: Vec<bool> = (0..case.t).map(|i| i == token).collect();
        let broken = layer.forward(x.clone().mask_fill(mask(&flags, &device).unsqueeze_dim::<2>(1), bad));
        // To the others it is as if the token were padding.
        valid[token] = false;
        let without = layer.forward(MoeInput::new(x).valid(mask(&valid, &device)));
        prop_assert_eq!(broken.routing.plan.choice_row(), without.routing.plan.choice_row());
        for (i, (a, b)) in values(&broken.output).chunks(case.d).zip(values(&without.output).chunks(case.d)).enumerate() {
            if i == token {
                prop_assert!(a.iter().all(|v| v.is_nan()), "the token hides what is wrong with it: {a:?}");
            } else {
                prop_assert_eq!(a, b);
            }
        }
    }
}

#[test]
fn gated_experts_multiply_gate_and_input() {
    let device = Device::default();
    let config = MoeFeedForwardConfig::new(3, 5, 1).with_experts(ExpertOptions::swiglu());
    let assignment = TokenChoiceConfig::new().with_top_k(1).with_gate_normalization(GateNormalization::None);
    let layer = config.with_assignment(assignment.into()).init(&device);
    let x = numbers([6, 3], 1, &device);
    // One expert: its gate is 1.
    let experts = &layer.experts;
    let weight = |w: &burn::module::Param<Tensor<3>>| w.val().squeeze_dim::<2>(0);
    let (w_gate, b_gate) = (experts.w_gate.as_ref().unwrap(), experts.b_gate.as_ref().unwrap());
    let gate = Activation::Silu.forward(x.clone().matmul(weight(w_gate)) + b_gate.val());
    let input = x.clone().matmul(weight(&experts.w_in)) + experts.b_in.as_ref().unwrap().val();
    let expected = (gate * input).matmul(weight(&experts.w_out)) + experts.b_out.as_ref().unwrap().val();
    assert!(largest_difference(&values(&layer.forward(x).output), &values(&expected)) < 1e-6);
}

#[test]
fn a_shared_expert_is_added_for_valid_tokens_only() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(4, 8, 3).with_shared_expert(Some(6)).init(&device);
    let x = numbers([5, 4], 2, &device);
    let valid = mask(&[true, true, false, true, true], &device);
    let with = values(&layer.forward(MoeInput::new(x.clone()).valid(valid.clone())).output);
    let shared = values(&layer.shared_expert.clone().unwrap().forward(x.clone().unsqueeze_dim(0)));
    let without = MoeFeedForward { shared_expert: None, ..layer };
    let routed = values(&without.forward(MoeInput::new(x).valid(valid)).output);
    for token in 0..5 {
        for i in token * 4..token * 4 + 4 {
            let expected = if token == 2 { 0.0 } else { routed[i] + shared[i] };
            assert!((with[i] - expected).abs() < 1e-6);
        }
    }
}

#[test]
fn expert_choice_per_sample_does_not_depend_on_other_samples() {
    let device = Device::default();
    let config = ExpertChoiceConfig::new().with_groups(TokenGroups::PerSample);
    let layer = MoeFeedForwardConfig::new(4, 8, 3).with_assignment(config.into()).init(&device);
    let x = numbers([5, 6, 4], 2, &device);
    let together = layer.forward(x.clone());
    // Four of six tokens for each of three experts, ceil(2 · 6 / 3), in each of five samples.
    assert_eq!(together.routing.plan.load(), [20, 20, 20]);
    for sample in 0..5 {
        let alone = values(&layer.forward(x.clone().narrow(0, sample, 1)).output);
        assert!(largest_difference(&alone, &values(&together.output)[sample * 24..][..24]) < 1e-6);
    }
}

#[test]
#[should_panic(expected = "expert choice has no protected tokens")]
fn expert_choice_refuses_protected_tokens() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(4, 8, 3).with_assignment(ExpertChoiceConfig::new().into()).init(&device);
    layer.forward(MoeInput::new(numbers([5, 4], 2, &device)).protected(mask(&[true; 5], &device)));
}

#[test]
fn towers_assign_the_slots_of_the_pooled_token_first() {
    let device = Device::default().autodiff();
    // One slot per expert, and nothing but protection to say who gets it.
    let tight = TokenChoiceConfig::new().with_training_capacity(Capacity::Fixed(1)).with_fill_order(FillOrder::TokenMajor);
    let vision_of = |protection| {
        let sparse = SparseEncoderConfig::new()
            .with_layer(RoutedLayerConfig::new().with_protection(protection).with_assignment(tight.clone().into()).into());
        let encoder = || EncoderConfig::new(8, 2, 2, 16).with_sparse(Some(sparse.clone()));
        let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
        ClipConfig::new(VisionConfig::new(encoder(), 8, 2), text, 10).init(&device)
    };
    let text = Tensor::<2, Int>::from_data([[1, 2, 3, 49, 0, 0]], &device);
    let rows_of = |routing: &Routing, token: i32| routing.plan.row_token().iter().filter(|t| **t == token).count();
    let model = vision_of(Protection::Pooled);
    assert_eq!(rows_of(&model.encode_image(numbers([1, 3, 8, 8], 3, &device)).routings[0], 0), 2);
    assert_eq!(rows_of(&model.encode_text(text.clone()).routings[0], 3), 2);
    // Without protection the first token takes both of its experts, whatever they are.
    let model = vision_of(Protection::None);
    assert_eq!(rows_of(&model.encode_text(text).routings[0], 0), 2);
}

#[test]
fn padding_is_kept_out_unless_it_is_routed() {
    let device = Device::default();
    let text_with = |padding| {
        let sparse = SparseEncoderConfig::new().with_padding(padding);
        let encoder = EncoderConfig::new(8, 2, 2, 16).with_sparse(Some(sparse));
        TextConfig::new(encoder).with_vocab_size(50).with_context_length(6).init(10, &device)
    };
    let text = Tensor::<2, Int>::from_data([[1, 2, 3, 49, 0, 0]], &device);
    let rows_of = |padding| text_with(padding).forward(text.clone()).routings[0].plan.num_rows();
    assert_eq!((rows_of(Padding::Excluded), rows_of(Padding::Routed)), (8, 12));
}

#[test]
fn expert_choice_in_a_tower_groups_by_sample() {
    let device = Device::default();
    let sparse =
        SparseEncoderConfig::new().with_layer(RoutedLayerConfig::new().with_assignment(ExpertChoiceConfig::new().into()).into());
    let encoder = EncoderConfig::new(8, 2, 2, 16).with_sparse(Some(sparse)).init(&device);
    let x = numbers([3, 5, 8], 1, &device);
    let run = |x: Tensor<3>| values(&encoder.forward(x, TokenMarks::default(), false).hidden);
    let together = run(x.clone());
    assert!(largest_difference(&run(x.narrow(0, 1, 1)), &together[40..80]) < 1e-6);
}

#[test]
fn every_rank_gives_the_same_tokens() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(4, 8, 3).init(&device);
    let x = numbers([12, 4], 5, &device);
    let flat = values(&layer.forward(x.clone()).output);
    let three = layer.forward(x.clone().reshape([3, 4, 4])).output;
    let four = layer.forward(x.reshape([2, 3, 2, 4])).output;
    assert_eq!((three.dims(), four.dims()), ([3, 4, 4], [2, 3, 2, 4]));
    assert_eq!(values(&three), flat);
    assert_eq!(values(&four), flat);
}

#[test]
fn repeated_runs_are_equal_to_the_bit() {
    let device = Device::default().autodiff();
    let layer = MoeFeedForwardConfig::new(16, 32, 8).init(&device);
    let x = numbers([200, 16], 1, &device).require_grad();
    let run = || {
        let output = layer.forward(x.clone()).output;
        let gradients = output.clone().square().sum().backward();
        (values(&output), values(&x.grad(&gradients).unwrap()), values(&layer.experts.w_in.grad(&gradients).unwrap()))
    };
    let first = run();
    (0..4).for_each(|_| assert_eq!(run(), first));
}

/// Central differences of `Σ output · cotangent` against backward, for every parameter and the tokens.
#[test]
fn gradients_are_those_of_finite_differences() {
    let device = Device::default().autodiff();
    for (capacity, normalization) in [
        (Capacity::Dropless, GateNormalization::BeforeDrop),
        (Capacity::Fixed(3), GateNormalization::BeforeDrop),
        (Capacity::Fixed(3), GateNormalization::AfterDrop),
        (Capacity::Fixed(3), GateNormalization::None),
    ] {
        device.seed(3);
        let assignment = TokenChoiceConfig::new().with_training_capacity(capacity).with_gate_normalization(normalization);
        let layer = MoeFeedForwardConfig::new(3, 5, 4)
            .with_assignment(assignment.into())
            .with_router(RouterOptions::new().with_init_std(2.0))
            .with_experts(ExpertOptions::new().with_activation(Activation::Silu))
            .init(&device);
        let x = numbers([7, 3], 11, &device).require_grad();
        let cotangent = numbers([7, 3], 12, &device);
        let loss = |layer: &MoeFeedForward, x: &Tensor<2>| (layer.forward(x.clone()).output * cotangent.clone()).sum();
        let slots = layer.forward(x.clone()).routing.plan.choice_row().to_vec();
        let gradients = loss(&layer, &x).backward();
        let step = 1e-2f32;
        let check = |name: &str, analytic: Vec<f32>, shifted: &dyn Fn(usize, f32) -> (f32, Vec<i32>)| {
            let mut compared = 0;
            for (i, found) in analytic.iter().enumerate() {
                let ((up, a), (down, b)) = (shifted(i, step), shifted(i, -step));
                // A step that moves a token to another expert says nothing about the gradient.
                if a != slots || b != slots {
                    continue;
                }
                compared += 1;
                let numeric = (up - down) / (2.0 * step);
                assert!((found - numeric).abs() < 5e-3 * numeric.abs().max(1.0), "{name}[{i}]: {found}, numerically {numeric}");
            }
            assert!(2 * compared > analytic.len(), "{name}: only {compared} of {} were compared", analytic.len());
        };
        let run = |layer: &MoeFeedForward, x: &Tensor<2>| {
            let loss = loss(layer, x).into_scalar::<f32>();
            (loss, layer.forward(x.clone()).routing.plan.choice_row().to_vec())
        };
        check("tokens", values(&x.grad(&gradients).unwrap()), &|i, by| run(&layer, &nudge(&x, i, by)));
        macro_rules! check_param {
            ($($field:ident).+) => {
                check(stringify!($($field).+), values(&layer.$($field).+.grad(&gradients).unwrap()), &|i, by| {
                    let mut moved = layer.clone();
                    moved.$($field).+ = moved.$($field).+.map(|w| nudge(&w, i, by).require_grad());
                    run(&moved, &x)
                });
            };
        }
        check_param!(router.weight);
        check_param!(experts.w_in);
        check_param!(experts.w_out);
        let b_in = layer.experts.b_in.as_ref().unwrap();
        check("b_in", values(&b_in.grad(&gradients).unwrap()), &|i, by| {
            let mut moved = layer.clone();
            moved.experts.b_in = moved.experts.b_in.map(|b| b.map(|b| nudge(&b, i, by).require_grad()));
            run(&moved, &x)
        });
        let b_out = layer.experts.b_out.as_ref().unwrap();
        check("b_out", values(&b_out.grad(&gradients).unwrap()), &|i, by| {
            let mut moved = layer.clone();
            moved.experts.b_out = moved.experts.b_out.map(|b| b.map(|b| nudge(&b, i, by).require_grad()));
            run(&moved, &x)
        });
    }
}

fn nudge<const D: usize>(tensor: &Tensor<D>, index: usize, by: f32) -> Tensor<D> {
    let mut data = values(tensor);
    data[index] += by;
    let shape = tensor.dims();
    Tensor::from_data(burn::tensor::TensorData::new(data, shape), &tensor.device())
}

#[test]
fn a_frozen_layer_behaves_as_at_inference_on_the_training_device() {
    let device = Device::default().autodiff();
    let tight = TokenChoiceConfig::new().with_training_capacity(Capacity::OfTokens(0.5));
    let layer = MoeFeedForwardConfig::new(4, 8, 4).with_assignment(tight.into()).init(&device);
    let x = numbers([32, 4], 2, &device);
    assert!(layer.forward(x.clone()).routing.plan.dropped() > 0.0);
    assert_eq!(layer.freeze().forward(x).routing.plan.dropped(), 0.0);
}
