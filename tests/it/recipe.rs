//! The recipe on small data.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use burn_moe::{
    AuxiliaryLossConfig, BalancingOptions, Capacity, LoraOptions, RouterOptions, TokenChoiceConfig, UpcycleFromDense,
    UpcycleOptions,
    clip::{
        Clip, ClipAuxiliaryLossConfig, ClipConfig, ImageEmbedder, ImagePreprocessing, Interpolation, ResizeMode, RetrievalMetrics,
        SparseClipConfig, TextConfig, TextEmbedder, VisionConfig,
        lists::{CaptionedImages, ListOptions},
        preprocess::ImagePreprocessor,
        tokenizer::ClipTokenizer,
    },
    train::{
        Arm, Checkpointing, Evaluation, KeptRun, Observer, OptimizerConfig, StepReport, Tower, TrainConfig, TrainData, TrainInput,
        TrainedArm, WarmupCosine,
        data::{
            AugmentConfig, Batch, BatchConfig, Batches, Caption, Concept, EmojiPack, EmojiVendor, ImageTextSet, Language,
            load_images,
        },
        evaluate,
        ranks::Solo,
        train,
    },
    transformer::{EncoderConfig, FeedForward, RoutedLayerConfig, SparseEncoderConfig},
};

use super::support::{ROOT, values};

/// Twelve concepts, each a colour and its name, three shades of it.
pub(super) fn colours() -> ImageTextSet {
    let names = ["red", "green", "blue", "white", "black", "yellow", "cyan", "pink", "grey", "orange", "brown", "purple"];
    let rgb: [[u8; 3]; 12] = [
        [220, 20, 20],
        [20, 200, 20],
        [20, 20, 220],
        [250, 250, 250],
        [5, 5, 5],
        [240, 240, 20],
        [20, 230, 230],
        [250, 150, 180],
        [128, 128, 128],
        [250, 140, 10],
        [110, 60, 20],
        [140, 20, 160],
    ];
    let mut pixels = Vec::new();
    let mut concept_of_image = Vec::new();
    for (concept, rgb) in rgb.iter().enumerate() {
        for shade in 0..3u8 {
            let colour = rgb.map(|v| v.saturating_sub(3 * shade));
            pixels.extend(std::iter::repeat_n(colour, 64).flatten());
            concept_of_image.push(concept);
        }
    }
    let concepts = names
        .iter()
        .map(|name| Concept { captions: vec![Caption { tags: vec!["colour".into(), "plain".into()], ..Caption::new(*name) }] });
    ImageTextSet::new(8, pixels, concept_of_image, concepts.collect())
}

pub(super) fn first_shades() -> ImageTextSet {
    colours().select(|image| image % 3 == 0)
}

pub(super) fn clip_config() -> ClipConfig {
    let encoder = || EncoderConfig::new(16, 2, 2, 32);
    ClipConfig::new(VisionConfig::new(encoder(), 8, 4), TextConfig::new(encoder()).with_context_length(12), 16)
}

fn batches() -> BatchConfig {
    BatchConfig::new().with_batch_size(6).with_context_length(12).with_augment(AugmentConfig::none())
}

pub(super) fn arms(device: &Device) -> Vec<Arm> {
    device.seed(1);
    let dense = clip_config().init(device);
    let sparse = clip_config().sparse(SparseClipConfig::clip_up()).init(device);
    let sparse = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default()).unwrap().model;
    let arm = |name: &str, model: Clip| Arm {
        name: name.into(),
        model,
        optimizer: OptimizerConfig::new(WarmupCosine::new(5e-3).with_warmup_steps(5)),
        auxiliary: ClipAuxiliaryLossConfig::new(),
        state: None,
        frozen: None,
    };
    vec![arm("dense", dense), arm("sparse", sparse)]
}

fn recall(arm: &TrainedArm) -> f64 {
    arm.history.last().unwrap().1.retrieval.text_to_image.r1
}

#[derive(Default)]
struct Losses(Vec<Vec<f64>>);

