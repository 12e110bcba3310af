//! Training on streams, by several ranks, in other numbers, and after interruptions.

use std::{
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
};

use burn::tensor::{Device, Tensor, TensorData};
use burn_moe::{
    BalancingOptions, BalancingRule, Capacity, LoraOptions, RouterOptions, TokenChoiceConfig,
    clip::{
        Clip, SparseClipConfig,
        checkpoint::ClipCheckpoint,
        preprocess::{ImagePreprocessor, RandomCropConfig},
    },
    train::{
        Arm, Checkpointing, JsonLog, KeptRun, Observer, OptimizerConfig, RateFactors, StepReport, Tower, TrainConfig, TrainData,
        TrainError, TrainInput, TrainPrecision, TrainedArm, WarmupCosine,
        ranks::{Ranks, Solo, Threads},
        stream::{Stream, StreamConfig, TarShards, TarStream, load_samples},
        train,
    },
    transformer::{RoutedLayerConfig, SparseEncoderConfig},
};

use super::{
    recipe::{clip_config, colours},
    streams::tar,
    support::{ROOT, values},
};

/// The colours as two shards; one sample of each cannot be used.
fn shards(folder: &Path) -> Vec<PathBuf> {
    let set = colours();
    let shard = |shard: usize| {
        let mut members = Vec::new();
        for image in (0..set.len()).filter(|image| image % 2 == shard) {
            let mut png = Cursor::new(Vec::new());
            let pixels = image::RgbImage::from_raw(8, 8, set.image(image).to_vec()).unwrap();
            pixels.write_to(&mut png, image::ImageFormat::Png).unwrap();
            let caption = &set.concepts()[set.concept_of_image()[image]].captions[0].text;
            members.push((format!("{image:03}.png"), png.into_inner()));
            members.push((format!("{image:03}.txt"), caption.clone().into_bytes()));
        }
        members.push(("bad.jpg".into(), vec![1, 2, 3]));
        members.push(("bad.txt".into(), b"bad".to_vec()));
        let path = folder.join(format!("{shard}.tar"));
        fs::write(&path, tar(&members)).unwrap();
        path
    };
    (0..2).map(shard).collect()
}

fn stream(folder: &Path, batch_size: usize) -> Stream {
    let samples = Arc::new(TarShards::open(shards(folder)).unwrap());
    let config = StreamConfig::new(batch_size).with_shuffle(16).with_context_length(12);
    Stream::new(samples, ImagePreprocessor::new(8), config).unwrap()
}

/// A sparse model that drops nothing and moves a balancing bias.
fn model(device: &Device, balancing: BalancingOptions) -> Clip {
    let tokens = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let router = RouterOptions::new().with_balancing(Some(balancing));
    let layer = RoutedLayerConfig::new().with_router(router).with_assignment(tokens.into());
    let encoder = SparseEncoderConfig::new().with_layer(layer.into());
    let sparse = SparseClipConfig::new().with_vision(Some(encoder.clone())).with_text(Some(encoder));
    clip_config().sparse(sparse).init(device)
}

/// Balancing that has a state beside the bias.
fn with_momentum() -> BalancingOptions {
    let balancing = BalancingOptions::new(0.01).with_rule(BalancingRule::ZScore);
    balancing.with_momentum(0.9).with_cap(Some(0.05)).with_warmup_steps(8)
}

fn optimizer() -> OptimizerConfig {
    OptimizerConfig::new(WarmupCosine::new(1e-3).with_warmup_steps(3))
}

fn weights(model: &Clip) -> Vec<f32> {
    let router = |encoder: &burn_moe::transformer::Encoder| match &encoder.blocks[1].feed_forward {
        burn_moe::transformer::FeedForward::Moe(moe) => {
            let router = &moe.router;
            let balancing = [&router.balancing_bias, &router.balancing_momentum, &router.balancing_warmup];
            let balancing = balancing.into_iter().flatten().flat_map(|param| values(&param.val()));
            values(&router.weight.val()).into_iter().chain(balancing).collect::<Vec<f32>>()
        }
        _ => panic!("the block is sparse"),
    };
    let projections = [values(&model.vision.projection.weight.val()), values(&model.text.projection.weight.val())].concat();
    [projections, router(&model.vision.encoder), router(&model.text.encoder), values(&model.logit_scale.val())].concat()
}

fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    (square(&mut a.iter().zip(b).map(|(a, b)| a - b)) / square(&mut a.iter().copied())).sqrt()
}

/// Reports of every step.
#[derive(Default)]
struct Reports(Vec<StepReport>, Vec<KeptRun>, usize);

impl Observer for Reports {
    fn on_step(&mut self, _: usize, _: usize, report: &StepReport) {
        self.0.push(report.clone());
    }

    fn on_resume(&mut self, kept: KeptRun) {
        self.1.push(kept);
    }

    fn on_skipped(&mut self, skipped: &burn_moe::train::stream::Skipped) {
        self.2 = skipped.count;
    }
}

struct Setup<'a> {
    arm: Arm,
    stream: &'a Stream,
    config: TrainConfig,
    device: Device,
}

impl Setup<'_> {
    fn run(
        &self,
        ranks: &dyn Ranks,
        checkpointing: Option<&Checkpointing>,
        observer: &mut dyn Observer,
    ) -> Result<TrainedArm, TrainError> {
        let input = TrainInput {
            arms: vec![self.arm.clone()],
            data: TrainData::Stream { stream: self.stream, threads: 2 },
            test: None,
            config: &self.config,
            checkpointing,
            ranks,
            device: &self.device,
            observer,
        };
        train(input).map(|mut arms| arms.remove(0))
    }
}

fn setup(stream: &Stream, steps: usize) -> Setup<'_> {
    let device = Device::default();
    let arm = Arm::new("sparse", model(&device, BalancingOptions::new(0.01)), optimizer());
    Setup { arm, stream, config: TrainConfig::new(steps).with_micro_batch(Some(4)), device }
}

