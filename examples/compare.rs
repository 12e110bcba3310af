//! Compares upcycling recipes, routers and losses on the emoji pack at equal steps, tuned on a vendor that no model was trained on.
//!
//! ```sh
//! cargo run --release --example compare                     # everything, one seed: about an hour on two cores
//! cargo run --release --example compare -- --only copy,soft --seeds 0,1,2
//! cargo run --release --example compare -- --list
//! ```
//!
//! First it trains a dense CLIP without the held-out vendor, then every recipe from that model. Everything is kept in `--out`: started
//! again, it goes on where it was stopped, and it prints the table of all that is finished. docs/experiments.md has a table that it printed.

mod support;

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
};

use burn::tensor::Device;
use burn_moe::{
    AssignmentConfig, AuxiliaryLossConfig, BalancingOptions, BalancingRule, Capacity, ExpertChoiceConfig, FillOrder,
    GateNormalization, RouterOptions, RouterScore, TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{
        Clip, ClipAuxiliaryLossConfig, ClipConfig, SparseClipConfig, TextConfig, VisionConfig, checkpoint::ClipCheckpoint,
        checkpoint::Precision, tokenizer::ClipTokenizer,
    },
    train::{
        Arm, Checkpointing, Evaluation, Observer, OptimizerConfig, OptimizerState, StepReport, TrainConfig, TrainData, TrainInput,
        WarmupCosine,
        data::{BatchConfig, EmojiPack, EmojiVendor, ImageTextSet, Language},
        ranks::Solo,
        train,
    },
    transformer::{BlockSelection, EncoderConfig, Padding, Protection, RoutedLayerConfig, SparseEncoderConfig, SparseLayer},
    upcycle::{Probe, UpcycleStrategy},
};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use support::write_atomic;

#[derive(Parser)]
#[command(
    about = "Compares recipes at equal steps",
    after_help = "Example: compare --only copy,drop_0.5 --seeds 0,1,2 --steps 500"
)]
struct Args {
    /// Where runs and results are kept
    #[arg(long, default_value = "out/compare")]
    out: PathBuf,
    /// Recipes to run, by name; all unless given
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Seeds of each recipe, such as 0,1,2
    #[arg(long, value_delimiter = ',', default_value = "0")]
    seeds: Vec<u64>,
    /// Optimiser steps of each recipe
    #[arg(long, default_value_t = 1000)]
    steps: usize,
    /// Optimiser steps of the dense model that they start from
    #[arg(long, default_value_t = 8000)]
    dense_steps: usize,
    /// Steps between evaluations
    #[arg(long, default_value_t = 100)]
    eval_every: usize,
    /// Names of the recipes, and nothing else
    #[arg(long)]
    list: bool,
}

/// The vendor that is validated on.
const HELD_OUT: EmojiVendor = EmojiVendor::NotoV1;
/// Steps whose mean loss shows how a run starts.
const EARLY: usize = 20;
const LEARNING_RATE: f64 = 8e-3;
const WEIGHT_DECAY: f32 = 0.05;

/// What differs between recipes. The plain one is the main job's: copies in every block, 8 experts, top-2, dropless.
#[derive(Clone)]
struct Recipe {
    name: &'static str,
    /// `None`: the dense model itself.
    sparse: Option<SparseEncoderConfig>,
    strategy: UpcycleStrategy,
    auxiliary: ClipAuxiliaryLossConfig,
    keeps_moments: bool,
}

impl Recipe {
    fn dense(name: &'static str) -> Self {
        Self { sparse: None, ..Self::new(name, SparseEncoderConfig::new()) }
    }

    fn new(name: &'static str, sparse: SparseEncoderConfig) -> Self {
        let auxiliary = ClipAuxiliaryLossConfig::new();
        Self { name, sparse: Some(sparse), strategy: UpcycleStrategy::Copy, auxiliary, keeps_moments: false }
    }