impl Observer for Losses {
    fn on_step(&mut self, arm: usize, _: usize, losses: &StepReport) {
        self.0.resize(self.0.len().max(arm + 1), Vec::new());
        self.0[arm].push(losses.contrastive);
    }
}

#[test]
fn both_arms_learn_the_colours_from_the_same_batches() {
    let device = Device::default();
    let config = TrainConfig::new(120).with_eval_every(60);
    let mut losses = Losses::default();
    let trained = train(TrainInput {
        arms: arms(&device),
        data: TrainData::Set { set: &colours(), batch: batches() },
        test: Some(&first_shades()),
        config: &config,
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut losses,
    })
    .unwrap();
    for arm in &trained {
        assert!(recall(arm) >= 0.75, "{}: {}", arm.name, recall(arm));
        let steps: Vec<usize> = arm.history.iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [0, 60, 120]);
    }
    // The first batch costs a dense model and its sparse twin the same, drops aside.
    assert!((losses.0[0][0] - losses.0[1][0]).abs() < 0.05, "{:?}", (losses.0[0][0], losses.0[1][0]));
    assert!(losses.0[0][119] < 0.5 * losses.0[0][0]);
    let sparse = &trained[1].history.last().unwrap().1;
    assert_eq!(
        sparse.layers.iter().map(|l| l.path.as_str()).collect::<Vec<_>>(),
        ["vision.encoder.blocks.1", "text.encoder.blocks.1"]
    );
    assert!(trained[0].history.last().unwrap().1.layers.is_empty());
    assert!(sparse.layers.iter().all(|layer| (layer.stats.load.iter().sum::<f64>() - 1.0).abs() < 1e-9));

    // The embeddings of words that never occurred are where they were, and the model evaluates the same outside of the loop.
    let again = evaluate(&trained[1].model, &first_shades(), &ClipTokenizer::new(), 12, None, &device).unwrap();
    assert_eq!(again.retrieval, sparse.retrieval);
    let vocabulary = trained[1].model.text.token_embedding.weight.dims()[0];
    assert_eq!(vocabulary, ClipTokenizer::VOCAB_SIZE);
}

#[test]
fn a_run_that_was_stopped_ends_where_it_would_have_ended() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let config = TrainConfig::new(12).with_eval_every(4);
    // Made once: tests that run beside this one draw from the same random numbers.
    let arms = arms(&device);
    let run = |checkpointing: Option<&Checkpointing>, observer: &mut dyn Observer| {
        train(TrainInput {
            arms: arms.clone(),
            data: TrainData::Set { set: &colours(), batch: batches() },
            test: Some(&first_shades()),
            config: &config,
            checkpointing,
            ranks: &Solo,
            device: &device,
            observer,
        })
    };
    let whole = run(None, &mut ()).unwrap();

    struct Stop;
    impl Observer for Stop {
        fn on_step(&mut self, _: usize, step: usize, _: &StepReport) {
            assert!(step < 9, "stopped");
        }
    }
    let checkpointing = Checkpointing::new(folder.path().join("run"), 4);
    let stopped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(Some(&checkpointing), &mut Stop)));
    assert!(stopped.is_err());
    let resumed = run(Some(&checkpointing), &mut ()).unwrap();
    for (a, b) in whole.iter().zip(&resumed) {
        let weight = |arm: &TrainedArm| values(&arm.model.vision.projection.weight.val());
        assert_eq!(weight(a), weight(b), "{}", a.name);
        let ranks = |arm: &TrainedArm| arm.history.iter().map(|(s, e)| (*s, e.retrieval.text_ranks.clone())).collect::<Vec<_>>();
        assert_eq!(ranks(a), ranks(b));
        assert_eq!(b.timed_steps, 4);
    }
    let with = |config: &TrainConfig, observer: &mut dyn Observer| {
        train(TrainInput {
            arms: arms.clone(),
            data: TrainData::Set { set: &colours(), batch: batches() },
            test: Some(&first_shades()),
            config,
            checkpointing: Some(&checkpointing),
            ranks: &Solo,
            device: &device,
            observer,
        })
    };
    let error = with(&TrainConfig { seed: 5, ..config.clone() }, &mut ()).unwrap_err();
    assert!(error.to_string().contains("the run in this folder has another configuration"));
    let error = with(&TrainConfig { steps: 8, ..config.clone() }, &mut ()).unwrap_err();
    assert!(error.to_string().ends_with("has done 12 steps already, and 8 are asked for"), "{error}");

    // A run that has ended goes on for longer.
    struct Heard(Vec<KeptRun>, Vec<f64>);
    impl Observer for Heard {
        fn on_resume(&mut self, kept: KeptRun) {
            self.0.push(kept);
        }
        fn on_step(&mut self, _: usize, _: usize, losses: &StepReport) {
            self.1.push(losses.learning_rate);
        }
    }
    assert_eq!(checkpointing.kept_run().unwrap(), Some(KeptRun { step: 12, steps: 12 }));
    let mut heard = Heard(Vec::new(), Vec::new());
    let longer = with(&TrainConfig { steps: 16, ..config.clone() }, &mut heard).unwrap();
    assert_eq!((heard.0, heard.1.len()), (vec![KeptRun { step: 12, steps: 12 }], 4 * longer.len()));
    assert_eq!(heard.1[0], arms[0].optimizer.schedule.at(12, 16));
    let steps: Vec<usize> = longer[0].history.iter().map(|(step, _)| *step).collect();
    assert_eq!(steps, [0, 4, 8, 12, 16]);
    assert_eq!(checkpointing.kept_run().unwrap(), Some(KeptRun { step: 16, steps: 16 }));
}