#[test]
fn ranks_train_the_model_that_one_process_trains() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let setup = setup(&stream, 20);
    let mut alone = Reports::default();
    let expected = setup.run(&Solo, None, &mut alone).unwrap();
    assert!(alone.2 > 5, "{} samples were skipped", alone.2);
    assert!(alone.0.iter().any(|report| report.pairs < 12), "batches are smaller by samples that were skipped");
    for count in [2, 4] {
        let trained: Vec<(TrainedArm, Reports)> = thread::scope(|scope| {
            let run = |ranks: Threads| {
                let mut reports = Reports::default();
                let checkpointing = Checkpointing::new(folder.path().join(format!("run-{count}")), 10);
                (setup.run(&ranks, Some(&checkpointing), &mut reports).unwrap(), reports)
            };
            let threads: Vec<_> = Threads::new(count).into_iter().map(|ranks| scope.spawn(move || run(ranks))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (arm, reports) in &trained {
            let distance = apart(&weights(&expected.model), &weights(&arm.model));
            assert!(distance < 1e-5, "{count} ranks: {distance}");
            assert_eq!(weights(&arm.model), weights(&trained[0].0.model), "the same bits on every rank");
            let loads = |reports: &Reports| reports.0[0].layers.clone();
            assert_eq!(loads(reports), loads(&alone), "of the batch of all ranks");
            assert_eq!(reports.0[0].pairs, alone.0[0].pairs);
        }
    }
    // The first rank evaluates; the run goes on in the same way.
    let test = colours();
    for steps in [3, 5] {
        let config = TrainConfig { steps, eval_every: 2, ..setup.config.clone() };
        let run = |ranks: Threads| {
            let mut reports = Reports::default();
            let checkpointing = Checkpointing::new(folder.path().join("evaluated"), 1);
            let input = TrainInput {
                arms: vec![setup.arm.clone()],
                data: TrainData::Stream { stream: setup.stream, threads: 1 },
                test: (ranks.part().rank == 0).then_some(&test),
                config: &config,
                checkpointing: Some(&checkpointing),
                ranks: &ranks,
                device: &setup.device,
                observer: &mut reports,
            };
            let history = train(input).unwrap().remove(0).history;
            (ranks.part().rank, history.into_iter().map(|(step, _)| step).collect::<Vec<_>>(), reports.1)
        };
        let run = &run;
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = Threads::new(2).into_iter().map(|ranks| scope.spawn(move || run(ranks))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (rank, history, resumed) in results {
            let expected = if steps == 3 { vec![0, 2, 3] } else { vec![0, 2, 3, 4, 5] };
            assert_eq!(history, if rank == 0 { expected } else { Vec::new() });
            assert_eq!(resumed.len(), usize::from(steps == 5));
        }
    }
    // Ranks with other options are refused before they train.
    let run = |ranks: Threads| {
        let config = TrainConfig { steps: 20 + ranks.part().rank, ..setup.config.clone() };
        let other = Setup { config, arm: setup.arm.clone(), stream: setup.stream, device: setup.device.clone() };
        other.run(&ranks, None, &mut ()).map(|_| ()).unwrap_err().to_string()
    };
    let errors: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = Threads::new(2).into_iter().map(|ranks| scope.spawn(|| run(ranks))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for error in errors {
        assert!(error.ends_with("rank 1 was started with other options, other data or another model than rank 0"), "{error}");
    }
    // Two arms are not for ranks.
    let ranks = Threads::new(2);
    let input = TrainInput {
        arms: vec![setup.arm.clone(), setup.arm.clone()],
        data: TrainData::Stream { stream: &stream, threads: 1 },
        test: None,
        config: &setup.config,
        checkpointing: None,
        ranks: &ranks[0],
        device: &setup.device,
        observer: &mut (),
    };
    let error = train(input).unwrap_err().to_string();
    assert_eq!(error, "sparse: `arms that several ranks train` should be 1, but is 2");
}

#[test]
fn the_state_of_balancing_is_that_of_the_batch_on_every_rank_and_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let mut setup = setup(&stream, 6);
    setup.arm.model = model(&setup.device, with_momentum());
    let checkpointing = Checkpointing { keep: 2, ..Checkpointing::new(folder.path().join("run"), 3) };
    let run = || {
        let trained: Vec<Vec<f32>> = thread::scope(|scope| {
            let run = |ranks: Threads| weights(&setup.run(&ranks, Some(&checkpointing), &mut ()).unwrap().model);
            let threads: Vec<_> = Threads::new(2).into_iter().map(|ranks| scope.spawn(move || run(ranks))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(trained[0], trained[1], "the same bits on every rank");
        trained.into_iter().next().unwrap()
    };
    let whole = run();
    fs::remove_dir_all(folder.path().join("run/step-00000006")).unwrap();
    assert_eq!(checkpointing.kept_run().unwrap(), Some(KeptRun { step: 3, steps: 6 }));
    assert_eq!(run(), whole, "as if it was never stopped");
    let alone = setup.run(&Solo, None, &mut ()).unwrap();
    assert!(apart(&weights(&alone.model), &whole) < 1e-5);
    // Other balancing is another run.
    setup.arm.model = model(&setup.device, with_momentum().with_momentum(0.8));
    let error = setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap_err().to_string();
    assert!(error.contains("another configuration"), "{error}");
}

#[test]
fn a_rank_that_fails_ends_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let setup = setup(&stream, 20);
    struct Fail;
    impl Observer for Fail {
        fn on_step(&mut self, _: usize, step: usize, _: &StepReport) {
            assert!(step < 3, "failed");
        }
    }
    let errors: Vec<_> = thread::scope(|scope| {
        let run = |ranks: Threads| {
            let fails = ranks.part().rank == 1;
            let observer: &mut dyn Observer = if fails { &mut Fail } else { &mut () };
            setup.run(&ranks, None, observer).map(|_| ()).map_err(|error| error.to_string())
        };
        let threads: Vec<_> = Threads::new(2).into_iter().map(|ranks| scope.spawn(move || run(ranks))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or(Err("panicked".into()))).collect()
    });
    assert_eq!(errors, [Err("rank 0 of 2: rank 1 has ended before the others".into()), Err("panicked".to_string())]);
}

#[test]
fn a_run_that_was_stopped_within_an_epoch_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    // 38 samples: the checkpoints are within the first epochs.
    let stream = stream(folder.path(), 10);
    let mut setup = setup(&stream, 11);
    setup.arm.model = model(&setup.device, with_momentum());
    setup.arm.optimizer = optimizer().with_clip_norm(Some(0.5)).with_average(Some(0.9));
    let log = |name: &str| folder.path().join(name);
    let run = |name: &str, checkpointing: Option<&Checkpointing>, observer: &mut dyn Observer| {
        let mut observer = observer;
        let mut log = JsonLog::new(log(name), vec!["sparse".into()], 1, &mut observer).unwrap();
        let trained = setup.run(&Solo, checkpointing, &mut log);
        log.finish().unwrap();
        trained
    };
    let whole = run("whole.jsonl", None, &mut ()).unwrap();
    struct Stop;
    impl Observer for Stop {
        fn on_step(&mut self, _: usize, step: usize, _: &StepReport) {
            assert!(step < 9, "stopped");
        }
    }
    let checkpointing = Checkpointing { keep: 2, ..Checkpointing::new(folder.path().join("run"), 3) };
    let stopped = std::panic::AssertUnwindSafe(|| run("parts.jsonl", Some(&checkpointing), &mut Stop));
    assert!(std::panic::catch_unwind(stopped).is_err());
    let names = || {
        let entries = fs::read_dir(folder.path().join("run")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != ".lock");
        names.sort();
        names
    };
    assert_eq!(names(), ["step-00000003", "step-00000006"]);
    // What a run leaves that is killed while it writes.
    fs::create_dir(folder.path().join("run/.step-00000009")).unwrap();
    fs::write(folder.path().join("run/.step-00000009/arm-0-model.bpk"), b"half").unwrap();
    let mut reports = Reports::default();
    let resumed = run("parts.jsonl", Some(&checkpointing), &mut reports).unwrap();
    assert_eq!(reports.1, [KeptRun { step: 6, steps: 11 }]);
    assert_eq!(weights(&whole.model), weights(&resumed.model));
    let average = |arm: &TrainedArm| weights(arm.average.as_ref().unwrap());
    assert_eq!(average(&whole), average(&resumed));
    assert_ne!(average(&whole), weights(&whole.model));
    assert_eq!(names(), ["step-00000009", "step-00000011"]);
    // The logs are the same, times and memory aside.
    let lines = |name: &str| -> Vec<serde_json::Value> {
        let text = fs::read_to_string(log(name)).unwrap();
        let line = |line: &str| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().retain(|key, _| !["seconds", "memory", "peak_memory"].contains(&key.as_str()));
            line
        };
        text.lines().map(line).filter(|line| line.get("skipped").is_none()).collect()
    };
    assert_eq!(lines("whole.jsonl"), lines("parts.jsonl"));
    assert_eq!(lines("whole.jsonl").len(), 11);

    // A checkpoint of another version is refused with the reason, and so is one that is damaged.
    let state = folder.path().join("run/step-00000011/state.json");
    let text = fs::read_to_string(&state).unwrap();
    fs::write(&state, text.replacen("\"format\":3", "\"format\":7", 1)).unwrap();
    let error = run("x.jsonl", Some(&checkpointing), &mut ()).unwrap_err().to_string();
    assert!(error.contains("it has form 7, of another version of burn-moe; this one reads form 3"), "{error}");
    fs::write(&state, &text[..20]).unwrap();
    let error = run("x.jsonl", Some(&checkpointing), &mut ()).unwrap_err().to_string();
    assert!(error.contains("state.json: "), "{error}");
}

#[test]
fn a_run_that_goes_on_may_save_memory_in_another_way_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let mut setup = setup(&stream, 2);
    let checkpointing = Checkpointing::new(folder.path().join("run"), 2);
    setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap();
    setup.config = TrainConfig::new(3).with_micro_batch(Some(3)).with_recompute_blocks(true).with_eval_every(7);
    let mut reports = Reports::default();
    setup.run(&Solo, Some(&checkpointing), &mut reports).unwrap();
    assert_eq!(reports.1, [KeptRun { step: 2, steps: 2 }]);

    let start = setup.arm.clone();
    let config = setup.config.clone();
    let mut refused = |arm: Arm, config: TrainConfig, difference: &str| {
        (setup.arm, setup.config) = (arm, config);
        let error = setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap_err().to_string();
        let start = format!("{}: the run in this folder has another configuration: {difference}", checkpointing.folder.display());
        assert!(error.starts_with(&start), "{error}");
    };
    refused(start.clone(), config.clone().with_seed(5), "`train.seed` was 0 and is 5 now");
    let decayed = Arm { optimizer: start.optimizer.clone().with_weight_decay(0.5), ..start.clone() };
    refused(decayed, config.clone(), "`arms.0.optimizer.weight_decay` was 0.1");
    let other = Arm { model: model(&Device::default(), BalancingOptions::new(0.01)), ..start };
    refused(other, config, "it started from another model");
}

#[test]
fn a_run_goes_on_where_its_data_has_moved_to_and_not_with_other_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let here = stream(folder.path(), 12);
    let mut setup = setup(&here, 1);
    let adapted = |alpha: f64| setup.arm.model.clone().with_lora(&LoraOptions::new().with_rank(2).with_alpha(alpha));
    let [first, second] = [4.0, 8.0].map(adapted);
    setup.arm.model = first;
    let checkpointing = Checkpointing::new(folder.path().join("run"), 1);
    setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let there = stream(elsewhere.path(), 12);
    (setup.stream, setup.config.steps) = (&there, 2);
    setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap();
    (setup.arm.model, setup.config.steps) = (second, 3);
    let error = setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap_err().to_string();
    assert!(error.contains("its adapters have rank 2 and scale 2 then, and rank 2 and scale 4 now"), "{error}");
}

#[test]
fn a_run_on_a_stream_does_not_go_on_with_a_set_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let setup = setup(&stream, 1);
    let checkpointing = Checkpointing::new(folder.path().join("run"), 1);
    setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap();
    let set = load_samples(&TarShards::open(shards(folder.path())).unwrap(), &ImagePreprocessor::new(8)).unwrap().0;
    let batch = burn_moe::train::data::BatchConfig::new().with_batch_size(4).with_context_length(12);
    let error = train(TrainInput {
        arms: vec![setup.arm.clone()],
        data: TrainData::Set { set: &set, batch },
        test: None,
        config: &setup.config.clone().with_seed(0),
        checkpointing: Some(&checkpointing),
        ranks: &Solo,
        device: &setup.device,
        observer: &mut (),
    })
    .unwrap_err();
    assert!(error.to_string().contains("it has a set in memory in place of a stream"), "{error}");
}

