//! Empty batches, tokens that are not finite, half precision, and public pieces given sizes that do not fit.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{
    activation::ActivationConfig,
    transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig},
};
use burn::tensor::{Bool, DType, Device, Distribution, FloatDType, Int, Tensor};
use burn_moe::{
    Activation, AssignmentConfig, AuxiliaryLossConfig, BalancingOptions, Capacity, ExpertChoiceConfig, ExpertOptions,
    MoeFeedForward, MoeFeedForwardConfig, MoeInput, RouterOptions, RouterScore, SoftMoeFeedForwardConfig, TokenChoiceConfig,
    TokenGroups, UpcycleFromDense, UpcycleOptions,
    clip::{ClipConfig, SparseClipConfig, TextConfig, VisionConfig, tokenizer::ClipTokenizer},
    kernels::{Kernels, with_kernels},
    routing::{AssignmentInput, BatchTotals, DispatchPlan, Dispatcher, Phase, TokenMask},
    stats::RoutingStats,
    transformer::{EncoderConfig, MlpConfig},
    upcycle::{Probe, Rest, RouterStart, UpcycleFromMany, UpcycleManyOptions},
};

use super::support::{largest_difference, numbers, values};

fn flags<const N: usize>(flags: [bool; N]) -> Option<TokenMask> {
    Some(TokenMask::new(Tensor::<1, Bool>::from_data(flags, &Device::default())))
}

/// The text of a panic.
pub(crate) fn panic_of<R>(body: impl FnOnce() -> R) -> String {
    let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) else { return "no panic".into() };
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
        .unwrap_or_default()
}

#[test]
fn the_default_training_capacity_holds_an_even_routing_of_any_top_k() {
    // Token t chooses the experts t, t + 1, … of 8: an even load.
    for top_k in [2, 4, 8] {
        let scores: Vec<f32> = (0..16).flat_map(|t| (0..8).map(move |e| 1.0 / (1.0 + ((e + 8 - t % 8) % 8) as f32))).collect();
        let scores = Tensor::<1>::from_floats(&scores[..], &Device::default()).reshape([16, 8]);
        let assignment = AssignmentConfig::from(TokenChoiceConfig::new().with_top_k(top_k));
        let plan = assignment.assign(&AssignmentInput::new(scores, Phase::Training));
        assert_eq!((plan.dropped(), plan.load()), (0.0, vec![2 * top_k; 8]), "{top_k} choices");
    }
}

/// A layer on the training device whose tokens are all routed.
fn trained(score: RouterScore, shared: bool) -> MoeFeedForward {
    let device = Device::default().autodiff();
    device.seed(5);
    let router = RouterOptions::new().with_init_std(1.0).with_score(score).with_noise(0.0).with_bias(shared);
    let choice = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let config = MoeFeedForwardConfig::new(6, 10, 4).with_router(router).with_assignment(choice.into());
    config.with_shared_expert(shared.then_some(5)).with_shared_expert_gate(shared).init(&device)
}

/// All gradients of the layer, for a loss that reads the first `tokens` tokens and the auxiliary losses.
fn gradients(layer: &MoeFeedForward, x: Tensor<2>, tokens: usize) -> (f32, Vec<Vec<f32>>) {
    let x = x.require_grad();
    let result = layer.forward(x.clone());
    let z = if layer.router.score == RouterScore::Softmax { 0.01 } else { 0.0 };
    let weights = AuxiliaryLossConfig::new().with_load_balancing(1.0).with_router_z(z).with_importance(1.0);
    let auxiliary = weights.with_local_entropy(0.1).with_global_entropy(0.1).init().forward(&[result.routing]).total;
    let loss = result.output.narrow(0, 0, tokens).square().sum() + auxiliary;
    let grads = loss.backward();
    let experts = &layer.experts;
    let mut found = vec![
        values(&layer.router.weight.val().grad(&grads).unwrap()),
        values(&experts.w_in.val().grad(&grads).unwrap()),
        values(&experts.w_out.val().grad(&grads).unwrap()),
        values(&x.grad(&grads).unwrap().narrow(0, 0, tokens)),
    ];
    if let Some(shared) = &layer.shared_expert {
        found.push(values(&shared.w_in.val().grad(&grads).unwrap()));
    }
    if let (Some(bias), Some(gate)) = (&layer.router.bias, &layer.shared_expert_gate) {
        found.push(values(&bias.val().grad(&grads).unwrap()));
        found.push(values(&gate.val().grad(&grads).unwrap()));
    }
    (loss.into_scalar::<f32>(), found)
}