#[test]
fn equal_captions_never_stand_in_one_batch_and_are_right_answers_for_each_other() {
    // Image 0 and 1 share a caption but for capitals, 1 and 2 another one; the others have their own.
    let captions: [&[&str]; 6] = [&["a dog"], &["A  Dog", "a pet"], &["a pet"], &["a cat"], &["a bird"], &["a fish"]];
    let concept = |captions: &&[&str]| Concept { captions: captions.iter().map(|c| Caption::new(*c)).collect() };
    let concepts: Vec<Concept> = captions.iter().map(concept).collect();
    let pixels: Vec<u8> = (0..6u8).flat_map(|shade| vec![40 * shade; 8 * 8 * 3]).collect();
    let set = ImageTextSet::new(8, pixels, (0..6).collect(), concepts);
    let config = BatchConfig::new().with_batch_size(4).with_context_length(12);
    let error = Batches::new(&set, config.with_batch_size(5), 0, 0).unwrap_err().to_string();
    assert!(error.contains("the data has 4 (those with a caption in common count as one)"), "{error}");
    let mut seen = [0; 6];
    for batch in Batches::new(&set, config, 0, 0).unwrap().take(60) {
        let has = |concept: usize| batch.concepts.contains(&concept);
        assert!(batch.concepts.len() == 4 && !(has(0) && has(1)) && !(has(1) && has(2)), "{:?}", batch.concepts);
        batch.concepts.iter().for_each(|concept| seen[*concept] += 1);
    }
    assert!(seen.iter().all(|count| *count > 10), "{seen:?}");
    // Labels: twelve images of three kinds. A round of four batches shows each of them once.
    let labels: Vec<Concept> = (0..12).map(|image| concept(&&[["a cat", "a dog", "a bird"][image % 3]][..])).collect();
    let set = ImageTextSet::new(8, vec![9; 12 * 192], (0..12).collect(), labels);
    let batches: Vec<Batch> = Batches::new(&set, config.with_batch_size(3), 7, 0).unwrap().take(8).collect();
    for round in batches.chunks(4) {
        let mut seen: Vec<usize> = round.iter().flat_map(|batch| batch.concepts.clone()).collect();
        assert!(round.iter().all(|batch| batch.concepts.iter().map(|concept| concept % 3).sum::<usize>() == 3), "one of each kind");
        seen.sort();
        assert_eq!(seen, (0..12).collect::<Vec<_>>());
    }
    // The batch of a step depends on the seed and the step alone.
    let later = Batches::new(&set, config.with_batch_size(3), 7, 6).unwrap().next().unwrap();
    assert_eq!(later, batches[6]);

    let pixels: Vec<u8> = (0..6u8).flat_map(|shade| vec![40 * shade; 8 * 8 * 3]).collect();
    let set = ImageTextSet::new(8, pixels, (0..6).collect(), captions.iter().map(concept).collect());

    // Whatever the model is, a text with two images can be no miss for the nearer one of them.
    let device = Device::default();
    let evaluation = evaluate(&clip_config().init(&device), &set, &ClipTokenizer::new(), 12, None, &device).unwrap();
    assert_eq!(evaluation.retrieval.text_ranks.len(), 7);
    // Captions 0 ("a dog") and 1 ("A  Dog") are one query with two right answers: they have one rank.
    assert_eq!(evaluation.retrieval.text_ranks[0], evaluation.retrieval.text_ranks[1]);
    assert_eq!(evaluation.retrieval.text_ranks[2], evaluation.retrieval.text_ranks[3]);
}