#[test]
fn what_a_run_was_evaluated_on_is_not_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let setup = setup(&stream, 1);
    let checkpointing = Checkpointing::new(folder.path().join("run"), 1);
    let tests = load_samples(&TarShards::open(shards(folder.path())).unwrap(), &ImagePreprocessor::new(8)).unwrap().0;
    let run = |test: Option<&burn_moe::train::data::ImageTextSet>, steps: usize| {
        train(TrainInput {
            arms: vec![setup.arm.clone()],
            data: TrainData::Stream { stream: &stream, threads: 1 },
            test,
            config: &TrainConfig::new(steps),
            checkpointing: Some(&checkpointing),
            ranks: &Solo,
            device: &setup.device,
            observer: &mut (),
        })
    };
    run(Some(&tests.select(|image| image < 5)), 1).unwrap();
    run(None, 2).unwrap();
    let error = run(Some(&tests.select(|image| image < 4)), 3).unwrap_err().to_string();
    assert!(error.contains("was evaluated on another set"), "{error}");
    run(Some(&tests.select(|image| image < 5)), 3).unwrap();
}

#[test]
fn one_process_at_a_time_keeps_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let setup = setup(&stream, 2);
    let checkpointing = Checkpointing::new(folder.path().join("run"), 1);
    struct Again<'a>(&'a Setup<'a>, &'a Checkpointing, Vec<String>);
    impl Observer for Again<'_> {
        fn on_step(&mut self, _: usize, _: usize, _: &StepReport) {
            self.2.extend(self.0.run(&Solo, Some(self.1), &mut ()).err().map(|error| error.to_string()));
        }
    }
    let mut again = Again(&setup, &checkpointing, Vec::new());
    setup.run(&Solo, Some(&checkpointing), &mut again).unwrap();
    assert!(again.2.len() == 2 && again.2[0].contains("another process keeps its run in this folder"), "{:?}", again.2);
    setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap();
}

