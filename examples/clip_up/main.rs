//! The main job: upcycles a real dense CLIP, trains it and the dense one on side by side, and compares what they retrieve.
//!
//! ```sh
//! cargo run --release --example clip_up
//! ```
//!
//! It takes the small CLIP of this repository (`data/clip-emoji`) and the emoji pack (`data/emoji`): five vendors' drawings to train on, Twemoji's
//! to test on, with labels in 16 languages. Everything is written into `--out`: both checkpoints, `report.json`, and the pictures
//! `clip_up.png` and `experts.png`.
//! With `--list pairs.csv` it takes your own images: a list of any kind that `CaptionedImages::read` knows. `--test` names another list to test
//! on; without it every tenth image is held out. Images are prepared as the dense checkpoint says.

#[path = "../support/canvas.rs"]
mod canvas;
mod data;
#[path = "../support/experts.rs"]
mod experts;
mod picture;
mod report;
#[path = "../support/mod.rs"]
mod support;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use burn_moe::{
    Capacity, TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{
        Clip, ClipAuxiliaryLossConfig, ClipConfig, SparseClipConfig,
        checkpoint::{ClipCheckpoint, LoadOptions, Precision},
        tokenizer::ClipTokenizer,
    },
    train::{
        Arm, Checkpointing, Evaluation, KeptRun, Observer, OptimizerConfig, StepReport, Tower, TrainConfig, TrainData, TrainInput,
        WarmupCosine, data::BatchConfig, ranks::Solo, train,
    },
    transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
    upcycle::Probe,
};
use clap::{ArgAction, Parser, ValueEnum};
use data::Data;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use report::Outcome;
use support::{ListArgs, device_by_name, refuse_checkpoint};

/// Parameters of models that take the learning rates of this repository's.
const SMALL: u64 = 5_000_000;
/// Highest learning rates of the dense and the sparse model for those, each its best of three on noto-v1; and for others.
const SMALL_RATES: [f64; 2] = [1e-3, 5e-4];
const RATES: [f64; 2] = [1e-5, 1e-5];

/// The most steps of `--quick`.
const TRIAL: u64 = 20;

#[derive(Parser)]
#[command(
    about = "Upcycles a dense CLIP and trains it on beside the dense one",
    after_help = "Example: clip_up --dense clip-vit-base-patch16 --list train.csv --test test.csv --every 2 --steps 2000 --out out/mine"
)]
struct Args {
    /// Decides routers, data order and image changes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Optimiser steps of both models, in all
    #[arg(long, default_value_t = 3000)]
    steps: usize,
    /// Where the results go, and the run's last checkpoint, with which it can be resumed (some six times the size of both models)
    /// [default: out/clip_up, or out/clip_up_quick with --quick]
    #[arg(long)]
    out: Option<PathBuf>,
    /// With --list: stop with an error when an image cannot be read, instead of skipping it
    #[arg(long, requires = "list")]
    strict: bool,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Go on with the run in --out, from its last evaluation. --steps, --eval-every, --micro-batch and --gradient-checkpointing may be others than
    /// before: with more steps, a run that has ended goes on, and the learning rate follows the schedule of all steps from there on
    #[arg(long)]
    resume: bool,
    /// Begin anew in a folder that holds another run, whose results are lost
    #[arg(long, conflicts_with = "resume")]
    overwrite: bool,
    /// Keep only what goes into each block, and compute the block again in the backward pass: less memory, longer steps
    #[arg(long)]
    gradient_checkpointing: bool,
    /// A few steps only (at most 20), to see that everything works; the next run may write over their results
    #[arg(long)]
    quick: bool,
    /// A list of images and captions to train on, instead of the emoji
    #[arg(long, visible_alias = "data")]
    list: Option<PathBuf>,
    /// A list to test on, read with the same options; without it every tenth image of --list is held out
    #[arg(long, requires = "list")]
    test: Option<PathBuf>,
    #[command(flatten)]
    columns: ListArgs,
    /// Side of the images in pixels, if it should be another than the checkpoint's: its position embeddings are then interpolated
    #[arg(long, requires = "list")]
    image_size: Option<usize>,
    /// The dense checkpoint (Hugging Face or open_clip)
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-emoji"))]
    dense: PathBuf,
    /// A training vendor to test on instead of Twemoji; for tuning, with a `--dense` that has not seen it either
    #[arg(long, conflicts_with = "list")]
    hold_out: Option<String>,
    /// Languages of the emoji's captions, such as en,de
    #[arg(long, value_delimiter = ',', default_value = "all", conflicts_with = "list")]
    languages: Vec<String>,
    /// Whether the emoji's tags are added to half of the captions in training
    #[arg(long, default_value_t = false, action = ArgAction::Set, conflicts_with = "list")]
    tags: bool,
    /// Which blocks become sparse: every N-th. CLIP-UP has 2; a model of few blocks gains more with 1 (docs/experiments.md)
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// Which towers become sparse
    #[arg(long, default_value = "both")]
    sparse: Towers,
    /// A tower that both models leave as it is in the dense checkpoint; `image` is LiT. It does not become sparse
    #[arg(long)]
    freeze: Option<Frozen>,
    /// Slots per expert in training, over an even share of all choices: 1 holds a perfectly even load; without it there is no limit, and nothing is
    /// dropped
    #[arg(long)]
    capacity: Option<f64>,
    /// Experts of each sparse block
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Highest learning rate of the dense model; without it 1e-3 for a model as small as this repository's, and 1e-5 for others
    #[arg(long)]
    dense_lr: Option<f64>,
    /// Highest learning rate of the sparse model; without it 5e-4 for a model as small as this repository's, and 1e-5 for others
    #[arg(long)]
    sparse_lr: Option<f64>,
    /// Weight decay, times the learning rate at each step
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// Pairs in a batch, no caption twice; without it 256, or as many as half of the images or the different captions allow
    #[arg(long)]
    batch_size: Option<usize>,
    /// Pairs that are computed at a time, for batches that do not fit in memory; the whole batch unless given. A --capacity then
    /// holds for each micro-batch
    #[arg(long)]
    micro_batch: Option<usize>,
    /// Steps between evaluations
    #[arg(long, default_value_t = 500)]
    eval_every: usize,
}