#[test]
fn a_frozen_tower_stays_as_it_is() {
    let device = Device::default();
    let config = TrainConfig::new(3).with_eval_every(3);
    let sparse = arms(&device).remove(1);
    let start = sparse.model.clone();
    let arms = vec![Arm { frozen: Some(Tower::Vision), ..sparse.clone() }, Arm { frozen: Some(Tower::Text), ..sparse }];
    let (set, test) = (colours(), first_shades());
    let data = TrainData::Set { set: &set, batch: batches() };
    let input = TrainInput {
        arms,
        data,
        test: Some(&test),
        config: &config,
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut (),
    };
    let weights = |model: &Clip| [values(&model.vision.projection.weight.val()), values(&model.text.projection.weight.val())];
    let [vision, text] = weights(&start);
    let trained: Vec<[Vec<f32>; 2]> = train(input).unwrap().iter().map(|arm| weights(&arm.model)).collect();
    assert!(trained[0][0] == vision && trained[0][1] != text, "the vision tower is frozen, and the text tower is not");
    assert!(trained[1][0] != vision && trained[1][1] == text, "the text tower is frozen, and the vision tower is not");
}

#[test]
fn micro_batches_train_the_same_models() {
    let device = Device::default();
    let (set, test) = (colours(), first_shades());
    let sparse = |router: RouterOptions| {
        let tokens = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
        let layer = RoutedLayerConfig::new().with_router(router).with_assignment(tokens.into());
        let encoder = SparseEncoderConfig::new().with_layer(layer.into());
        let config = SparseClipConfig::new().with_vision(Some(encoder.clone())).with_text(Some(encoder));
        clip_config().sparse(config).init(&device)
    };
    let arm = |model| Arm::new("sparse", model, OptimizerConfig::new(WarmupCosine::new(1e-3)));
    let run = |arms: Vec<Arm>, micro_batch| {
        let config = TrainConfig::new(4).with_eval_every(4).with_micro_batch(micro_batch);
        let mut losses = Losses::default();
        let (data, test) = (TrainData::Set { set: &set, batch: batches() }, &test);
        train(TrainInput {
            arms,
            data,
            test: Some(test),
            config: &config,
            checkpointing: None,
            ranks: &Solo,
            device: &device,
            observer: &mut losses,
        })
        .map(|trained| (trained, losses.0))
    };
    let balanced = arm(sparse(RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.01)))));
    let arms = vec![balanced.clone(), Arm { frozen: Some(Tower::Vision), ..balanced }];
    let (whole, expected) = run(arms.clone(), None).unwrap();
    // 4 leaves a last one of two pairs.
    let (parts, found) = run(arms, Some(4)).unwrap();
    for (expected, found) in expected.iter().flatten().zip(found.iter().flatten()) {
        assert!((expected - found).abs() < 1e-3 * expected, "{expected} {found}");
    }
    let bias = |arm: &TrainedArm| match &arm.model.text.encoder.blocks[1].feed_forward {
        FeedForward::Moe(moe) => values(&moe.router.balancing_bias.as_ref().unwrap().val()),
        _ => panic!("the block is sparse"),
    };
    for (whole, parts) in whole.iter().zip(&parts) {
        assert!(bias(whole).iter().any(|bias| *bias != 0.0));
        assert_eq!(bias(whole), bias(parts));
    }

    let refused = |arms, micro_batch| run(arms, Some(micro_batch)).map(|_| ()).unwrap_err().to_string();
    let noisy = arm(sparse(RouterOptions::new().with_noise(0.1)));
    let error = "sparse: `router noise or jitter with micro-batches, ranks or recomputation` should be 0 where several arms or ranks are trained in \
                 one process, which would draw each other's numbers, but is above 0";
    assert_eq!(refused(vec![noisy.clone(), noisy.clone()], 4), error);
    assert!(refused(vec![noisy.clone()], 0).contains("`micro_batch`"));
    let importance = ClipAuxiliaryLossConfig::both(AuxiliaryLossConfig::new().with_importance(0.1));
    assert!(refused(vec![Arm { auxiliary: importance, ..noisy }], 4).starts_with("`importance` is 0.1"));
}

