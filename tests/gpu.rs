//! The GPU kernels against plain tensor operations on the CPU: outputs, and all gradients. With `--features wgpu`, and `fusion` or not;
//! `BURN_MOE_DEVICE` names another device than `wgpu`.
//!
//! One binary, because the first use of a GPU in a process takes its time.

use std::hash::{DefaultHasher, Hash, Hasher};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, read_sync};
use burn_moe::{
    Activation, AuxiliaryLossConfig, BalancingOptions, Capacity, ExpertChoiceConfig, ExpertGroups, ExpertOptions, FeedForwardForm,
    FillOrder, GateNormalization, MoeFeedForward, MoeFeedForwardConfig, MoeInput, RouterOptions, RouterScore, Routing,
    TokenChoiceConfig, TokenGroups,
    clip::{ClipConfig, SparseClipConfig, contrastive_loss},
    kernels::Kernels,
    loss::load_balancing_loss,
    stats::RoutingStats,
    transformer::MlpConfig,
};

#[path = "it/outcome.rs"]
mod outcome;
#[path = "it/support.rs"]
mod support;
#[allow(dead_code)]
#[path = "../examples/verify.rs"]
mod verify;

use outcome::{Outcome, assert_same, biased_router, run_layer};
use support::{ROOT, mask, numbers, values};
use verify::support::device_by_name;

const ACTIVATIONS: [Activation; 5] =
    [Activation::Gelu, Activation::GeluTanh, Activation::QuickGelu, Activation::Relu, Activation::Silu];

fn gpu_name() -> String {
    std::env::var("BURN_MOE_DEVICE").unwrap_or("wgpu".into())
}

fn gpu() -> Device {
    device_by_name(&gpu_name()).unwrap_or_else(|error| panic!("{error}"))
}

/// For results that went through burn's own products of f32, which may be TF32 on NVIDIA's tensor cores.
fn of_products(tolerance: f32) -> f32 {
    if gpu_name() == "cuda" { tolerance.max(2e-2) } else { tolerance }
}

fn on_cpu(layer: &MoeFeedForward, x: &Tensor<2>, valid: &[bool]) -> Outcome {
    run_layer(layer, x, valid, Kernels::Reference)
}

fn on_gpu(layer: &MoeFeedForward, x: &Tensor<2>, valid: &[bool]) -> Outcome {
    let device = gpu().autodiff();
    run_layer(&layer.clone().fork(&device), &x.clone().to_device(&device), valid, Kernels::Fastest)
}

/// A layer whose router is the same in every run: by chance, two scores may be so close that rounding decides.
fn init(config: &MoeFeedForwardConfig, device: &Device) -> MoeFeedForward {
    let mut layer = config.init(device);
    let shape = layer.router.weight.shape().dims();
    layer.router.weight = Param::from_tensor(numbers::<2>(shape, 11, device));
    layer
}

/// Every fifth token is padding.
fn some_valid(num_tokens: usize) -> Vec<bool> {
    (0..num_tokens).map(|t| t % 5 != 4).collect()
}

#[test]
fn the_layer_and_its_gradients_are_those_of_the_cpu() {
    let device = Device::flex().autodiff();
    let sizes = [(1, 4, 8, 2), (7, 3, 5, 3), (65, 16, 64, 12), (257, 24, 40, 5), (33, 130, 200, 4)];
    for (i, (t, d, f, e)) in sizes.into_iter().enumerate() {
        for (capacity, bias, skewed) in
            [(Capacity::Dropless, true, false), (Capacity::Fixed(2), false, false), (Capacity::Dropless, true, true)]
        {
            let activation = ACTIVATIONS[i % ACTIVATIONS.len()];
            let assignment = TokenChoiceConfig::new().with_training_capacity(capacity);
            let experts = ExpertOptions::new().with_bias(bias).with_activation(activation);
            let layer = init(&MoeFeedForwardConfig::new(d, f, e).with_assignment(assignment.into()).with_experts(experts), &device);
            let layer = if skewed { biased_router(layer) } else { layer };
            let x = if skewed { numbers([t, d], 3, &device).abs() } else { numbers([t, d], 3, &device) };
            let valid = some_valid(t);
            let case = format!("T {t} D {d} F {f} E {e} {capacity:?} bias {bias} skewed {skewed}");
            assert_same(&on_gpu(&layer, &x, &valid), &on_cpu(&layer, &x, &valid), 1e-5, &case);
        }
    }
}