#[test]
fn data_that_ends_leaves_the_steps_that_were_done() {
    let folder = tempfile::tempdir().unwrap();
    let archive = fs::read(&shards(folder.path())[0]).unwrap();
    let pipe = || {
        let samples = Arc::new(TarStream::new("pipe", Cursor::new(archive.clone())));
        let config = StreamConfig::new(6).with_shuffle(4).with_context_length(12);
        Stream::new(samples, ImagePreprocessor::new(8), config).unwrap()
    };
    let checkpointing = Checkpointing::new(folder.path().join("run"), 100);
    let first = pipe();
    let mut setup = setup(&first, 8);
    let error = setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap_err().to_string();
    assert!(error.starts_with("pipe ended after 19 samples"), "{error}");
    assert_eq!(checkpointing.kept_run().unwrap(), Some(KeptRun { step: 3, steps: 8 }));
    // And may end there, evaluated.
    let again = pipe();
    setup.stream = &again;
    setup.config.steps = 3;
    setup.run(&Solo, Some(&checkpointing), &mut ()).unwrap();
    let test = load_samples(&TarShards::open(shards(folder.path())).unwrap(), &ImagePreprocessor::new(8)).unwrap().0;
    let input = TrainInput {
        arms: vec![setup.arm.clone()],
        data: TrainData::Stream { stream: &again, threads: 1 },
        test: Some(&test),
        config: &setup.config,
        checkpointing: Some(&checkpointing),
        ranks: &Solo,
        device: &setup.device,
        observer: &mut (),
    };
    assert_eq!(train(input).unwrap()[0].history.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3]);
    // What is kept already is not written again.
    let state = folder.path().join("run/step-00000003/state.json");
    let written = || fs::metadata(&state).unwrap().modified().unwrap();
    let (before, third) = (written(), pipe());
    setup.stream = &third;
    setup.config.steps = 8;
    let often = Checkpointing::new(folder.path().join("run"), 3);
    assert!(setup.run(&Solo, Some(&often), &mut ()).is_err());
    assert_eq!(written(), before);
    // Begun anew, the old run stays until the new one has a checkpoint.
    let anew = Checkpointing { overwrite: true, ..often.clone() };
    assert!(setup.run(&Solo, Some(&anew), &mut ()).unwrap_err().to_string().contains("ended after"), "read to its end before");
    assert_eq!(often.kept_run().unwrap().unwrap().step, 3);
    // Whatever is there.
    fs::write(folder.path().join("run/step-00000003/state.json"), "{}").unwrap();
    assert!(often.kept_run().is_err());
    let fourth = pipe();
    setup.stream = &fourth;
    fs::create_dir(folder.path().join("run/step-notes")).unwrap();
    setup.config.steps = 2;
    setup.run(&Solo, Some(&anew), &mut ()).unwrap();
    assert_eq!(often.kept_run().unwrap(), Some(KeptRun { step: 2, steps: 2 }));
    assert!(folder.path().join("run/step-notes").exists());
}