#[test]
fn a_smaller_vocabulary_is_trained_evaluated_and_divided_by_language() {
    let device = Device::default();
    let pack = EmojiPack::open(format!("{ROOT}/data/emoji")).unwrap();
    let load =
        |vendors: &[EmojiVendor]| pack.load(vendors, &[Language::En, Language::De], false).unwrap().select(|image| image < 40);
    let (set, test) = (load(&[EmojiVendor::Noto]), load(&[EmojiVendor::Twemoji]));
    let encoder = || EncoderConfig::new(16, 2, 1, 16);
    let text = TextConfig::new(encoder()).with_context_length(24).with_vocab_size(600);
    let model = ClipConfig::new(VisionConfig::new(encoder(), 32, 8), text, 16).init(&device);
    let arm = Arm::new("small", model, OptimizerConfig::new(WarmupCosine::new(1e-3)));
    let batch = BatchConfig::new().with_batch_size(8).with_vocab_size(600);
    let run = |batch: BatchConfig| {
        let config = TrainConfig::new(2).with_eval_every(2);
        let data = TrainData::Set { set: &set, batch };
        let arms = vec![arm.clone()];
        train(TrainInput {
            arms,
            data,
            test: Some(&test),
            config: &config,
            checkpointing: None,
            ranks: &Solo,
            device: &device,
            observer: &mut (),
        })
    };
    let trained = run(batch).unwrap().remove(0);
    let evaluation = &trained.history[1].1;
    assert_eq!(evaluation.retrieval.text_ranks.len(), 80, "two captions for each of forty images");
    let languages: Vec<&String> = evaluation.by_language.keys().collect();
    assert_eq!(languages, ["de", "en"]);
    let mean = evaluation.by_language.values().map(|recall| recall.r10).sum::<f64>() / 2.0;
    assert!((mean - evaluation.retrieval.text_to_image.r10).abs() < 1e-12);
    let tokenizer = ClipTokenizer::for_model(&trained.model.text).unwrap();
    let again = evaluate(&trained.model, &test, &tokenizer, 24, None, &device).unwrap();
    assert_eq!(again.retrieval, evaluation.retrieval);
    let error = run(batch.with_vocab_size(49408)).unwrap_err().to_string();
    assert_eq!(error, "small: `vocabulary` should be 49408, but is 600");
}