/// Enough rows, of widths that parts of a buffer can have, for a product by expert.
#[test]
fn experts_with_many_rows_are_computed_one_by_one() {
    let device = Device::flex().autodiff();
    for (capacity, skewed) in [(Capacity::Dropless, false), (Capacity::OfTokens(2.0), false), (Capacity::Dropless, true)] {
        let assignment = TokenChoiceConfig::new().with_training_capacity(capacity);
        let layer = init(&MoeFeedForwardConfig::new(64, 128, 3).with_assignment(assignment.into()), &device);
        // Skewed, one expert has no row at all.
        let layer = if skewed { biased_router(layer) } else { layer };
        let x = if skewed { numbers([600, 64], 3, &device).abs() } else { numbers([600, 64], 3, &device) };
        let valid = some_valid(600);
        let case = format!("{capacity:?} skewed {skewed}");
        assert_same(&on_gpu(&layer, &x, &valid), &on_cpu(&layer, &x, &valid), of_products(1e-5), &case);
    }
}

#[test]
fn gated_and_shared_experts_and_expert_choice_are_those_of_the_cpu() {
    let device = Device::flex().autodiff();
    let config = MoeFeedForwardConfig::new(10, 24, 4);
    let clamped = ExpertOptions::swiglu().with_form(FeedForwardForm::ClampedGated { limit: 0.4, alpha: 1.702 });
    let grouped = TokenChoiceConfig::new().with_gate_scale(2.5).with_expert_groups(Some(ExpertGroups::new(2, 1)));
    for config in [
        config.clone().with_experts(ExpertOptions::swiglu()).with_shared_expert(Some(12)),
        config.clone().with_experts(clamped).with_router(RouterOptions::new().with_bias(true)),
        config.clone().with_assignment(grouped.into()).with_shared_expert(Some(12)).with_shared_expert_gate(true),
        config.with_assignment(ExpertChoiceConfig::new().into()),
    ] {
        let layer = init(&config, &device);
        let (x, valid) = (numbers([50, 10], 3, &device), some_valid(50));
        assert_same(&on_gpu(&layer, &x, &valid), &on_cpu(&layer, &x, &valid), of_products(1e-5), &format!("{layer}"));
    }
}

#[test]
fn strided_input_is_read_in_its_own_order() {
    let device = gpu().autodiff();
    let layer = init(&MoeFeedForwardConfig::new(6, 12, 3), &device);
    let x = numbers([6, 20], 1, &device).transpose();
    let copy = Tensor::<2>::from_data(x.to_data(), &device);
    let [strided, contiguous] = [x, copy].map(|x| run_layer(&layer, &x, &[true; 20], Kernels::Fastest));
    assert_same(&strided, &contiguous, 1e-6, "transposed input");
}

/// Tokens that are not finite, or too large for the router, are NaN themselves, and spoil no gradient.
#[test]
fn tokens_that_are_not_finite_touch_no_other() {
    let device = Device::flex().autodiff();
    let good = values(&numbers::<2>([40, 6], 3, &device));
    let scores = [RouterScore::Softmax, RouterScore::Sigmoid];
    for (score, bad) in scores.into_iter().flat_map(|score| [f32::NAN, f32::INFINITY, 3e38].map(|bad| (score, bad))) {
        let router = RouterOptions::new().with_score(score);
        let layer = init(&MoeFeedForwardConfig::new(6, 12, 3).with_router(router), &device);
        let mut x = good.clone();
        x[17 * 6..18 * 6].fill(bad);
        if !bad.is_finite() {
            x[4 * 6 + 2] = bad;
        }
        let bad_tokens = if bad.is_finite() { 1 } else { 2 };
        let x = Tensor::<1>::from_floats(&x[..], &device).reshape([40, 6]);
        let [found, expected] = [on_gpu(&layer, &x, &[true; 40]), on_cpu(&layer, &x, &[true; 40])];
        let nans = |outcome: &Outcome| -> Vec<Vec<bool>> {
            outcome.iter().map(|(_, values)| values.iter().map(|v| v.is_nan()).collect()).collect()
        };
        let expected_nans = nans(&expected);
        assert_eq!(nans(&found), expected_nans, "{score:?} {bad}");
        assert_eq!(
            expected_nans[0].iter().filter(|is_nan| **is_nan).count(),
            6 * bad_tokens,
            "{score:?} {bad}: these tokens of the output"
        );
        assert!(!expected_nans[2..].iter().flatten().any(|is_nan| *is_nan), "{score:?} {bad}: no gradient of a weight");
        let without = |outcome: Outcome| -> Outcome {
            outcome
                .into_iter()
                .map(|(name, values)| (name, values.into_iter().map(|v| if v.is_nan() { 0.0 } else { v }).collect()))
                .collect()
        };
        assert_same(&without(found), &without(expected), 1e-5, &format!("{score:?} {bad}"));
    }
}