#[test]
fn a_token_that_is_not_finite_changes_no_gradient_and_no_loss() {
    let device = Device::default().autodiff();
    let good = Tensor::<2>::random([7, 6], Distribution::Normal(0.0, 1.0), &device);
    for (score, shared) in [(RouterScore::Softmax, true), (RouterScore::Softmax, false), (RouterScore::Sigmoid, true)] {
        let layer = trained(score, shared);
        for bad in [f32::NAN, f32::INFINITY, 3e38] {
            let row = Tensor::<2>::full([1, 6], bad, &device);
            let x = Tensor::cat(vec![good.clone(), row], 0);
            for kernels in [Kernels::Fastest, Kernels::Reference] {
                with_kernels(kernels, || {
                    let (expected, found) = (gradients(&layer, good.clone(), 7), gradients(&layer, x.clone(), 7));
                    assert!((expected.0 - found.0).abs() < 1e-4 * expected.0.abs(), "{score:?} {bad}: {} {}", expected.0, found.0);
                    for (index, (a, b)) in expected.1.iter().zip(&found.1).enumerate() {
                        let largest = a.iter().fold(1.0f32, |most, v| most.max(v.abs()));
                        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 * largest), "{score:?} {bad}, gradient {index}");
                    }
                });
            }
        }
    }
}

#[test]
fn statistics_leave_tokens_out_that_are_not_finite() {
    let layer = trained(RouterScore::Softmax, false);
    let device = Device::default().autodiff();
    let x = Tensor::<2>::from_floats([[1.0, 2.0, 0.5, 0.1, 0.2, 0.3], [f32::NAN; 6]], &device);
    let (with, without) = (layer.forward(x.clone()).routing, layer.forward(x.narrow(0, 0, 1)).routing);
    assert_eq!(with.plan.non_finite_tokens(), [1]);
    let (with, without) = (RoutingStats::new(&with), RoutingStats::new(&without));
    assert_eq!((with.confidence, with.entropy, with.load), (without.confidence, without.entropy, without.load));
}

#[test]
fn micro_batches_with_tokens_that_are_not_finite_make_up_the_batch() {
    let layer = trained(RouterScore::Softmax, false);
    let device = Device::default().autodiff();
    let mut x = values(&numbers::<2>([12, 6], 8, &device));
    x[..4 * 6].fill(f32::NAN);
    x[7 * 6] = f32::INFINITY;
    let x = Tensor::<1>::from_floats(&x[..], &device).reshape([12, 6]);
    let loss = AuxiliaryLossConfig::new().with_local_entropy(0.1).init();
    let gradient = |loss: &Tensor<1>| values(&layer.router.weight.val().grad(&loss.backward()).unwrap());
    let route = |x: Tensor<2>| layer.forward(x).routing;
    let whole = loss.forward(&[route(x.clone())]).total;
    // The second is not finite as a whole.
    let parts = [(4, 3), (0, 4), (7, 5)].map(|(first, count)| route(x.clone().narrow(0, first, count)));
    let mut totals = BatchTotals::default();
    parts.iter().for_each(|part| totals.add(std::slice::from_ref(part)));
    assert_eq!(totals.tokens, [7]);
    let sum = parts.iter().map(|part| loss.forward_micro_batch(std::slice::from_ref(part), &totals)).reduce(|a, b| a + b).unwrap();
    assert!((values(&whole)[0] - values(&sum)[0]).abs() < 1e-6, "{:?} {:?}", values(&whole), values(&sum));
    assert!(largest_difference(&gradient(&whole), &gradient(&sum)) < 1e-6);

    let stats = parts.each_ref().map(RoutingStats::new);
    assert_eq!(stats.each_ref().map(|stats| (stats.num_valid, stats.num_counted)), [(3, 3), (4, 0), (5, 4)]);
    let (mean, expected) = (RoutingStats::mean(&stats).unwrap(), RoutingStats::new(&route(x)));
    assert!((mean.confidence - expected.confidence).abs() < 1e-6 && (mean.load[0] - expected.load[0]).abs() < 1e-6, "{mean:?}");
    assert_eq!((mean.num_valid, mean.num_counted), (12, 7));
}