#[test]
fn a_sparse_arm_goes_on_with_the_state_of_the_dense_one() {
    let device = Device::default();
    let config = TrainConfig::new(30).with_eval_every(30);
    let mut arm = arms(&device).remove(0);
    let trained = train(TrainInput {
        arms: vec![arm.clone()],
        data: TrainData::Set { set: &colours(), batch: batches() },
        test: Some(&first_shades()),
        config: &config,
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut (),
    })
    .unwrap()
    .remove(0);
    arm.model = trained.model.clone();
    arm.state = Some(trained.state.clone());
    let sparse = clip_config().sparse(SparseClipConfig::clip_up()).init(&device);
    let model = sparse.upcycle_from_dense(&trained.model, &UpcycleOptions::default()).unwrap().model;
    let state = Some(trained.state.upcycle(&trained.model, &model).unwrap());
    // No warm-up: a state that was lost would show in the first steps.
    arm.optimizer.schedule = WarmupCosine::new(2e-3).with_warmup_steps(0);
    let arms = vec![Arm { model, state, name: "sparse".into(), ..arm.clone() }, arm];
    let mut losses = Losses::default();
    let config = TrainConfig::new(5).with_seed(7);
    train(TrainInput {
        arms: arms.clone(),
        data: TrainData::Set { set: &colours(), batch: batches() },
        test: Some(&first_shades()),
        config: &config,
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut losses,
    })
    .unwrap();
    for (sparse, dense) in losses.0[0].iter().zip(&losses.0[1]) {
        assert!((sparse - dense).abs() < 0.15 * dense.max(0.2), "{:?}", losses.0);
    }
    // The vocabulary of other data: the state does not fit.
    let words = |word: &str| Concept { captions: vec![Caption::new(word)] };
    let few =
        ImageTextSet::new(8, vec![[9; 3]; 6 * 64].concat(), (0..6).collect(), ["a", "b", "c", "d", "e", "f"].map(words).to_vec());
    let data = TrainData::Set { set: &few, batch: batches() };
    let error = train(TrainInput {
        arms,
        data,
        test: Some(&few),
        config: &config,
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut (),
    })
    .err()
    .unwrap()
    .to_string();
    assert!(error.starts_with("sparse: `token ids in the optimiser's state` should be"), "{error}");
}

#[test]
fn batches_follow_the_seed_and_hold_no_concept_twice() {
    let set = colours();
    let config = batches().with_augment(AugmentConfig::new());
    let take = |seed, first, count| -> Vec<Batch> { Batches::new(&set, config, seed, first).unwrap().take(count).collect() };
    let batches = take(3, 0, 6);
    assert_eq!(batches, take(3, 0, 6));
    assert_eq!(batches[4..], take(3, 4, 2)[..], "a batch depends on its step, not on those before it");
    assert_ne!(batches, take(4, 0, 6));
    for pair in batches.chunks(2) {
        // Two batches of six are one round through the twelve concepts.
        let mut concepts: Vec<usize> = pair.iter().flat_map(|batch| batch.concepts.clone()).collect();
        concepts.sort_unstable();
        assert_eq!(concepts, (0..12).collect::<Vec<_>>());
    }
    let lengths: Vec<usize> = batches.iter().map(|b| b.texts.len).collect();
    assert!(lengths.iter().all(|len| (3..=12).contains(len)), "{lengths:?}");
}

#[test]
fn batches_that_the_data_does_not_allow_are_refused_before_anything_is_evaluated() {
    struct NoEvaluation;
    impl Observer for NoEvaluation {
        fn on_evaluation(&mut self, _: usize, _: usize, _: &Evaluation) {
            panic!("evaluated");
        }
    }
    let device = Device::default();
    let error = train(TrainInput {
        arms: arms(&device),
        data: TrainData::Set { set: &colours(), batch: batches().with_batch_size(13) },
        test: Some(&first_shades()),
        config: &TrainConfig::new(1),
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut NoEvaluation,
    })
    .unwrap_err();
    assert!(error.to_string().starts_with("a batch of 13 needs as many concepts"), "{error}");
}

