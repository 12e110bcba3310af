//! Trains a dense CLIP from scratch on the emoji pack: this is how the checkpoint in `data/clip-emoji` was made.
//!
//! ```sh
//! cargo run --release --example pretrain -- --out out/clip-emoji
//! ```
//!
//! A run that was stopped goes on from its last checkpoint when it is started again. `--hold-out noto-v1` keeps one vendor out of
//! training and validates on it; without it the run trains on all five training vendors and shows recall on the first of them,
//! which says how far training is and nothing about how well the model generalises. Twemoji is never read.

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

use burn_moe::{
    Capacity, TokenChoiceConfig,
    clip::{
        ClipConfig, TextConfig, VisionConfig,
        checkpoint::{ClipCheckpoint, Precision},
    },
    train::{
        Arm, Checkpointing, Evaluation, Observer, OptimizerConfig, StepReport, TrainConfig, TrainData, TrainInput, WarmupCosine,
        data::{AugmentConfig, BatchConfig, EmojiPack, EmojiVendor},
        ranks::Solo,
        train,
    },
    transformer::{BlockSelection, EncoderConfig, RoutedLayerConfig, SparseEncoderConfig},
};
use clap::{ArgAction, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use support::{device_by_name, languages_by_code, refuse_checkpoint, remove_layouts_before, vendor_by_name, write_atomic};

#[derive(Parser)]
#[command(
    about = "Trains a CLIP from scratch on the emoji pack",
    after_help = "Example: pretrain --hold-out noto-v1 --text-width 96 --vision-width 128 --steps 10000 --out out/mine"
)]
struct Args {
    /// Where the checkpoint goes
    #[arg(long, default_value = "out/clip-emoji")]
    out: PathBuf,
    /// Where the run is kept, so that it goes on where it was stopped, or for more steps; each run needs a folder of its own
    #[arg(long, default_value = "out/pretrain")]
    run: PathBuf,
    /// Begin anew where there is a run already, and write over the checkpoint in --out; leave it out to resume the new one
    #[arg(long)]
    overwrite: bool,
    /// A checkpoint to start from, for another round of warm-up and cosine; it decides all sizes
    #[arg(long)]
    init: Option<PathBuf>,
    /// A training vendor to validate on instead of training on it
    #[arg(long)]
    hold_out: Option<String>,
    /// Optimiser steps, in all
    #[arg(long, default_value_t = 20_000)]
    steps: usize,
    /// The highest learning rate
    #[arg(long, visible_alias = "lr", default_value_t = 1e-3)]
    learning_rate: f64,
    /// Weight decay, times the learning rate at each step
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// Decides the start, the order of the data and image changes
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Languages of the captions, such as en,de
    #[arg(long, value_delimiter = ',', default_value = "all")]
    languages: Vec<String>,
    /// Whether emojibase's tags are added to half of the captions
    #[arg(long, default_value_t = false, action = ArgAction::Set)]
    tags: bool,
    /// Ids of CLIP's tokenizer, which is cut to its first merges; 49408 is the whole one
    #[arg(long, default_value_t = 1024)]
    vocab_size: usize,
    /// Most tokens of a caption
    #[arg(long, default_value_t = 32)]
    context_length: usize,
    /// Pairs in a batch
    #[arg(long, default_value_t = 256)]
    batch_size: usize,
    /// Pairs that are computed at a time, for batches that do not fit in memory; the whole batch unless given
    #[arg(long)]
    micro_batch: Option<usize>,
    /// Width of the vision tower
    #[arg(long, default_value_t = 112)]
    vision_width: usize,
    /// Width of the text tower
    #[arg(long, default_value_t = 48)]
    text_width: usize,
    /// Width of an attention head of both towers
    #[arg(long, default_value_t = 16)]
    head_width: usize,
    /// Hidden width of the feed-forward networks, over the width of their tower
    #[arg(long, default_value_t = 4)]
    mlp_ratio: usize,
    /// Experts of each sparse block, for a sparse model from scratch; without it the model is dense
    #[arg(long, conflicts_with = "init")]
    experts: Option<usize>,
    /// Which blocks of a sparse model are sparse: every N-th
    #[arg(long, default_value_t = 1, requires = "experts")]
    every: usize,
    /// Side of a patch in pixels
    #[arg(long, default_value_t = 16)]
    patch_size: usize,
    /// Blocks of the vision tower
    #[arg(long, default_value_t = 2)]
    vision_layers: usize,
    /// Blocks of the text tower
    #[arg(long, default_value_t = 2)]
    text_layers: usize,
    /// Width of the shared embedding space
    #[arg(long, default_value_t = 64)]
    embed_dim: usize,
    /// How strongly images are changed in training, over the default strength
    #[arg(long, default_value_t = 1.0)]
    augment: f32,
    /// Steps between evaluations
    #[arg(long, default_value_t = 1250)]
    eval_every: usize,
    /// Only cpu has been tried
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    device.seed(args.seed);
    let pack = EmojiPack::open(concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji"))?;
    let held_out = args.hold_out.as_ref().map(|name| vendor_by_name(name, &EmojiVendor::TRAINING)).transpose()?;
    let vendors: Vec<_> = EmojiVendor::TRAINING.into_iter().filter(|v| Some(*v) != held_out).collect();
    let languages = languages_by_code(&args.languages)?;
    let load = |vendors: &[EmojiVendor], tags| pack.load(vendors, &languages, tags);
    let (mut set, mut validation) = (load(&vendors, args.tags)?, load(&[held_out.unwrap_or(vendors[0])], false)?);
    println!("{} training images, {} to validate on", set.len(), validation.len());

    let start = match &args.init {
        Some(folder) => ClipCheckpoint::load(folder, &device)?,
        None => {
            for (name, width) in [("--vision-width", args.vision_width), ("--text-width", args.text_width)] {
                if args.head_width == 0 || !width.is_multiple_of(args.head_width) {
                    return Err(format!("{name} {width} is no multiple of --head-width {}", args.head_width).into());
                }
            }
            let config = config(&args, set.image_size());
            config.validate()?;
            ClipCheckpoint { model: config.init(&device), config }
        }
    };
    let preprocessing = start.config.vision.preprocessing;
    (set, validation) = (set.with_preprocessing(preprocessing), validation.with_preprocessing(preprocessing));
    describe(&start.config);

    let optimizer = OptimizerConfig::new(WarmupCosine::new(args.learning_rate)).with_weight_decay(args.weight_decay);
    let arm = Arm::new("model", start.model, optimizer);
    let run = TrainConfig::new(args.steps).with_eval_every(args.eval_every).with_seed(args.seed).with_micro_batch(args.micro_batch);
    let text = &start.config.text;
    let AugmentConfig { shift, scale, rotation, colour } = AugmentConfig::new();
    let [shift, scale, rotation, colour] = [shift, scale, rotation, colour].map(|strength| strength * args.augment);
    let batch = BatchConfig::new()
        .with_augment(AugmentConfig { shift, scale, rotation, colour })
        .with_batch_size(args.batch_size)
        .with_context_length(text.context_length)
        .with_vocab_size(text.vocab_size);
    let checkpointing = Checkpointing { overwrite: args.overwrite, ..Checkpointing::new(args.run, args.eval_every) };
    // Where this run's checkpoint goes, which it may write again.
    let (place, out) = (checkpointing.folder.join("out.txt"), std::path::absolute(&args.out)?.display().to_string());
    let is_its_own =
        checkpointing.kept_run().is_ok_and(|kept| kept.is_some()) && fs::read_to_string(&place).is_ok_and(|own| own == out);
    if !is_its_own {
        refuse_checkpoint(&args.out, args.overwrite)?;
    }
    fs::create_dir_all(&checkpointing.folder).map_err(|error| format!("{}: {error}", checkpointing.folder.display()))?;
    write_atomic(&place, out.as_bytes())?;
    let bar = ProgressBar::new(args.steps as u64)
        .with_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} of {duration} {msg}")?);
    let mut progress = Progress { bar };
    let trained = train(TrainInput {
        arms: vec![arm],
        data: TrainData::Set { set: &set, batch },
        test: Some(&validation),
        config: &run,
        checkpointing: Some(&checkpointing),
        ranks: &Solo,
        device: &device,
        observer: &mut progress,
    })?;
    let trained = trained.into_iter().next().expect("one arm was trained");
    println!("{:.1} ms a step", 1e3 * trained.time.as_secs_f64() / trained.timed_steps.max(1) as f64);
    let checkpoint = ClipCheckpoint { config: start.config, model: trained.model };
    let written = match checkpoint.config.is_sparse() {
        true => checkpoint.save_sparse(&args.out, Precision::F16).map(|()| "burn_moe_config.json")?,
        false => checkpoint.save_open_clip(&args.out, Precision::F16).map(|()| "open_clip_config.json")?,
    };
    remove_layouts_before(&args.out, written)?;
    println!("written to {}", args.out.display());
    Ok(())
}