#[test]
fn a_batch_without_tokens_comes_out_empty() {
    for device in [Device::default(), Device::default().autodiff()] {
        for kernels in [Kernels::Fastest, Kernels::Reference] {
            with_kernels(kernels, || {
                let empty = |shape: [usize; 3]| Tensor::<3>::zeros(shape, &device);
                let config = MoeFeedForwardConfig::new(6, 10, 4).with_shared_expert(Some(3));
                let expert_choice = ExpertChoiceConfig::new().with_groups(TokenGroups::PerSample);
                for config in [config.clone(), config.with_assignment(expert_choice.into())] {
                    let layer = config.init(&device);
                    for shape in [[2, 0, 6], [0, 5, 6], [0, 0, 6]] {
                        let result = layer.forward(empty(shape));
                        assert_eq!((result.output.dims(), result.routing.plan.num_rows()), (shape, 0));
                        let total = AuxiliaryLossConfig::new().init().forward(&[result.routing]).total;
                        assert_eq!(total.into_scalar::<f32>(), 0.0);
                        let valid = Tensor::<2, Bool>::full([shape[0], shape[1]], true, &device);
                        assert_eq!(layer.forward(MoeInput::new(empty(shape)).valid(valid)).output.dims(), shape);
                    }
                    assert_eq!(layer.forward(Tensor::<2>::zeros([0, 6], &device)).output.dims(), [0, 6]);
                }
                let soft = SoftMoeFeedForwardConfig::new(6, 10, 4).init(&device);
                let mlp = MlpConfig::new(6, 10).init(&device);
                for shape in [[2, 0, 6], [0, 5, 6]] {
                    assert_eq!(soft.forward(empty(shape)).output.dims(), shape);
                    assert_eq!(mlp.forward(empty(shape)).dims(), shape);
                }
            });
        }
    }
}

#[test]
fn a_dispatcher_of_an_empty_plan_gives_zeros() {
    let device = Device::default();
    let scores = Tensor::<2>::full([3, 4], 0.25, &device);
    let input = AssignmentInput { valid: flags([false; 3]), ..AssignmentInput::new(scores, Phase::Inference) };
    let plan = AssignmentConfig::default().assign(&input);
    let tokens = Tensor::<2>::ones([3, 6], &device);
    let dispatcher = Dispatcher::new(&plan, &tokens);
    let rows = dispatcher.dispatch(tokens);
    assert_eq!((rows.dims(), dispatcher.ranges(), dispatcher.is_empty()), ([0, 6], vec![0..0; 4], true));
    assert_eq!(values(&dispatcher.combine(rows)), [0.0; 18]);
}

#[test]
fn a_loss_in_half_precision_takes_the_auxiliary_losses() {
    for dtype in [FloatDType::F16, FloatDType::BF16] {
        let device = Device::default().autodiff();
        let layer = cast(MoeFeedForwardConfig::new(6, 10, 4).init(&device), dtype);
        let x = Tensor::<3>::random([2, 5, 6], Distribution::Normal(0.0, 1.0), &device).cast(dtype);
        let result = layer.forward(x);
        let auxiliary = AuxiliaryLossConfig::new().init().forward(&[result.routing]);
        let loss = result.output.mean() + auxiliary.total;
        assert_eq!(loss.dtype(), DType::from(dtype));
        assert_eq!(auxiliary.router_z.unwrap().mean.dtype(), DType::F32);
        let grads = loss.backward();
        assert!(layer.router.weight.val().grad(&grads).is_some());
    }
}

/// A module with its numbers in another type.
pub(crate) fn cast<M: Module>(module: M, dtype: FloatDType) -> M {
    struct Cast(FloatDType);
    impl burn::module::ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: burn::module::Param<Tensor<D>>) -> burn::module::Param<Tensor<D>> {
            param.map(|x| {
                let tracked = x.is_require_grad();
                x.cast(self.0).detach().set_require_grad(tracked)
            })
        }
    }
    module.map(&mut Cast(dtype))
}