#[test]
fn the_emoji_pack_is_what_its_readme_says() {
    let pack = EmojiPack::open(format!("{ROOT}/data/emoji")).unwrap();
    let training = pack.load(&EmojiVendor::TRAINING, &[Language::En], true).unwrap();
    let test = pack.load(&[EmojiVendor::Twemoji], &[Language::En], false).unwrap();
    assert_eq!((training.len(), test.len()), (6166, 1652));
    let mut labels: Vec<&String> = test.concepts().iter().map(|c| &c.captions[0].text).collect();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), test.concepts().len(), "labels are unique");
    let trained: std::collections::BTreeSet<usize> = training.concept_of_image().iter().copied().collect();
    assert!(test.concept_of_image().iter().all(|concept| trained.contains(concept)), "every test concept was drawn by others");
    assert!(test.concepts().iter().all(|c| c.captions.len() == 1 && c.captions[0].tags.is_empty()));
    let languages = pack.load(&[EmojiVendor::Twemoji], &Language::ALL, true).unwrap();
    let captions = &languages.concepts()[0].captions;
    let texts: Vec<&str> = captions.iter().map(|caption| caption.text.as_str()).collect();
    assert_eq!((texts[0], texts[2]), ("grinning face", "grinsendes Gesicht"));
    assert_eq!((captions.len(), captions[2].language.as_deref(), captions[2].tags.is_empty()), (16, Some("de"), false));
    // No drawing of the test set is in the training set. (White squares aside, two vendors never draw alike to the byte.)
    let drawings: std::collections::HashSet<&[u8]> = (0..training.len()).map(|i| training.image(i)).collect();
    assert!((0..test.len()).all(|i| !drawings.contains(test.image(i))));
}

/// What a model with mean and std 0.5 expects, squashed and bilinear.
fn own_preprocessing() -> ImagePreprocessing {
    let plain = ImagePreprocessing::new().with_mean([0.5; 3]).with_std([0.5; 3]);
    plain.with_resize_mode(ResizeMode::Squash).with_interpolation(Interpolation::Bilinear)
}