/// As on the CPU, where a maximum would make 0 of it.
#[test]
fn relu_keeps_what_is_not_a_number() {
    let mlp = MlpConfig::new(4, 8).with_activation(Activation::Relu).init(&gpu());
    let out = mlp.forward(Tensor::<2>::from_floats([[f32::NAN; 4], [1.0; 4]], &gpu()));
    let is_nan: Vec<bool> = values(&out).into_iter().map(f32::is_nan).collect();
    assert_eq!(is_nan, [true, true, true, true, false, false, false, false]);
}

#[test]
fn frozen_weights_get_no_gradient_and_the_input_still_does() {
    let layer = init(&MoeFeedForwardConfig::new(6, 12, 3), &Device::flex().autodiff()).freeze();
    let x = numbers([20, 6], 1, &Device::flex().autodiff());
    let outcome = on_gpu(&layer, &x, &[true; 20]);
    assert_eq!(outcome.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["output", "x"]);
    assert_same(&outcome, &on_cpu(&layer, &x, &[true; 20]), 1e-5, "frozen");
}

#[test]
fn more_choices_than_cubes_on_one_axis_are_all_computed() {
    let device = Device::flex().autodiff();
    let layer = init(&MoeFeedForwardConfig::new(4, 4, 4), &device);
    let (x, valid) = (numbers([40_000, 4], 3, &device), vec![true; 40_000]);
    assert_same(&on_gpu(&layer, &x, &valid), &on_cpu(&layer, &x, &valid), 1e-4, "40,000 tokens");
}

#[test]
fn results_are_the_same_to_the_bit_in_every_run() {
    let device = Device::flex().autodiff();
    let mut layer = init(&MoeFeedForwardConfig::new(48, 96, 6), &device);
    layer.experts.w_in = Param::from_tensor(numbers([6, 48, 96], 12, &device));
    layer.experts.w_out = Param::from_tensor(numbers([6, 96, 48], 13, &device));
    layer.experts.b_in = Some(Param::from_tensor(numbers([6, 96], 14, &device)));
    layer.experts.b_out = Some(Param::from_tensor(numbers([6, 48], 15, &device)));
    let (x, valid) = (numbers([300, 48], 3, &device), some_valid(300));
    let first = on_gpu(&layer, &x, &valid);
    for _ in 0..4 {
        assert_eq!(on_gpu(&layer, &x, &valid), first);
    }
    // For comparing processes, with `--nocapture`.
    for (name, values) in first {
        let mut digest = DefaultHasher::new();
        values.iter().for_each(|value| value.to_bits().hash(&mut digest));
        println!("digest of {name}: {:016x}", digest.finish());
    }
}