/// The towers that become sparse.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Towers {
    Both,
    Image,
    Text,
}

/// The tower that is not trained.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Frozen {
    #[value(alias = "vision")]
    Image,
    Text,
}

impl Args {
    /// Which towers become sparse, images first.
    fn sparse_towers(&self) -> [bool; 2] {
        [
            self.sparse != Towers::Text && self.freeze != Some(Frozen::Image),
            self.sparse != Towers::Image && self.freeze != Some(Frozen::Text),
        ]
    }

    fn sparse_config(&self, dense: &ClipConfig) -> Result<ClipConfig, Box<dyn Error>> {
        let capacity = self.capacity.map_or(Capacity::Dropless, Capacity::OfBalancedLoad);
        let tokens = TokenChoiceConfig::new().with_training_capacity(capacity);
        let experts = SparseEncoderConfig::new()
            .with_blocks(BlockSelection::EveryNth(self.every))
            .with_num_experts(self.experts)
            .with_layer(RoutedLayerConfig::new().with_assignment(tokens.into()).into());
        let [vision, text] = self.sparse_towers().map(|sparse| sparse.then(|| experts.clone()));
        if vision.is_none() && text.is_none() {
            return Err("no tower is left to become sparse: the one of --sparse is the one of --freeze".into());
        }
        let config = dense.clone().sparse(SparseClipConfig::new().with_vision(vision).with_text(text));
        config.validate()?;
        Ok(config)
    }
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = Args::parse();
    if args.quick {
        args.steps = args.steps.min(TRIAL as usize);
        args.eval_every = args.eval_every.min(10);
    }
    let device = device_by_name(&args.device)?;
    device.seed(args.seed);
    let training = device.clone().autodiff();

    let out = args.out.clone().unwrap_or(PathBuf::from(if args.quick { "out/clip_up_quick" } else { "out/clip_up" }));
    fs::create_dir_all(&out).map_err(|error| format!("{}: {error}", out.display()))?;
    let overwrite = args.overwrite;
    let checkpointing = Checkpointing { overwrite, ..Checkpointing::new(out.join("checkpoints"), args.eval_every) };
    if !overwrite {
        let kept = checkpointing.kept_run().map_err(|error| format!("{error}, or begin anew with --overwrite"))?;
        check_kept_run(&args, &out, kept)?;
        if kept.is_none() && !holds_trial(&out) {
            ["dense", "sparse"].into_iter().try_for_each(|name| refuse_checkpoint(&out.join(name), false))?;
        }
    }

    let dense = ClipCheckpoint::load_with(&args.dense, &LoadOptions::new().with_image_size(args.image_size), &device).map_err(|error| {
        format!("{error}\n(the published package holds no data: `data/clip-emoji` is in the repository, and `--example pretrain` makes one)")
    })?;
    let tokenizer = ClipTokenizer::for_model(&dense.model.text)?;
    let Data { set, test, skipped } = Data::read(&args, &dense.config.vision)?;
    println!("{} images to train on, {} to test on", set.len(), test.len());