#[test]
fn images_are_prepared_in_training_and_evaluation_as_the_model_says() {
    let folder = tempfile::tempdir().unwrap();
    let mut list = String::from("path,caption\n");
    for (index, word) in ["red", "green", "blue", "white", "black", "pink", "grey", "brown"].iter().enumerate() {
        // Not square, and different from left to right, so that the way of resizing matters.
        let image = image::RgbImage::from_fn(24, 10, |x, y| image::Rgb([(index * 30) as u8, (x * 10) as u8, (y * 20) as u8]));
        image.save(folder.path().join(format!("{index}.png"))).unwrap();
        list += &format!("{index}.png,{word}\n");
    }
    std::fs::write(folder.path().join("list.csv"), list).unwrap();
    let device = Device::default();
    let mut config = clip_config();
    let mut trained = Vec::new();
    for preprocessing in [ImagePreprocessing::new(), own_preprocessing()] {
        config.vision.preprocessing = preprocessing;
        device.seed(3);
        let model: Clip = config.init(&device);
        let preprocessor = ImagePreprocessor::for_model(&config.vision);
        let list = CaptionedImages::read(folder.path().join("list.csv"), &ListOptions::default()).unwrap();
        let set = load_images(list, folder.path(), &preprocessor, |_| ()).unwrap().set;
        let run = TrainConfig::new(6).with_eval_every(6);
        let arm = Arm {
            name: "arm".into(),
            model,
            optimizer: OptimizerConfig::new(WarmupCosine::new(1e-2)),
            auxiliary: ClipAuxiliaryLossConfig::new(),
            state: None,
            frozen: None,
        };
        let arm = train(TrainInput {
            arms: vec![arm],
            data: TrainData::Set { set: &set, batch: batches() },
            test: Some(&set),
            config: &run,
            checkpointing: None,
            ranks: &Solo,
            device: &device,
            observer: &mut (),
        })
        .unwrap()
        .remove(0);
        assert_eq!(arm.model.vision.preprocessing, preprocessing);

        // The report's recalls are those that embedding the files gives.
        let embedder = ImageEmbedder::new(&arm.model.vision, preprocessor, &device);
        let paths = (0..8).map(|index| folder.path().join(format!("{index}.png"))).collect();
        let images = embedder.images(paths, |_| ()).embeddings;
        let captions: Vec<&String> = set.concepts().iter().map(|concept| &concept.captions[0].text).collect();
        let texts = TextEmbedder::new(&arm.model.text, &device).unwrap().texts(&captions, |_| ()).embeddings;
        let own = RetrievalMetrics::new(images, texts, &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
        let report = &arm.history.last().unwrap().1.retrieval;
        assert_eq!((&own.text_ranks, &own.image_ranks), (&report.text_ranks, &report.image_ranks));
        trained.push(values(&arm.model.vision.projection.weight.val()));
    }
    assert_ne!(trained[0], trained[1], "another preparation trains another model");
}

#[test]
fn images_prepared_in_another_way_than_the_model_expects_are_refused() {
    let device = Device::default();
    let mut config = clip_config();
    config.vision.preprocessing = own_preprocessing();
    let arm = Arm {
        name: "arm".into(),
        model: config.init(&device),
        optimizer: OptimizerConfig::new(WarmupCosine::new(1e-2)),
        auxiliary: ClipAuxiliaryLossConfig::new(),
        state: None,
        frozen: None,
    };
    let run = TrainConfig::new(2);
    let error = train(TrainInput {
        arms: vec![arm],
        data: TrainData::Set { set: &colours(), batch: batches() },
        test: Some(&first_shades()),
        config: &run,
        checkpointing: None,
        ranks: &Solo,
        device: &device,
        observer: &mut (),
    })
    .unwrap_err()
    .to_string();
    let expected = "arm: the model expects images prepared with mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5], resize Squash, interpolation \
                    Bilinear; the data has mean [0.4814546";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_model_with_adapters_trains_these_alone() {
    struct Parameters(Vec<(String, Vec<f32>)>, Vec<String>);
    impl ModuleVisitor for Parameters {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.into());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.push((self.1.join("."), values(&param.base())));
        }
    }
    let parameters = |model: &Clip| {
        let mut parameters = Parameters(Vec::new(), Vec::new());
        model.visit(&mut parameters);
        parameters.0
    };
    let device = Device::default();
    for config in
        [TrainConfig::new(4), TrainConfig::new(4).with_micro_batch(Some(2)), TrainConfig::new(4).with_recompute_blocks(true)]
    {
        let mut arms = arms(&device);
        for arm in &mut arms {
            arm.model = arm.model.clone().with_lora(&LoraOptions::new().with_rank(2));
        }
        let input = TrainInput {
            arms: arms.clone(),
            data: TrainData::Set { set: &colours(), batch: batches() },
            test: Some(&first_shades()),
            config: &config.with_eval_every(4),
            checkpointing: None,
            ranks: &Solo,
            device: &device,
            observer: &mut (),
        };
        for (arm, before) in train(input).unwrap().into_iter().zip(arms) {
            let (before, after) = (parameters(&before.model), parameters(&arm.model));
            assert_eq!(before.len(), after.len());
            for ((path, before), (_, after)) in before.iter().zip(&after) {
                assert_eq!(before != after, path.contains(".lora."), "{path}");
            }
        }
    }
}

#[test]
fn the_recipe_trains_the_same_with_gradient_checkpointing() {
    for config in
        [TrainConfig::new(6), TrainConfig::new(3).with_micro_batch(Some(2)), TrainConfig::new(3).with_recompute_blocks(true)]
    {
        checkpointing_changes_nothing(&config.with_eval_every(6));
    }
}

fn checkpointing_changes_nothing(config: &TrainConfig) {
    let plain = Device::default();
    let arms = arms(&plain);
    let run = |device: &Device| {
        let input = TrainInput {
            arms: arms.clone(),
            data: TrainData::Set { set: &colours(), batch: batches() },
            test: Some(&first_shades()),
            config,
            checkpointing: None,
            ranks: &Solo,
            device,
            observer: &mut (),
        };
        let weights = |arm: TrainedArm| values(&arm.model.vision.projection.weight.val());
        train(input).unwrap().into_iter().map(weights).collect::<Vec<_>>()
    };
    assert_eq!(run(&plain), run(&plain.clone().autodiff().gradient_checkpointing()));
}