fn config(args: &Args, image_size: usize) -> ClipConfig {
    let tokens = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let sparse = args.experts.map(|experts| {
        let layer = RoutedLayerConfig::new().with_assignment(tokens.into());
        let blocks = BlockSelection::EveryNth(args.every);
        SparseEncoderConfig::new().with_blocks(blocks).with_num_experts(experts).with_layer(layer.into())
    });
    let encoder = |width, layers| {
        EncoderConfig::new(width, width / args.head_width, layers, args.mlp_ratio * width).with_sparse(sparse.clone())
    };
    let vision = VisionConfig::new(encoder(args.vision_width, args.vision_layers), image_size, args.patch_size);
    let text = TextConfig::new(encoder(args.text_width, args.text_layers))
        .with_vocab_size(args.vocab_size)
        .with_context_length(args.context_length);
    ClipConfig::new(vision, text, args.embed_dim)
}

/// Says how the parameters are divided; of experts, all count.
fn describe(config: &ClipConfig) {
    let blocks = |encoder: &EncoderConfig, tokens| encoder.cost(tokens).params_total;
    let transformers = blocks(&config.vision.encoder, 1) + blocks(&config.text.encoder, 1);
    let table = (config.text.vocab_size * config.text.encoder.d_model) as u64;
    let cost = config.cost();
    println!(
        "{:.5} GFLOPs per pair; {} parameters: {transformers} in the transformers, {table} in the token table ({:.0} %)",
        cost.gflops(),
        cost.params_total,
        100.0 * table as f64 / cost.params_total as f64
    );
}

struct Progress {
    bar: ProgressBar,
}

impl Observer for Progress {
    fn on_step(&mut self, _: usize, step: usize, losses: &StepReport) {
        self.bar.set_position(step as u64);
        self.bar.set_message(format!("loss {:.3}", losses.contrastive));
    }

    fn on_evaluation(&mut self, _: usize, step: usize, evaluation: &Evaluation) {
        let (text, image) = (evaluation.retrieval.text_to_image, evaluation.retrieval.image_to_text);
        let percent = |x: f64| 100.0 * x;
        let line = format!(
            "step {step:>6}: text to image R@1 {:5.2} % R@5 {:5.2} %, image to text R@1 {:5.2} % R@5 {:5.2} %",
            percent(text.r1),
            percent(text.r5),
            percent(image.r1),
            percent(image.r5)
        );
        // A bar that is not on a terminal prints nothing by itself.
        if self.bar.is_hidden() { println!("{line}") } else { self.bar.println(line) }
    }
}