    fn strategy(self, strategy: UpcycleStrategy) -> Self {
        Self { strategy, ..self }
    }

    fn auxiliary(self, weights: AuxiliaryLossConfig) -> Self {
        Self { auxiliary: ClipAuxiliaryLossConfig::both(weights), ..self }
    }

    fn with_moments(self) -> Self {
        Self { keeps_moments: true, ..self }
    }
}

fn recipes(d_ff: usize) -> Vec<Recipe> {
    let tokens = || TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let layer = || RoutedLayerConfig::new().with_assignment(tokens().into());
    let every_block =
        |layer: RoutedLayerConfig| SparseEncoderConfig::new().with_blocks(BlockSelection::EveryNth(1)).with_layer(layer.into());
    let plain = || every_block(layer());
    let routed = |router: RouterOptions| every_block(layer().with_router(router));
    let assigned = |assignment: AssignmentConfig| every_block(layer().with_assignment(assignment));
    let losses = AuxiliaryLossConfig::new;
    // Half of an even share, in training and at inference: what a tight budget does.
    let tight_with = |order: FillOrder, protection: Protection| {
        let capacity = Capacity::OfTokens(1.0);
        let tokens = tokens().with_fill_order(order).with_training_capacity(capacity).with_inference_capacity(capacity);
        every_block(layer().with_assignment(tokens.into()).with_protection(protection))
    };
    let tight = |order: FillOrder| tight_with(order, Protection::Pooled);
    let shards = |shards: usize| {
        let tokens = tokens().with_top_k(2 * shards);
        assigned(tokens.into()).with_num_experts(8 * shards).with_d_ff(Some(d_ff / shards))
    };
    let sign = BalancingOptions::new(1e-3);
    let z_score = sign.clone().with_rule(BalancingRule::ZScore);
    let bias = |balancing: BalancingOptions| RouterOptions::new().with_balancing(Some(balancing));
    let sigmoid_bias = |balancing| bias(balancing).with_score(RouterScore::Sigmoid);
    let no_balance = || losses().with_load_balancing(0.0);
    // Scores are at most 1.
    let smooth = z_score.clone().with_momentum(0.9).with_cap(Some(0.5)).with_warmup_steps(100);
    let normalized = |scale| routed(RouterOptions::new().with_logit_normalization(Some(scale)));
    let top_1 = tokens().with_top_k(1).with_gate_normalization(GateNormalization::None);
    vec![
        Recipe::dense("dense_continued"),
        Recipe::new("copy", plain()),
        Recipe::new("noise_0.1", plain()).strategy(UpcycleStrategy::CopyWithNoise { relative_std: 0.1 }),
        Recipe::new("noise_0.5", plain()).strategy(UpcycleStrategy::CopyWithNoise { relative_std: 0.5 }),
        Recipe::new("drop_0.25", plain()).strategy(UpcycleStrategy::Drop { ratio: 0.25 }),
        Recipe::new("drop_0.5", plain()).strategy(UpcycleStrategy::Drop { ratio: 0.5 }),
        Recipe::new("granular_2", shards(2)).strategy(UpcycleStrategy::Granular { shards: 2 }),
        Recipe::new("granular_4", shards(4)).strategy(UpcycleStrategy::Granular { shards: 4 }),
        Recipe::new("cluster_0.9", plain()).strategy(UpcycleStrategy::ClusterAware { energy: 0.9 }),
        Recipe::new("cluster_0.99", plain()).strategy(UpcycleStrategy::ClusterAware { energy: 0.99 }),
        Recipe::new("cluster_router", plain()).strategy(UpcycleStrategy::ClusterAware { energy: 1.0 }),
        Recipe::dense("dense_moments").with_moments(),
        Recipe::new("copy_moments", plain()).with_moments(),
        Recipe::new("every_second", plain().with_blocks(BlockSelection::EveryNth(2))),
        Recipe::new("top_1", assigned(top_1.into())),
        Recipe::new("top_4", assigned(tokens().with_top_k(4).into())),
        Recipe::new("router_noise", routed(RouterOptions::new().with_noise(1.0))),
        Recipe::new("router_jitter", routed(RouterOptions::new().with_jitter(0.01))),
        Recipe::new("bias", routed(bias(sign.clone()))).auxiliary(no_balance()),
        Recipe::new("z_score_bias", routed(bias(z_score.clone()))).auxiliary(no_balance()),
        Recipe::new("z_score_bias_smooth", routed(bias(smooth))).auxiliary(no_balance()),
        Recipe::new("sigmoid_bias", routed(sigmoid_bias(sign))).auxiliary(no_balance().with_router_z(0.0)),
        Recipe::new("sigmoid_z_score_bias", routed(sigmoid_bias(z_score))).auxiliary(no_balance().with_router_z(0.0)),
        Recipe::new("logit_norm_1", normalized(1.0)),
        Recipe::new("logit_norm_2", normalized(2.0)),
        Recipe::new("expert_choice", assigned(ExpertChoiceConfig::new().into())).auxiliary(no_balance()),
        Recipe::new(
            "soft",
            SparseEncoderConfig::new()
                .with_blocks(BlockSelection::EveryNth(1))
                .with_layer(SparseLayer::Soft { slots_per_expert: 3 }),
        ),
        Recipe::new("no_losses", plain()).auxiliary(no_balance().with_router_z(0.0)),
        Recipe::new("balance_0.1", plain()).auxiliary(losses().with_load_balancing(0.1)),
        Recipe::new("z_0.01", plain()).auxiliary(losses().with_router_z(0.01)),
        Recipe::new("importance", plain()).auxiliary(no_balance().with_importance(0.01)),
        Recipe::new("entropies", plain())
            .auxiliary(no_balance().with_local_entropy(0.01).with_global_entropy(0.01).with_experts_in_use(8.0)),
        Recipe::new("capacity_2", assigned(TokenChoiceConfig::new().into())),
        Recipe::new("padding_routed", plain().with_padding(Padding::Routed)),
        Recipe::new("tight", tight(FillOrder::ChoiceMajor)),
        Recipe::new("tight_unprotected", tight_with(FillOrder::ChoiceMajor, Protection::None)),
        Recipe::new("tight_padding_routed", tight(FillOrder::ChoiceMajor).with_padding(Padding::Routed)),
        Recipe::new("tight_token_major", tight(FillOrder::TokenMajor)),
        Recipe::new("tight_batch_priority", tight(FillOrder::BatchPriority)),
    ]
}