#[test]
fn what_is_frozen_keeps_its_balancing_biases() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let mut setup = setup(&stream, 3);
    let biases = |model: &Clip| {
        [&model.vision.encoder, &model.text.encoder].map(|encoder| match &encoder.blocks[1].feed_forward {
            burn_moe::transformer::FeedForward::Moe(moe) => values(&moe.router.balancing_bias.as_ref().unwrap().val()),
            _ => panic!("the block is sparse"),
        })
    };
    let start = setup.arm.model.clone();
    let trained = setup.run(&Solo, None, &mut ()).unwrap().model;
    assert!(biases(&start).iter().zip(biases(&trained)).all(|(before, after)| *before != after));
    setup.arm.frozen = Some(Tower::Vision);
    let trained = setup.run(&Solo, None, &mut ()).unwrap().model;
    assert_eq!(biases(&start)[0], biases(&trained)[0]);
    assert_ne!(biases(&start)[1], biases(&trained)[1]);
    setup.arm.frozen = None;
    let mut one = start.clone();
    if let burn_moe::transformer::FeedForward::Moe(moe) = &mut one.text.encoder.blocks[1].feed_forward {
        moe.router.weight = moe.router.weight.clone().set_require_grad(false);
    }
    setup.arm.model = one;
    let trained = setup.run(&Solo, None, &mut ()).unwrap().model;
    assert_ne!(biases(&start)[0], biases(&trained)[0]);
    assert_eq!(biases(&start)[1], biases(&trained)[1]);
    setup.arm.model = start.clone().with_lora(&LoraOptions::new().with_rank(2));
    let trained = setup.run(&Solo, None, &mut ()).unwrap().model;
    assert_eq!(biases(&start), biases(&trained));
}