/// The slots that the GPU assigns against those of the host, with everything that decides about them.
#[test]
fn slots_are_assigned_as_on_the_host() {
    let cpu = Device::flex();
    for (t, e, k, groups) in [
        (1, 3, 2, TokenGroups::Whole),
        (7, 5, 1, TokenGroups::Whole),
        (40, 4, 2, TokenGroups::OfSize(8)),
        (1000, 8, 2, TokenGroups::Whole),
        (3000, 16, 4, TokenGroups::OfSize(500)),
        (600, 32, 16, TokenGroups::Whole),
    ] {
        for (case, order) in [FillOrder::ChoiceMajor, FillOrder::TokenMajor].into_iter().cycle().take(13).enumerate() {
            let factor = [0.3, 0.9, 1.6][case % 3];
            let capacity = if case < 8 { Capacity::OfBalancedLoad(factor) } else { Capacity::Dropless };
            let normalization = if k == 1 { GateNormalization::None } else { GateNormalization::AfterDrop };
            let assignment = TokenChoiceConfig::new().with_top_k(k).with_inference_capacity(capacity).with_fill_order(order);
            let limited = (e >= 8 && case % 2 == 0).then(|| ExpertGroups::new(4, 3));
            let assignment = assignment
                .with_groups(groups)
                .with_gate_normalization(normalization)
                .with_expert_groups(limited)
                .with_gate_scale(1.5);
            let router = RouterOptions::new()
                .with_balancing((case % 2 == 1).then(|| BalancingOptions::new(0.02)))
                .with_logit_normalization((case % 3 == 2).then_some(1.5));
            let mut layer = init(&MoeFeedForwardConfig::new(6, 8, e).with_router(router).with_assignment(assignment.into()), &cpu);
            layer.router = layer.router.update_balancing_bias(&(0..e).collect::<Vec<_>>());
            let mut x = values(&numbers([t, 6], case as u64 + 1, &cpu));
            // Ties, and a token that cannot be routed.
            x.copy_within(0..6, (t - 1) * 6);
            if t > 4 {
                x[4 * 6 + 2] = f32::INFINITY;
            }
            let flags = |period: usize| (0..t).map(|i| i % period != period - 1).collect::<Vec<_>>();
            let forward = |layer: &MoeFeedForward, device: &Device| {
                let mut input = MoeInput::new(Tensor::<1>::from_floats(&x[..], device).reshape([t, 6]));
                if case % 3 != 0 {
                    input = input.valid(mask(&flags(5), device));
                }
                if case % 8 >= 4 {
                    input = input.protected(mask(&flags(2), device));
                }
                layer.forward(input)
            };
            let (found, expected) = (forward(&layer.clone().to_device(&gpu()), &gpu()), forward(&layer, &cpu));
            let (plan, host) = (&found.routing.plan, &expected.routing.plan);
            let name = format!("T {t} E {e} K {k} {groups:?} case {case}");
            assert_eq!(plan.choice_row(), host.choice_row(), "{name}");
            assert_eq!(plan.row_token(), host.row_token(), "{name}");
            assert_eq!(
                (plan.requested(), plan.offsets(), plan.non_finite_tokens()),
                (host.requested(), host.offsets(), host.non_finite_tokens()),
                "{name}"
            );
            assert_eq!(plan.kept_per_choice(), host.kept_per_choice(), "{name}");
            let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5 || (a.is_nan() && b.is_nan()));
            assert!(same(&values(&plan.gates()), &values(&host.gates())), "{name}");
            assert!(same(&values(&found.output), &values(&expected.output)), "{name}");
            let [loss, host_loss] = [&found, &expected].map(|output| values(&load_balancing_loss(&output.routing)));
            assert!(same(&loss, &host_loss), "{name}: {loss:?}, {host_loss:?}");
        }
    }
}

/// Both passes and the losses leave the assignment and the masks where they are; the host has them once it reads them.
#[test]
fn the_host_reads_no_assignment_where_a_capacity_is_fixed() {
    let device = gpu().autodiff();
    let unread = |routing: &Routing| format!("{:?} {:?}", routing.plan, routing.valid).matches("<uninit>").count();
    let router = RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.1)));
    let assignment = TokenChoiceConfig::new().with_training_capacity(Capacity::OfTokens(4.0));
    let layer = init(&MoeFeedForwardConfig::new(8, 16, 4).with_router(router).with_assignment(assignment.into()), &device);
    let input =
        MoeInput::new(numbers([30, 8], 1, &device)).valid(mask(&some_valid(30), &device)).protected(mask(&[true; 30], &device));
    let output = layer.forward(input);
    let losses = AuxiliaryLossConfig::new().init().forward(std::slice::from_ref(&output.routing));
    drop((output.output.sum() + losses.total).backward());
    assert_eq!(unread(&output.routing), 2, "{:?}", output.routing.plan);
    assert_eq!((output.routing.plan.num_rows(), output.routing.num_valid()), (48, 24));
    assert_eq!(unread(&output.routing), 0);

    // Read without waiting, for a browser: what is counted is the same.
    let again = layer.forward(MoeInput::new(numbers([30, 8], 1, &device)).valid(mask(&some_valid(30), &device)));
    read_sync(again.routing.read_async());
    assert_eq!(unread(&again.routing), 0);
    let cpu = Device::flex().autodiff();
    let expected = layer.clone().fork(&cpu).forward(MoeInput::new(numbers([30, 8], 1, &cpu)).valid(mask(&some_valid(30), &cpu)));
    assert_eq!(again.routing.plan.row_token(), expected.routing.plan.row_token());
    let [found, expected] = [&again, &expected].map(|output| read_sync(RoutingStats::new_async(&output.routing)));
    assert_eq!((&found.load, &found.requested, found.num_valid), (&expected.load, &expected.requested, 24));
    assert!((found.entropy - expected.entropy).abs() < 1e-5, "{found:?} {expected:?}");

    // Without a limit and without padding, neither (in numbers and sizes whose experts are computed in one launch): offsets and plan.
    let output = layer.valid().forward(numbers([30, 8], 1, &gpu()));
    assert_eq!(unread(&output.routing), 2, "{:?}", output.routing.plan);
    assert_eq!((output.routing.plan.num_rows(), unread(&output.routing)), (60, 0));
}