/// What is kept of a run.
#[derive(Serialize, Deserialize, Clone)]
struct Outcome {
    t2i: [f64; 3],
    i2t: [f64; 3],
    /// (step, text to image R@1)
    history: Vec<(usize, f64)>,
    /// Of the layer that is least even: load of its busiest expert over the mean.
    peak_load: f64,
    dropped: f64,
    /// Mean contrastive loss of the first steps; not known of a run that was resumed after them.
    early_loss: Option<f64>,
    milliseconds_per_step: f64,
    gflops: f64,
}

fn main() -> ExitCode {
    support::run(compare)
}

fn compare() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let config = dense_config();
    let all = recipes(config.vision.encoder.d_ff);
    if args.list {
        all.iter().for_each(|recipe| println!("{}", recipe.name));
        return Ok(());
    }
    if let Some(unknown) = args.only.iter().find(|name| all.iter().all(|recipe| recipe.name != **name)) {
        return Err(format!("`{unknown}` is no recipe; `--list` names them").into());
    }
    fs::create_dir_all(&args.out)?;
    // Results of other settings must not stand in one table.
    let (settings, path) = (format!("{} steps from {} dense steps\n", args.steps, args.dense_steps), args.out.join("settings.txt"));
    match fs::read_to_string(&path) {
        Ok(old) if old != settings => return Err(format!("{} holds runs of {}", args.out.display(), old.trim()).into()),
        Ok(_) => {}
        Err(_) => write_atomic(&path, settings.as_bytes())?,
    }
    let device = Device::default();
    let pack = EmojiPack::open(concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji"))?;
    let vendors: Vec<_> = EmojiVendor::TRAINING.into_iter().filter(|vendor| *vendor != HELD_OUT).collect();
    let (set, validation) = (pack.load(&vendors, &[Language::En], true)?, pack.load(&[HELD_OUT], &[Language::En], false)?);
    println!("{} images to train on, {} of {} to validate on", set.len(), validation.len(), HELD_OUT.name());
    let base = Base { dense: dense_model(&args, &config, &set, &validation, &device)?, config, set, validation, device };

    for &seed in &args.seeds {
        let wanted = |recipe: &&Recipe| args.only.is_empty() || args.only.iter().any(|name| name == recipe.name);
        let missing = |recipe: &&Recipe| !outcome_path(&args.out, recipe.name, seed).is_file();
        let todo: Vec<&Recipe> = all.iter().filter(wanted).filter(missing).collect();
        // As many at a time as there are cores: the models are too small for more than one.
        let cores = thread::available_parallelism().map_or(1, usize::from);
        for recipes in todo.chunks(cores) {
            run(&args, &base, recipes, seed)?;
        }
    }
    print_table(&args.out, &all)
}