#[test]
fn bfloat16_with_32_bit_weights_trains_alike() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let mut setup = setup(&stream, 40);
    let mut losses = |precision, micro_batch, recompute_blocks| {
        setup.config = TrainConfig { precision, micro_batch, recompute_blocks, ..setup.config.clone() };
        let mut reports = Reports::default();
        let trained = setup.run(&Solo, None, &mut reports).unwrap();
        let losses: Vec<f64> = reports.0.iter().map(|report| report.contrastive).collect();
        (losses, trained)
    };
    let (expected, _) = losses(TrainPrecision::F32, Some(4), false);
    for (micro_batch, recompute_blocks) in [(Some(4), false), (None, false), (Some(4), true)] {
        let (found, trained) = losses(TrainPrecision::Bf16, micro_batch, recompute_blocks);
        // Later, so small a model on so few samples goes its own way; from some starts, which no test can choose, a single step differs by 9 % before.
        assert!((found[0] / expected[0] - 1.0).abs() < 0.05, "the same weights: {} {}", found[0], expected[0]);
        let early = |losses: &[f64]| losses[..6].iter().sum::<f64>() / 6.0;
        assert!((early(&found) / early(&expected) - 1.0).abs() < 0.1, "{found:?} {expected:?}");
        let last = found[30..].iter().sum::<f64>() / 10.0;
        assert!(last < 0.95 * found[0], "{found:?}");
        // Weights have more bits than bfloat16.
        let fine = weights(&trained.model).iter().filter(|value| value.to_bits() & 0xffff != 0).count();
        assert!(fine > 100);
    }
}