#[test]
fn a_model_in_half_precision_is_upcycled_and_compared() {
    let device = Device::default();
    for dtype in [FloatDType::F16, FloatDType::BF16] {
        let dense: PositionWiseFeedForward = cast(PositionWiseFeedForwardConfig::new(6, 10).init(&device), dtype);
        for probe_type in [FloatDType::F32, dtype] {
            let tokens = Tensor::<3>::random([1, 7, 6], Distribution::Normal(0.0, 1.0), &device).cast(probe_type);
            let options = UpcycleOptions::default().with_probe(Probe::Tokens { tokens, valid: None });
            let upcycled = MoeFeedForwardConfig::new(6, 10, 4).init(&device).upcycle_from_dense(&dense, &options).unwrap();
            assert!(upcycled.report.max_deviation.unwrap() < 0.05);
            assert_eq!(upcycled.model.experts.w_in.val().dtype(), DType::from(dtype));
        }
    }
}

#[test]
fn a_clip_in_half_precision_is_upcycled_and_compared() {
    let device = Device::default();
    let encoder = || EncoderConfig::new(16, 2, 2, 32);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), TextConfig::new(encoder()).with_context_length(12), 16);
    let dense = cast(config.init(&device), FloatDType::F16);
    let images = Tensor::<4>::random([2, 3, 8, 8], Distribution::Normal(0.0, 1.0), &device);
    let tokens = ClipTokenizer::new().tokenize(&["a word", "two"], 12).tensor(&device);
    let options = UpcycleOptions::default().with_probe(Probe::ImagesAndTexts { images, tokens });
    let sparse = config.sparse(SparseClipConfig::clip_up()).init(&device);
    let upcycled = sparse.upcycle_from_dense(&dense, &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 0.05, "{}", upcycled.report);
}

#[test]
fn clips_in_half_precision_are_upcycled_together() {
    let device = Device::default();
    let encoder = || EncoderConfig::new(16, 2, 2, 32);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), TextConfig::new(encoder()).with_context_length(12), 16);
    let models = [cast(config.init(&device), FloatDType::F16), cast(config.init(&device), FloatDType::F16)];
    let probe = || {
        let images = Tensor::<4>::random([2, 3, 8, 8], Distribution::Normal(0.0, 1.0), &device);
        Probe::ImagesAndTexts { images, tokens: ClipTokenizer::new().tokenize(&["a word", "two"], 12).tensor(&device) }
    };
    let options = UpcycleManyOptions::default()
        .with_rest(Rest::Average)
        .with_router(RouterStart::Centroids)
        .with_probes(vec![probe(), probe()]);
    let sparse = config.sparse(SparseClipConfig::clip_up()).init(&device);
    let upcycled = sparse.upcycle_from_many(&models.each_ref(), &options).unwrap();
    for model in &upcycled.report.models {
        assert!(model.layer_deviations.iter().all(|deviation| *deviation < 0.05), "{}", upcycled.report);
    }
    assert_eq!(upcycled.model.vision.class_embedding.unwrap().val().dtype(), DType::F16);
}

#[test]
fn assignments_name_the_sizes_that_do_not_fit() {
    let scores = || Tensor::<2>::full([3, 4], 0.25, &Device::default());
    let input = || AssignmentInput::new(scores(), Phase::Training);
    let token_choice = AssignmentConfig::default();
    let text = |input: AssignmentInput| panic_of(|| token_choice.assign(&input));
    assert_eq!(text(AssignmentInput { valid: flags([true; 2]), ..input() }), "`valid` has 2 flags, but the scores are of 3 tokens");
    let protected = text(AssignmentInput { protected: flags([true; 4]), ..input() });
    assert_eq!(protected, "`protected` has 4 flags, but the scores are of 3 tokens");
    let bias = text(AssignmentInput { selection_bias: Some(Tensor::zeros([5], &Device::default())), ..input() });
    assert_eq!(bias, "`selection_bias` has 5 entries, but the scores are of 4 experts");
    let many = AssignmentConfig::from(TokenChoiceConfig::new().with_top_k(5));
    assert_eq!(panic_of(|| many.assign(&input())), "`top_k` is 5, but the scores are of only 4 experts");

    let plan = token_choice.assign(&input());
    let tokens = |count| Tensor::<2>::ones([count, 6], &Device::default());
    assert_eq!(panic_of(|| Dispatcher::new(&plan, &tokens(2))), "a plan of 3 tokens does not fit 2 tokens");
    let dispatcher = Dispatcher::new(&plan, &tokens(3));
    assert_eq!(panic_of(|| dispatcher.dispatch(tokens(4))), "4 tokens do not fit a plan of 3 tokens");
    assert!(panic_of(|| dispatcher.combine(tokens(1))).starts_with("1 rows do not fit a plan of "));
}