/// What all recipes start from.
struct Base {
    dense: (Clip, OptimizerState),
    config: ClipConfig,
    set: ImageTextSet,
    validation: ImageTextSet,
    device: Device,
}

/// A very small model with CLIP's whole vocabulary: that of `tests/data/clip-tiny`.
fn dense_config() -> ClipConfig {
    let vision = VisionConfig::new(EncoderConfig::new(24, 3, 3, 24), 32, 8);
    ClipConfig::new(vision, TextConfig::new(EncoderConfig::new(24, 3, 2, 24)).with_context_length(24), 64)
}

/// Trains the dense model, or reads it from the run that did.
fn dense_model(
    args: &Args,
    config: &ClipConfig,
    set: &ImageTextSet,
    validation: &ImageTextSet,
    device: &Device,
) -> Result<(Clip, OptimizerState), Box<dyn Error>> {
    device.seed(0);
    let arm = Arm {
        name: "dense".into(),
        model: config.init(device),
        optimizer: OptimizerConfig::new(WarmupCosine::new(6e-3)).with_weight_decay(WEIGHT_DECAY),
        auxiliary: ClipAuxiliaryLossConfig::new(),
        state: None,
        frozen: None,
    };
    let run = TrainConfig::new(args.dense_steps).with_eval_every(800);
    let checkpointing = Checkpointing::new(args.out.join("dense-run"), 400);
    let mut progress = Progress::new(&["dense".to_string()], args.dense_steps)?;
    let trained = train(TrainInput {
        arms: vec![arm],
        data: TrainData::Set { set, batch: BatchConfig::new() },
        test: Some(validation),
        config: &run,
        checkpointing: Some(&checkpointing),
        ranks: &Solo,
        device,
        observer: &mut progress,
    })?;
    let trained = trained.into_iter().next().expect("one arm was trained");
    let checkpoint = ClipCheckpoint { config: config.clone(), model: trained.model.clone() };
    checkpoint.save_open_clip(args.out.join("dense"), Precision::F32)?;
    Ok((trained.model, trained.state))
}