#[test]
fn rates_limits_and_samples_do_what_they_say() {
    let folder = tempfile::tempdir().unwrap();
    let stream = stream(folder.path(), 12);
    let mut setup = setup(&stream, 3);
    let start = setup.arm.model.clone();
    setup.arm.optimizer.rates = RateFactors::new().with_vision(0.0).with_router(Some(0.0));
    let trained = setup.run(&Solo, None, &mut ()).unwrap().model;
    let part = |model: &Clip| [&model.vision.projection.weight, &model.text.projection.weight].map(|weight| values(&weight.val()));
    assert_eq!(part(&start)[0], part(&trained)[0], "the vision tower has no rate");
    assert_ne!(part(&start)[1], part(&trained)[1]);
    // Without momentum, a limit on the gradients does not matter to Adam but for epsilon: it shows in the report alone.
    setup.arm.optimizer = optimizer().with_clip_norm(Some(1e-3));
    let mut limited = Reports::default();
    setup.run(&Solo, None, &mut limited).unwrap();
    assert!(limited.0.iter().all(|report| report.gradient_norm > 1e-2));
    for (config, name) in [
        (OptimizerConfig::new(WarmupCosine::new(-0.5)), "`schedule.peak` is -0.5"),
        (OptimizerConfig::new(WarmupCosine::new(f64::NAN)), "`schedule.peak` is NaN"),
        (optimizer().with_weight_decay(f32::INFINITY), "`weight_decay` is inf"),
        (optimizer().with_beta_2(1.0), "`beta_2` is 1"),
        (optimizer().with_epsilon(0.0), "`epsilon` is 0"),
        (optimizer().with_clip_norm(Some(0.0)), "`clip_norm` is 0"),
        (optimizer().with_average(Some(1.0)), "`average` is 1"),
        (optimizer().with_rates(RateFactors::new().with_text(-1.0)), "`rates.text` is -1"),
    ] {
        setup.arm.optimizer = config;
        let error = setup.run(&Solo, None, &mut ()).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }

    let samples = TarShards::open(shards(folder.path())).unwrap();
    let (set, skipped) = load_samples(&samples, &ImagePreprocessor::new(8)).unwrap();
    assert_eq!((set.len(), skipped.len()), (36, 2));
    let reds = set.concepts().iter().filter(|concept| concept.captions[0].text == "red").count();
    assert_eq!(reds, 3);
}

/// Cases that PyTorch, torchvision and open_clip computed (tools/fixtures/training.py).
fn reference() -> serde_json::Value {
    let text = fs::read_to_string(format!("{ROOT}/tests/data/training/reference.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn crops_are_those_of_torchvision_from_the_same_numbers() {
    let numbers = |value: &serde_json::Value| value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>();
    let reference = reference();
    let cases = reference["crops"].as_array().unwrap();
    for case in cases {
        let [size, area, aspect, drawn, expected] = ["size", "area", "aspect", "numbers", "box"].map(|field| numbers(&case[field]));
        let config = RandomCropConfig::new().with_area([area[0], area[1]]).with_aspect([aspect[0], aspect[1]]);
        let mut drawn = drawn.into_iter();
        let part = config.draw(size[0] as u32, size[1] as u32, || drawn.next().unwrap() as f32);
        assert_eq!([part.left, part.top, part.width, part.height].map(f64::from)[..], expected[..], "{case}");
        assert_eq!(drawn.next(), None, "as many numbers were drawn");
    }
    assert_eq!(cases.len(), 120);
}

#[test]
fn patch_dropout_is_that_of_open_clip() {
    let device = Device::default();
    let folder = format!("{ROOT}/tests/fixtures/clip-openclip-gelu");
    let model = ClipCheckpoint::load(&folder, &device).unwrap().model;
    let bytes = fs::read(format!("{folder}/reference.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let images = tensors.tensor("pixel_values").unwrap();
    let values: Vec<f32> = images.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let images = Tensor::<4>::from_data(TensorData::new(values, images.shape().to_vec()), &device);
    let reference = reference();
    let rows = |field: &str| -> Vec<Vec<f32>> { serde_json::from_value(reference["patch_dropout"][field].clone()).unwrap() };
    let patches = rows("patches");
    let shape = [patches.len(), patches[0].len()];
    let patches: Vec<i32> = patches.concat().into_iter().map(|patch| patch as i32).collect();
    let found = model.vision.forward_patches(images, Tensor::from_data(TensorData::new(patches, shape), &device)).embedding;
    let expected = rows("embeddings").concat();
    let distance = apart(&expected, &values_of(found));
    assert!(distance < 1e-6, "{distance}");
}

fn values_of(tensor: Tensor<2>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}