#[test]
fn an_activation_that_does_not_fit_is_named_with_that_of_the_experts() {
    let device = Device::default();
    let dense = |activation| PositionWiseFeedForwardConfig::new(6, 10).with_activation(activation).init(&device);
    let experts = |activation| MoeFeedForwardConfig::new(6, 10, 4).with_experts(ExpertOptions::new().with_activation(activation));
    let upcycle = |from, to| experts(to).init(&device).upcycle_from_dense(&dense(from), &UpcycleOptions::default());
    let error = |from, to| upcycle(from, to).unwrap_err().to_string();
    let sparse = "the experts' is Relu";
    assert_eq!(error(ActivationConfig::GeluApproximate, Activation::Relu), format!("the dense activation is GeluTanh, {sparse}"));
    assert_eq!(error(ActivationConfig::Tanh, Activation::Relu), format!("the dense activation is Tanh, {sparse}"));
    assert!(upcycle(ActivationConfig::GeluApproximate, Activation::GeluTanh).is_ok());
}

#[test]
fn a_balancing_bias_survives_an_empty_batch() {
    let device = Device::default().autodiff();
    let router = RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.1)));
    let layer = MoeFeedForwardConfig::new(6, 10, 4).with_router(router).init(&device);
    let routing = layer.forward(Tensor::<2>::zeros([0, 6], &device)).routing;
    let layer = layer.update_balancing_bias(&routing);
    assert_eq!(values(&layer.router.balancing_bias.unwrap().val()), [0.0; 4]);
}

#[test]
fn a_padding_mask_is_the_opposite_of_a_mask_of_valid_tokens() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(6, 10, 4).init(&device);
    let x = Tensor::<3>::random([2, 5, 6], Distribution::Normal(0.0, 1.0), &device);
    let pad = Tensor::<2, Bool>::from_data([[false, false, true, true, true], [false, false, false, false, true]], &device);
    let by_pad = layer.forward(MoeInput::new(x.clone()).mask_pad(pad.clone()));
    let by_valid = layer.forward(MoeInput::new(x).valid(pad.bool_not()));
    assert_eq!((values(&by_pad.output), by_pad.routing.num_valid()), (values(&by_valid.output), 6));
}

#[test]
fn a_layer_by_its_own_plan_is_the_layer_and_a_plan_from_its_choices_too() {
    let device = Device::default().autodiff();
    for kernels in [Kernels::Fastest, Kernels::Reference] {
        with_kernels(kernels, || {
            let layer = trained(RouterScore::Softmax, true);
            let x = Tensor::<2>::random([9, 6], Distribution::Normal(0.0, 1.0), &device);
            let own = layer.forward(x.clone());
            let expected = values(&own.output);
            assert_eq!(values(&layer.forward_with(x.clone(), &own.routing.plan)), expected);

            let plan = &own.routing.plan;
            let row_expert = plan.row_expert();
            let experts: Vec<i32> = plan.choice_row().iter().map(|&row| row_expert[row as usize] as i32).collect();
            let experts = Tensor::<1, Int>::from_ints(&experts[..], &device).reshape([9, 2]);
            let gates = plan.gates();
            let output = layer.forward_with(x, &DispatchPlan::from_choices(4, experts, gates));
            assert!(values(&output).iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));
            // The gates' gradient reaches the router.
            let grads = output.square().sum().backward();
            assert!(layer.router.weight.val().grad(&grads).unwrap().abs().max().into_scalar::<f32>() > 0.0);
        });
    }
}