/// Trains some recipes side by side and keeps their outcomes.
fn run(args: &Args, base: &Base, recipes: &[&Recipe], seed: u64) -> Result<(), Box<dyn Error>> {
    let (dense, state) = &base.dense;
    let mut arms = Vec::new();
    let mut gflops = Vec::new();
    for recipe in recipes {
        // The same routers for every recipe of a seed.
        base.device.seed(seed);
        let (model, cost) = match &recipe.sparse {
            None => (dense.clone(), base.config.cost()),
            Some(sparse) => {
                let towers = SparseClipConfig::new().with_vision(Some(sparse.clone())).with_text(Some(sparse.clone()));
                let config = base.config.clone().sparse(towers);
                let options = UpcycleOptions::default().with_strategy(recipe.strategy).with_calibration(calibration(base));
                (config.init(&base.device).upcycle_from_dense(dense, &options)?.model, config.cost())
            }
        };
        let state = match recipe.keeps_moments {
            false => None,
            true => Some(state.upcycle(dense, &model)?),
        };
        gflops.push(cost.gflops());
        arms.push(Arm {
            name: recipe.name.to_string(),
            model,
            optimizer: OptimizerConfig::new(WarmupCosine::new(LEARNING_RATE)).with_weight_decay(WEIGHT_DECAY),
            auxiliary: recipe.auxiliary.clone(),
            state,
            frozen: None,
        });
    }
    let names: Vec<String> = arms.iter().map(|arm| arm.name.clone()).collect();
    let config = TrainConfig::new(args.steps).with_eval_every(args.eval_every).with_seed(seed);
    let folder = args.out.join(format!("run-{}-{seed}", names.join("+")));
    let checkpointing = Checkpointing::new(&folder, 250);
    let mut progress = Progress::new(&names, args.steps)?;
    let trained = train(TrainInput {
        arms,
        data: TrainData::Set { set: &base.set, batch: BatchConfig::new() },
        test: Some(&base.validation),
        config: &config,
        checkpointing: Some(&checkpointing),
        ranks: &Solo,
        device: &base.device,
        observer: &mut progress,
    })?;
    for (index, (arm, gflops)) in trained.iter().zip(gflops).enumerate() {
        let last = &arm.history.last().expect("there is an evaluation at the end").1;
        let recalls = |recall: burn_moe::clip::Recall| [recall.r1, recall.r5, recall.r10];
        let outcome = Outcome {
            t2i: recalls(last.retrieval.text_to_image),
            i2t: recalls(last.retrieval.image_to_text),
            history: arm.history.iter().map(|(step, e)| (*step, e.retrieval.text_to_image.r1)).collect(),
            peak_load: last.layers.iter().map(|layer| layer.stats.peak_load()).fold(0.0, f64::max),
            dropped: arm.dropped,
            early_loss: progress.early_loss(index),
            milliseconds_per_step: 1e3 * arm.time.as_secs_f64() / arm.timed_steps.max(1) as f64,
            gflops,
        };
        write_atomic(outcome_path(&args.out, &arm.name, seed), serde_json::to_string_pretty(&outcome)?.as_bytes())?;
    }
    fs::remove_dir_all(&folder)?;
    Ok(())
}

/// Training pairs for strategies that look at data.
fn calibration(base: &Base) -> Probe {
    let count = base.set.len().min(256);
    let captions: Vec<String> = base
        .set
        .concept_of_image()
        .iter()
        .take(count)
        .map(|&concept| base.set.concepts()[concept].captions[0].text.clone())
        .collect();
    let tokens = ClipTokenizer::new().tokenize(&captions, base.config.text.context_length).tensor(&base.device);
    Probe::ImagesAndTexts { images: base.set.images(0..count, &base.device), tokens }
}

fn outcome_path(out: &Path, name: &str, seed: u64) -> PathBuf {
    out.join(format!("{name}-{seed}.json"))
}