struct Cast(DType);

impl ModuleMapper for Cast {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| value.cast(self.0).detach().require_grad())
    }
}

/// The layer in 16 bits on the GPU, and in 32 on the CPU from the same rounded numbers. Sums are in f32, so the two differ by the
/// rounding of what passes from kernel to kernel.
fn in_16_bits(dtype: DType, tolerance: f32) {
    let cpu = Device::flex().autodiff();
    // Widths that are whole vectors and whole tiles, and widths that are neither; experts with several tiles of rows, and one without rows; more
    // tiles than a card has processors.
    let sizes = [
        (90, 40, 72, 4, false),
        (700, 128, 256, 3, true),
        (700, 136, 264, 3, false),
        (90, 41, 77, 4, true),
        (1300, 264, 2056, 8, false),
    ];
    for (t, d, f, e, skewed) in sizes {
        for experts in [ExpertOptions::new(), ExpertOptions::swiglu()] {
            let layer = init(&MoeFeedForwardConfig::new(d, f, e).with_experts(experts), &cpu);
            let layer = if skewed { biased_router(layer) } else { layer };
            let layer = layer.map(&mut Cast(dtype)).map(&mut Cast(DType::F32));
            let x = if skewed { numbers([t, d], 3, &cpu).abs() } else { numbers([t, d], 3, &cpu) };
            let x = x.cast(dtype).cast(DType::F32);
            let valid = some_valid(t);
            let gpu = gpu().autodiff();
            let small = layer.clone().fork(&gpu).map(&mut Cast(dtype));
            let found = run_layer(&small, &x.clone().to_device(&gpu).cast(dtype).detach(), &valid, Kernels::Fastest);
            let case = format!("{dtype:?} T {t} D {d} skewed {skewed} {layer}");
            assert_same(&found, &on_cpu(&layer, &x, &valid), tolerance, &case);
        }
    }
}

#[test]
fn half_precision_is_rounded_and_no_more() {
    in_16_bits(DType::F16, 2e-3);
}

#[test]
fn brain_floats_are_rounded_and_no_more() {
    if !gpu().supports_dtype(DType::BF16) {
        println!("untested: this device has no bf16");
        return;
    }
    in_16_bits(DType::BF16, 2e-2);
}

#[test]
fn reference_cases_pass() {
    for entry in std::fs::read_dir(format!("{ROOT}/tests/fixtures")).unwrap() {
        let case = entry.unwrap().path();
        if !case.is_dir() {
            continue;
        }
        let mut errors = verify::Errors::new(verify::usual_slack(&gpu_name()));
        verify::run(&case, &gpu(), &mut errors).unwrap();
        assert!(
            errors.checked > 0 && errors.above == 0,
            "{}: {} of {} tensors are off",
            case.display(),
            errors.above,
            errors.checked
        );
    }
}

#[test]
fn a_sparse_clip_learns_the_same() {
    let config = ClipConfig::tiny().sparse(SparseClipConfig::clip_up());
    let cpu = Device::flex().autodiff();
    let model = config.init(&cpu);
    let run = |device: &Device| {
        let model = model.clone().fork(device);
        let images = numbers([4, 3, 32, 32], 5, device);
        let ids: Vec<i32> = (0..4 * 24).map(|i| if i % 24 > 9 + i / 24 { 0 } else { 400 + i * 7 }).collect();
        let ids: Vec<i32> = ids
            .chunks(24)
            .enumerate()
            .flat_map(|(b, row)| {
                let mut row = row.to_vec();
                row[10 + b] = 49407;
                row
            })
            .collect();
        let texts = Tensor::<1, burn::tensor::Int>::from_ints(&ids[..], device).reshape([4, 24]);
        let output = model.forward(images, texts);
        let loss = contrastive_loss(output.logits_per_image.clone());
        let grads = loss.backward();
        let experts = model.vision.patch_embedding.weight.val().grad(&grads).unwrap();
        vec![
            ("loss", values(&loss)),
            ("patches", values(&experts)),
            ("tokens", values(&model.text.token_embedding.weight.val().grad(&grads).unwrap())),
        ]
    };
    // New token embeddings are small, and the norm behind them makes much of every rounding: plain operations on the GPU are as far off.
    assert_same(&run(&gpu().autodiff()), &run(&cpu), of_products(1e-3), "tiny CLIP");
}