    let sparse_config = args.sparse_config(&dense.config)?;
    let context_length = dense.config.text.context_length;
    let probe = Probe::ImagesAndTexts {
        images: test.images(0..test.len().min(32), &device),
        tokens: tokenizer.tokenize(&data::captions(&test, 32), context_length).tensor(&device),
    };
    let options = UpcycleOptions::default().with_probe(probe);
    let upcycled = sparse_config.init(&device).upcycle_from_dense(&dense.model, &options)?;
    println!("{}", upcycled.report);

    let is_small = dense.config.cost().params_total < SMALL;
    let [dense_rate, sparse_rate] = if is_small { SMALL_RATES } else { RATES };
    let (dense_lr, sparse_lr) = (args.dense_lr.unwrap_or(dense_rate), args.sparse_lr.unwrap_or(sparse_rate));
    let optimizer = |rate| OptimizerConfig::new(WarmupCosine::new(rate)).with_weight_decay(args.weight_decay);
    let frozen = args.freeze.map(|tower| if tower == Frozen::Image { Tower::Vision } else { Tower::Text });
    let arm = |name: &str, model: &Clip, rate| Arm { frozen, ..Arm::new(name, model.clone(), optimizer(rate)) };
    let arms = vec![arm("dense_continued", &dense.model, dense_lr), arm("sparse", &upcycled.model, sparse_lr)];
    let config = TrainConfig::new(args.steps)
        .with_eval_every(args.eval_every)
        .with_seed(args.seed)
        .with_micro_batch(args.micro_batch)
        .with_recompute_blocks(args.gradient_checkpointing);
    let batch = BatchConfig::new().with_context_length(context_length).with_vocab_size(tokenizer.vocab_size());
    let most = (set.len() / 2).min(batch.largest_batch(&set));
    let batch_size = args.batch_size.unwrap_or(most.clamp(1, batch.batch_size));
    println!("batches of {batch_size}, highest learning rate {dense_lr} (dense) and {sparse_lr} (sparse)");
    let batch = batch.with_batch_size(batch_size);
    let mut progress = Progress::new(&arms, args.steps);
    let trained = train(TrainInput {
        arms,
        data: TrainData::Set { set: &set, batch },
        test: Some(&test),
        config: &config,
        checkpointing: Some(&checkpointing),
        ranks: &Solo,
        device: &training,
        observer: &mut progress,
    })?;
    progress.finish();
    // A small model dips in its warm-up and comes back.
    for arm in trained.iter().filter(|_| !is_small) {
        let recall = |evaluation: &Evaluation| evaluation.retrieval.text_to_image.r1;
        if let [(_, before), (step, first), ..] = &arm.history[..]
            && recall(first) < recall(before)
        {
            let (before, first) = (100.0 * recall(before), 100.0 * recall(first));
            eprintln!(
                "warning: {} fell from {before:.2} to {first:.2} % (text to image R@1) until step {step}: is its learning rate too high?",
                arm.name
            );
        }
    }
    let [dense_continued, sparse] = &trained[..] else { unreachable!("two arms were trained") };

    let before = &dense_continued.history[0].1;
    let results = [
        Outcome { name: "dense", evaluation: before, cost: dense.config.cost(), dropped: 0.0 },
        Outcome::of("dense_continued", dense_continued, dense.config.cost()),
        Outcome::of("sparse", sparse, sparse_config.cost()),
    ];
    report::print_table(&results, sparse.truncated);
    let gain = report::gain(&test, dense_continued, sparse);
    println!("text to image R@1, sparse minus dense_continued: {}", report::points(&gain));
    report::print_languages(&results);
    let step_ratio = sparse.time.as_secs_f64() / dense_continued.time.as_secs_f64();
    println!("a sparse step took {step_ratio:.2} times as long as a dense one");