/// Means over the seeds that are finished; differences are to `dense_continued` of the same seeds.
fn print_table(out: &Path, all: &[Recipe]) -> Result<(), Box<dyn Error>> {
    let mut outcomes: BTreeMap<&str, BTreeMap<u64, Outcome>> = BTreeMap::new();
    for recipe in all {
        for entry in fs::read_dir(out)? {
            let path = entry?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let seed = stem.strip_prefix(recipe.name).and_then(|rest| rest.strip_prefix('-')).and_then(|seed| seed.parse().ok());
            if let Some(seed) = seed.filter(|_| path.extension().is_some_and(|e| e == "json")) {
                outcomes.entry(recipe.name).or_default().insert(seed, serde_json::from_str(&fs::read_to_string(&path)?)?);
            }
        }
    }
    let dense = outcomes.get("dense_continued").cloned().unwrap_or_default();
    println!(
        "\n| recipe | seeds | T2I R@1 | R@5 | I2T R@1 | T2I R@1 minus dense continued | steps to its score | busiest expert | dropped | early loss | ms a step | MFLOPs |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for recipe in all {
        let Some(seeds) = outcomes.get(recipe.name) else { continue };
        let mean = |value: &dyn Fn(&Outcome) -> f64| seeds.values().map(value).sum::<f64>() / seeds.len() as f64;
        let pairs: Vec<(&Outcome, &Outcome)> =
            seeds.iter().filter_map(|(seed, outcome)| Some((outcome, dense.get(seed)?))).collect();
        let gain = pairs.iter().map(|(ours, dense)| ours.t2i[0] - dense.t2i[0]).sum::<f64>() / pairs.len().max(1) as f64;
        let reached: Vec<String> = pairs
            .iter()
            .map(|(ours, dense)| {
                let first = ours.history.iter().find(|(step, r1)| *step > 0 && *r1 >= dense.t2i[0]);
                first.map_or("–".to_string(), |(step, _)| step.to_string())
            })
            .collect();
        println!(
            "| {} | {} | {:.2} | {:.2} | {:.2} | {:+.2} | {} | {:.2} | {:.1} % | {} | {:.0} | {:.2} |",
            recipe.name,
            seeds.len(),
            100.0 * mean(&|o| o.t2i[0]),
            100.0 * mean(&|o| o.t2i[1]),
            100.0 * mean(&|o| o.i2t[0]),
            100.0 * gain,
            reached.join(", "),
            mean(&|o| o.peak_load),
            100.0 * mean(&|o| o.dropped),
            early(seeds.values().map(|o| o.early_loss)),
            mean(&|o| o.milliseconds_per_step),
            1e3 * mean(&|o| o.gflops),
        );
    }
    Ok(())
}

/// The mean of what is known.
fn early(losses: impl Iterator<Item = Option<f64>>) -> String {
    let known: Vec<f64> = losses.flatten().collect();
    if known.is_empty() { "–".into() } else { format!("{:.2}", known.iter().sum::<f64>() / known.len() as f64) }
}

struct Progress {
    bar: ProgressBar,
    names: Vec<String>,
    early: Vec<Vec<f64>>,
}

impl Progress {
    fn new(names: &[String], steps: usize) -> Result<Self, Box<dyn Error>> {
        let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {elapsed} of {duration}")?;
        let bar = ProgressBar::new(steps as u64).with_style(style).with_prefix(names.join(", "));
        Ok(Self { bar, names: names.to_vec(), early: vec![Vec::new(); names.len()] })
    }

    fn early_loss(&self, arm: usize) -> Option<f64> {
        let losses = &self.early[arm];
        (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64)
    }
}

impl Observer for Progress {
    fn on_step(&mut self, arm: usize, step: usize, losses: &StepReport) {
        self.bar.set_position(step as u64);
        if step <= EARLY {
            self.early[arm].push(losses.contrastive);
        }
    }

    fn on_evaluation(&mut self, arm: usize, step: usize, evaluation: &Evaluation) {
        let recall = evaluation.retrieval.text_to_image;
        let line = format!(
            "step {step:>5}, {:<20}: text to image R@1 {:5.2} %, R@5 {:5.2} %",
            self.names[arm],
            100.0 * recall.r1,
            100.0 * recall.r5
        );
        // A bar that is not on a terminal prints nothing by itself.
        if self.bar.is_hidden() { println!("{line}") } else { self.bar.println(line) }
    }
}