#[test]
fn choices_of_no_expert_count_for_nothing() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(6, 10, 3).init(&device);
    let x = Tensor::<2>::random([3, 6], Distribution::Normal(0.0, 1.0), &device);
    let experts = Tensor::<2, Int>::from_ints([[2, -1], [-1, -1], [0, 2]], &device);
    let gates = Tensor::<2>::from_floats([[0.5, f32::NAN], [1.0, 1.0], [0.25, 2.0]], &device);
    let plan = DispatchPlan::from_choices(3, experts, gates);
    assert_eq!((plan.load(), plan.row_token(), plan.dropped()), (vec![1, 0, 2], &[2, 0, 2][..], 0.0));
    let output = layer.forward_with(x.clone(), &plan);
    let alone = |token: usize, expert: usize| {
        let slots = x.clone().narrow(0, token, 1).unsqueeze_dim::<3>(0).repeat_dim(0, 3);
        layer.experts.forward(slots).narrow(0, expert, 1).reshape([6])
    };
    let expected =
        Tensor::stack::<2>(vec![alone(0, 2) * 0.5, Tensor::zeros([6], &device), alone(2, 0) * 0.25 + alone(2, 2) * 2.0], 0);
    assert!((output - expected).abs().max().into_scalar::<f32>() < 1e-5);

    let bad = |index: i32| {
        panic_of(|| DispatchPlan::from_choices(3, Tensor::from_ints([[index]], &device), Tensor::ones([1, 1], &device)))
    };
    assert_eq!(bad(3), "expert 3 of a choice is neither -1 nor below 3");
    assert_eq!(bad(-2), "expert -2 of a choice is neither -1 nor below 3");
    let few = DispatchPlan::from_choices(2, Tensor::from_ints([[0]], &device), Tensor::ones([1, 1], &device));
    assert_eq!(
        panic_of(|| layer.forward_with(Tensor::<2>::ones([1, 6], &device), &few)),
        "a plan of 2 experts does not fit a layer of 3"
    );
}

#[test]
fn masks_of_a_layer_by_a_plan_are_obeyed_or_refused() {
    let device = Device::default();
    let layer = MoeFeedForwardConfig::new(6, 10, 3).with_shared_expert(Some(4)).init(&device);
    let (x, mask) = (Tensor::<2>::ones([2, 6], &device), Tensor::<1, Bool>::from_data([true, false], &device));
    // The plan gives the padding to an expert.
    let plan = DispatchPlan::from_choices(3, Tensor::from_ints([[1], [1]], &device), Tensor::ones([2, 1], &device));
    let [with, without] =
        [MoeInput::new(x.clone()).valid(mask.clone()), MoeInput::new(x.clone())].map(|x| values(&layer.forward_with(x, &plan)));
    assert_eq!((&with[..6], &with[6..]), (&without[..6], &[0.0; 6][..]));
    let panic = panic_of(|| layer.forward_with(MoeInput::new(x).protected(mask), &plan));
    assert!(panic.starts_with("`protected` changes nothing in a plan that exists"), "{panic}");
}

/// Parameters that are the same wherever they are made: other tests draw from the same generator.
struct Numbered(u64);

impl ModuleMapper for Numbered {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        self.0 += 1;
        let numbers = numbers::<D>(param.shape().dims(), self.0, &Device::default()).into_data();
        param.map(|value| Tensor::from_data(numbers, &value.device()).require_grad())
    }
}

#[test]
fn gradient_checkpointing_changes_no_gradient_and_parameters_can_be_moved() {
    let router = RouterOptions::new().with_init_std(1.0).with_balancing(Some(BalancingOptions::new(0.1)));
    let config = MoeFeedForwardConfig::new(6, 10, 4).with_router(router);
    let run = |device: Device| {
        let mut layer = config.init(&device).map(&mut Numbered(0));
        let x = Tensor::<2>::from_data(numbers::<2>([9, 6], 3, &Device::default()).into_data(), &device);
        let result = layer.forward(x.clone());
        let loss =
            result.output.square().sum() + AuxiliaryLossConfig::new().init().forward(std::slice::from_ref(&result.routing)).total;
        let grads = loss.backward();
        layer = layer.update_balancing_bias(&result.routing);
        let after = values(&layer.forward(x).output);
        let clip = ClipConfig::tiny().init(&device).clamp_logit_scale();
        let scale = values(&clip.scale());
        (
            values(&layer.experts.w_in.val().grad(&grads).unwrap()),
            values(&layer.router.weight.val().grad(&grads).unwrap()),
            after,
            scale,
        )
    };
    let device = Device::default().autodiff();
    assert_eq!(run(device.clone().gradient_checkpointing()), run(device));
}