    let known = experts::look_into(&sparse.model, &test, &tokenizer, context_length, &device);
    let report = serde_json::json!({
        "dense": results[0].json(),
        "dense_continued": results[1].json(),
        "sparse": results[2].json(),
        "t2i_r1_gain": gain,
        "step_time_ratio": step_ratio,
        "upcycling": upcycled.report,
        "history": trained.iter().map(|arm| (arm.name.clone(), report::history(&test, arm))).collect::<serde_json::Map<_, _>>(),
        "experts": known.iter().map(experts::Known::json).collect::<Vec<_>>(),
        "truncated_captions_in_training": sparse.truncated,
        "skipped_images": skipped,
        "seed": args.seed,
        "config": {
            "train": config,
            "batch": batch,
            "optimizer": { "dense_continued": optimizer(dense_lr), "sparse": optimizer(sparse_lr) },
            "auxiliary": ClipAuxiliaryLossConfig::new(),
            "frozen": frozen,
            "model": sparse_config,
            "device": args.device,
            "dense_checkpoint": args.dense,
            "list": args.list,
            "test": args.test,
        },
    });
    for (name, config, arm) in [("sparse", sparse_config, sparse), ("dense", dense.config, dense_continued)] {
        // This crate's own layout has a place for every setting of either.
        ClipCheckpoint { config, model: arm.model.clone() }.save_sparse(out.join(name), Precision::F32)?;
    }
    support::write_atomic(out.join("report.json"), serde_json::to_string_pretty(&report)?.as_bytes())?;
    picture::draw(&out.join("clip_up.png"), &test, &trained, args.steps)?;
    experts::draw(&out.join("experts.png"), &known, &test)?;
    // A trial is not worth going on with.
    if args.quick {
        fs::remove_dir_all(&checkpointing.folder)?;
    }
    println!("the checkpoints `dense` and `sparse`, report.json, clip_up.png and experts.png are in {}", out.display());
    Ok(())
}

/// Whether the results in a folder are those of `--quick`, which nobody misses.
fn holds_trial(out: &Path) -> bool {
    let report = fs::read(out.join("report.json")).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    report.and_then(|report| report["config"]["train"]["steps"].as_u64()).is_some_and(|steps| steps <= TRIAL)
}

/// Refuses to overwrite a run, and to resume what is not there or has done its steps.
fn check_kept_run(args: &Args, out: &Path, kept: Option<KeptRun>) -> Result<(), Box<dyn Error>> {
    let out = out.display();
    match kept {
        None if args.resume => Err(format!("{out} holds no run to go on with: leave --resume out, or name its --out").into()),
        Some(KeptRun { step, .. }) if args.resume && step >= args.steps => {
            Err(format!("the run in {out} has done {step} steps already: name more with --steps").into())
        }
        Some(KeptRun { step, steps }) if !args.resume && step >= steps => Err(format!(
            "{out} holds a run that has done its {steps} steps: go on with --resume and more --steps, begin anew with --overwrite, or take another --out"
        )
        .into()),
        Some(KeptRun { step, steps }) if !args.resume => Err(format!(
            "{out} holds a run that has done {step} of {steps} steps: go on with --resume, begin anew with --overwrite, or take another --out"
        )
        .into()),
        _ => Ok(()),
    }
}

struct Progress {
    bars: Vec<ProgressBar>,
    names: Vec<String>,
    steps: usize,
}

impl Progress {
    fn new(arms: &[Arm], steps: usize) -> Self {
        let all = MultiProgress::new();
        let style = ProgressStyle::with_template("{prefix:>16} {wide_bar} {pos}/{len} {per_sec} {elapsed} of {duration} {msg}")
            .expect("a template that indicatif reads");
        let bars = arms.iter().map(|arm| {
            let bar = all.add(ProgressBar::new(steps as u64));
            bar.with_style(style.clone()).with_prefix(arm.name.clone())
        });
        Self { bars: bars.collect(), names: arms.iter().map(|arm| arm.name.clone()).collect(), steps }
    }

    fn finish(&self) {
        self.bars.iter().for_each(|bar| bar.finish());
    }
}

impl Observer for Progress {
    fn on_step(&mut self, arm: usize, step: usize, losses: &StepReport) {
        self.bars[arm].set_position(step as u64);
        self.bars[arm].set_message(format!("loss {:.3}", losses.contrastive));
    }

    fn on_resume(&mut self, KeptRun { step, steps }: KeptRun) {
        println!("going on from step {step}");
        if steps != self.steps {
            println!("note: {steps} steps were planned; from here on, the learning rate follows the schedule of {}", self.steps);
        }
    }

    fn on_evaluation(&mut self, arm: usize, step: usize, evaluation: &Evaluation) {
        let recall = evaluation.retrieval.text_to_image;
        let (name, r1, r5) = (&self.names[arm], 100.0 * recall.r1, 100.0 * recall.r5);
        let line = format!("step {step:>5}, {name:<15}: text to image R@1 {r1:5.2} %, R@5 {r5:5.2} %");
        // A bar that is not on a terminal prints nothing by itself.
        if self.bars[arm].is_hidden() { println!("{line}") } else { self.bars[arm].println(line) }
    }
}
