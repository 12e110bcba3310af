//! Any dense CLIP checkpoint in, a sparse one and a report out.
//!
//! ```sh
//! cargo run --release --example upcycle_checkpoint -- --dense path/to/clip-vit-base-patch16 --out out/sparse-b16
//! ```
//!
//! `--dense` is a folder of Hugging Face's `CLIPModel` (`config.json` with one or several files of weights), of open_clip
//! (`open_clip_config.json`), or of one tower alone. With copied experts the sparse model equals the dense one until it is trained; the report
//! says how far it is from it, on random images and texts. It prints what it took, with the largest memory of the process where the system
//! tells (Linux).
//!
//! With several `--dense`, checkpoints of one architecture, the feed-forward networks of each become experts, and the report says how far the
//! sparse model is from each.

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode, time::Instant};

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_moe::{
    BalancingOptions, BalancingRule, Capacity, FillOrder, GateNormalization, RouterOptions, RouterScore, TokenChoiceConfig,
    UpcycleFromDense, UpcycleOptions,
    clip::{
        SparseClipConfig, TextConfig, TextTower, VisionConfig,
        checkpoint::{ClipCheckpoint, LoadOptions, TextCheckpoint, Towers, VisionCheckpoint, towers_in},
        preprocess::{ImagePreprocessor, Orientation},
        tokenizer::ClipTokenizer,
    },
    transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
    upcycle::{
        Probe, Rest, RouterStart, UpcycleError, UpcycleFromMany, UpcycleManyOptions, UpcycleReport, UpcycleStrategy, Upcycled,
    },
};
use clap::{Parser, ValueEnum};
use support::{ListArgs, Stored, device_by_name, refuse_checkpoint, report_skipped, write_atomic};

#[derive(Parser)]
#[command(
    about = "Upcycles a dense CLIP checkpoint",
    after_help = "Example: upcycle_checkpoint --dense clip-vit-base-patch16 --experts 16 --strategy drop --out out/sparse-b16"
)]
struct Args {
    /// Folder of the dense checkpoint; given several times, the networks of all become the experts
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-emoji"))]
    dense: Vec<PathBuf>,
    /// Folder of the sparse one
    #[arg(long, default_value = "out/upcycled")]
    out: PathBuf,
    /// Write over a checkpoint that is in --out
    #[arg(long)]
    overwrite: bool,
    /// Side of the images in pixels, if it should be another than the checkpoint's: its position embeddings are then interpolated
    #[arg(long)]
    image_size: Option<usize>,
    /// Leave the text tower dense
    #[arg(long)]
    dense_text: bool,
    /// Leave the vision tower dense
    #[arg(long)]
    dense_vision: bool,
    #[command(flatten)]
    layer: LayerArgs,
    #[command(flatten)]
    making: StrategyArgs,
    #[command(flatten)]
    several: SeveralArgs,
    /// How numbers are stored
    #[arg(long, value_enum, default_value = "f32")]
    precision: Stored,
    /// Decides the routers, and what is random in the experts
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
}

/// The sparse layers.
#[derive(clap::Args)]
struct LayerArgs {
    /// Experts of each sparse block
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Experts that each token passes
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Every N-th block becomes sparse
    #[arg(long, default_value_t = 2)]
    every: usize,
    /// These blocks become sparse, counted from 0, such as 1,3,5
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["every", "last"])]
    blocks: Vec<usize>,
    /// The last N blocks become sparse
    #[arg(long, conflicts_with = "every")]
    last: Option<usize>,
    /// Slots per expert in training, over an even share of all choices: 1 holds a perfectly even load; 0 for no limit, so that nothing is dropped
    #[arg(long, default_value_t = 1.0)]
    capacity: f64,
    /// Which choices get a slot first where there are too few
    #[arg(long, value_enum, default_value = "choice-major")]
    fill_order: Fill,
    /// What gates are divided by: the sum over all choices, or over those that got a slot; by default nothing for one choice and all for more
    #[arg(long, value_enum)]
    gates: Option<Gates>,
    /// How the router's logits become scores
    #[arg(long, value_enum, default_value = "softmax")]
    score: Score,
    /// Balance the load by a bias, which moves by this much in each training step
    #[arg(long)]
    balancing_rate: Option<f64>,
    /// What the bias of an expert moves by: the sign of what its load lacks to the mean, or that over the loads' standard deviation
    #[arg(long, value_enum, default_value = "sign", requires = "balancing_rate")]
    balancing_rule: Rule,
    /// Momentum of the direction in which the bias moves: so much of the mean direction so far stays at each step
    #[arg(long, default_value_t = 0.0, requires = "balancing_rate")]
    balancing_momentum: f64,
    /// The largest size of a bias; no limit unless given
    #[arg(long, requires = "balancing_rate")]
    balancing_cap: Option<f64>,
    /// Training steps in which --balancing-rate is reached
    #[arg(long, default_value_t = 0, requires = "balancing_rate")]
    balancing_warmup: usize,
    /// Normalise the router's logits of each token to this standard deviation before the softmax
    #[arg(long)]
    logit_normalization: Option<f64>,
}

/// How experts are made from the dense network.
#[derive(clap::Args)]
struct StrategyArgs {
    /// How experts are made
    #[arg(long, value_enum, default_value = "copy")]
    strategy: Strategy,
    /// Of copy-with-noise: standard deviation of the noise, over that of the weight [default: 0.01]
    #[arg(long)]
    noise: Option<f64>,
    /// Of drop: share of the hidden units that start anew [default: 0.5]
    #[arg(long)]
    drop_ratio: Option<f64>,
    /// Of granular: parts of the hidden units; --experts and --top-k count the parts [default: 2]
    #[arg(long)]
    shards: Option<usize>,
    /// Of cluster-aware: share of the squared singular values that is kept [default: 0.9]
    #[arg(long)]
    energy: Option<f64>,
    /// Of cluster-aware: a list of images and captions, of which the first --calibration are read; of --router centroids: one for each --dense
    #[arg(long)]
    list: Vec<PathBuf>,
    #[command(flatten)]
    columns: ListArgs,
    /// How many images of a list are read
    #[arg(long, default_value_t = 64)]
    calibration: usize,
}

/// What is not an expert, where several dense checkpoints are given.
#[derive(clap::Args)]
struct SeveralArgs {
    /// Of several --dense: where all but the experts comes from
    #[arg(long, value_enum, default_value = "first")]
    rest: RestOf,
    /// Of several --dense: routers are random, or know the images and captions of each model, one --list for each
    #[arg(long, value_enum, default_value = "random")]
    router: RouterOf,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum RestOf {
    First,
    Average,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum RouterOf {
    Random,
    Centroids,
}

#[derive(Clone, Copy, ValueEnum)]
enum Fill {
    ChoiceMajor,
    TokenMajor,
    BatchPriority,
}

#[derive(Clone, Copy, ValueEnum)]
enum Gates {
    None,
    BeforeDrop,
    AfterDrop,
}

#[derive(Clone, Copy, ValueEnum)]
enum Score {
    Softmax,
    Sigmoid,
}

#[derive(Clone, Copy, ValueEnum)]
enum Rule {
    Sign,
    ZScore,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Strategy {
    Copy,
    CopyWithNoise,
    Drop,
    Granular,
    ClusterAware,
}

impl LayerArgs {
    /// The sparse blocks of a tower whose dense networks have a hidden width of `d_ff`.
    fn config(&self, making: &StrategyArgs, d_ff: usize) -> SparseEncoderConfig {
        let mut tokens = TokenChoiceConfig::of_top_k(self.top_k)
            .with_training_capacity(if self.capacity == 0.0 { Capacity::Dropless } else { Capacity::OfBalancedLoad(self.capacity) })
            .with_fill_order(match self.fill_order {
                Fill::ChoiceMajor => FillOrder::ChoiceMajor,
                Fill::TokenMajor => FillOrder::TokenMajor,
                Fill::BatchPriority => FillOrder::BatchPriority,
            });
        if let Some(gates) = self.gates {
            tokens = tokens.with_gate_normalization(match gates {
                Gates::None => GateNormalization::None,
                Gates::BeforeDrop => GateNormalization::BeforeDrop,
                Gates::AfterDrop => GateNormalization::AfterDrop,
            });
        }
        let score = match self.score {
            Score::Softmax => RouterScore::Softmax,
            Score::Sigmoid => RouterScore::Sigmoid,
        };
        let rule = match self.balancing_rule {
            Rule::Sign => BalancingRule::Sign,
            Rule::ZScore => BalancingRule::ZScore,
        };
        let balancing = self.balancing_rate.map(|rate| {
            let options = BalancingOptions::new(rate).with_rule(rule).with_momentum(self.balancing_momentum);
            options.with_cap(self.balancing_cap).with_warmup_steps(self.balancing_warmup)
        });
        let router =
            RouterOptions::new().with_score(score).with_balancing(balancing).with_logit_normalization(self.logit_normalization);
        let blocks = match self.last {
            _ if !self.blocks.is_empty() => BlockSelection::List(self.blocks.clone()),
            Some(last) => BlockSelection::Last(last),
            None => BlockSelection::EveryNth(self.every),
        };
        let parts = making.strategy == Strategy::Granular;
        SparseEncoderConfig::new()
            .with_blocks(blocks)
            .with_num_experts(self.experts)
            .with_d_ff(parts.then(|| d_ff / making.shards().max(1)))
            .with_layer(RoutedLayerConfig::new().with_router(router).with_assignment(tokens.into()).into())
    }
}

impl StrategyArgs {
    fn shards(&self) -> usize {
        self.shards.unwrap_or(2)
    }

    /// Refuses settings of another strategy than the one that is asked for.
    fn check(&self) -> Result<(), String> {
        let settings = [
            ("--noise", self.noise.is_some(), Strategy::CopyWithNoise, "copy-with-noise"),
            ("--drop-ratio", self.drop_ratio.is_some(), Strategy::Drop, "drop"),
            ("--shards", self.shards.is_some(), Strategy::Granular, "granular"),
            ("--energy", self.energy.is_some(), Strategy::ClusterAware, "cluster-aware"),
        ];
        match settings.into_iter().find(|(_, is_named, strategy, _)| *is_named && self.strategy != *strategy) {
            Some((setting, _, _, strategy)) => Err(format!("{setting} is for --strategy {strategy}, and another one is asked for")),
            None => Ok(()),
        }
    }

    fn strategy(&self) -> UpcycleStrategy {
        match self.strategy {
            Strategy::Copy => UpcycleStrategy::Copy,
            Strategy::CopyWithNoise => UpcycleStrategy::CopyWithNoise { relative_std: self.noise.unwrap_or(0.01) },
            Strategy::Drop => UpcycleStrategy::Drop { ratio: self.drop_ratio.unwrap_or(0.5) },
            Strategy::Granular => UpcycleStrategy::Granular { shards: self.shards() },
            Strategy::ClusterAware => UpcycleStrategy::ClusterAware { energy: self.energy.unwrap_or(0.9) },
        }
    }

    /// The images and the captions of each list: of `vision` or `text`, those that are there.
    fn calibrations(
        &self,
        vision: Option<&VisionConfig>,
        text: Option<&TextTower>,
        device: &Device,
    ) -> Result<Vec<Probe>, Box<dyn Error>> {
        self.list.iter().map(|list| self.calibration(list, vision, text, device)).collect()
    }

    fn calibration(
        &self,
        list: &PathBuf,
        vision: Option<&VisionConfig>,
        text: Option<&TextTower>,
        device: &Device,
    ) -> Result<Probe, Box<dyn Error>> {
        let (list, folder) = self.columns.read(list)?;
        let images = match vision {
            None => None,
            Some(vision) => {
                let paths: Vec<PathBuf> = list.images.iter().take(self.calibration).map(|image| folder.join(image)).collect();
                let preprocessor = ImagePreprocessor::for_model(vision).with_orientation(Orientation::Exif);
                let (images, skipped): (Vec<_>, Vec<_>) = preprocessor.open_all(&paths).into_iter().partition(Result::is_ok);
                let images: Vec<_> = images.into_iter().flatten().collect();
                report_skipped(&skipped.into_iter().filter_map(Result::err).collect::<Vec<_>>(), images.len(), false)?;
                Some(preprocessor.tensor(&images, device))
            }
        };
        let tokens = match text {
            None => None,
            Some(tower) => {
                let tokenizer = ClipTokenizer::for_model(tower)?;
                let [context_length, _] = tower.position_embedding.dims();
                let captions: Vec<&String> = list.captions.iter().take(self.calibration).map(|(caption, _)| caption).collect();
                Some(tokenizer.tokenize(&captions, context_length).tensor(device))
            }
        };
        Ok(match (images, tokens) {
            (Some(images), Some(tokens)) => Probe::ImagesAndTexts { images, tokens },
            (Some(images), None) => Probe::Images(images),
            (None, tokens) => Probe::Texts(tokens.expect("a checkpoint has a tower")),
        })
    }
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    device.seed(args.seed);
    let mut clock = Clock::start();
    let first = args.dense[0].display();
    let towers = towers_in(&args.dense[0])?;
    for dense in &args.dense[1..] {
        if towers_in(dense)? != towers {
            return Err(format!("{first} and {} do not hold the same towers", dense.display()).into());
        }
    }
    if towers != Towers::Both && (args.dense_text || args.dense_vision) {
        return Err(format!("{first} holds one tower: --dense-text and --dense-vision are for two").into());
    }
    if towers == Towers::Text && args.image_size.is_some() {
        return Err(format!("{first} holds a text tower: --image-size is for images").into());
    }
    args.check_lists()?;
    args.making.check()?;
    refuse_checkpoint(&args.out, args.overwrite)?;
    let report = match towers {
        Towers::Both => clip(&args, &device, &mut clock)?,
        Towers::Vision => vision(&args, &device, &mut clock)?,
        Towers::Text => text(&args, &device, &mut clock)?,
    };
    println!("{report}");
    write_atomic(args.out.join("report.json"), serde_json::to_string_pretty(&report)?.as_bytes())?;
    if let Some(peak) = peak_memory() {
        println!("largest memory of this process: {peak} MB");
    }
    println!("checkpoint and report.json are in {}", args.out.display());
    Ok(())
}

fn clip(args: &Args, device: &Device, clock: &mut Clock) -> Result<UpcycleReport, Box<dyn Error>> {
    let load = |folder: &PathBuf| ClipCheckpoint::load_with(folder, &LoadOptions::new().with_image_size(args.image_size), device);
    let checkpoints = args.dense.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let dense = &checkpoints[0];
    clock.lap("load");
    let tower = |d_ff: usize, stays_dense: bool| (!stays_dense).then(|| args.layer.config(&args.making, d_ff));
    let towers = SparseClipConfig::new()
        .with_vision(tower(dense.config.vision.encoder.d_ff, args.dense_vision))
        .with_text(tower(dense.config.text.encoder.d_ff, args.dense_text));
    let config = dense.config.clone().sparse(towers);
    config.validate()?;
    let probe = Probe::ImagesAndTexts { images: images(&config.vision, device), tokens: texts(&config.text, device) };
    let calibrations = args.making.calibrations(Some(&config.vision), Some(&dense.model.text), device)?;
    let models: Vec<_> = checkpoints.iter().map(|checkpoint| &checkpoint.model).collect();
    let upcycled = args.upcycle(config.init(device), &models, probe, calibrations)?;
    clock.lap("upcycle and compare");
    drop(checkpoints);
    ClipCheckpoint { config, model: upcycled.model }.save_sparse(&args.out, args.precision.into())?;
    clock.lap("save");
    let back = ClipCheckpoint::load(&args.out, device)?;
    clock.lap("load the sparse one");
    burn_moe::finite::check_finite("the embedding", &back.model.encode_image(images(&back.config.vision, device)).embedding)?;
    clock.lap("embed four images");
    println!("weights: {} MB sparse", back.config.memory(1).weights / 1_000_000);
    Ok(upcycled.report)
}

fn vision(args: &Args, device: &Device, clock: &mut Clock) -> Result<UpcycleReport, Box<dyn Error>> {
    let load = |folder: &PathBuf| VisionCheckpoint::load(folder, args.image_size, device);
    let checkpoints = args.dense.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let dense = &checkpoints[0];
    clock.lap("load");
    let mut config = dense.config.clone();
    config.encoder.sparse = Some(args.layer.config(&args.making, config.encoder.d_ff));
    config.validate()?;
    let calibrations = args.making.calibrations(Some(&config), None, device)?;
    let models: Vec<_> = checkpoints.iter().map(|checkpoint| &checkpoint.model).collect();
    let sparse = config.init(dense.embed_dim, device);
    let upcycled = args.upcycle(sparse, &models, Probe::Images(images(&config, device)), calibrations)?;
    clock.lap("upcycle and compare");
    VisionCheckpoint { config, embed_dim: dense.embed_dim, model: upcycled.model }.save_sparse(&args.out, args.precision.into())?;
    clock.lap("save");
    VisionCheckpoint::load(&args.out, None, device)?;
    clock.lap("load the sparse one");
    Ok(upcycled.report)
}

fn text(args: &Args, device: &Device, clock: &mut Clock) -> Result<UpcycleReport, Box<dyn Error>> {
    let load = |folder: &PathBuf| TextCheckpoint::load(folder, device);
    let checkpoints = args.dense.iter().map(load).collect::<Result<Vec<_>, _>>()?;
    let dense = &checkpoints[0];
    clock.lap("load");
    let mut config = dense.config.clone();
    config.encoder.sparse = Some(args.layer.config(&args.making, config.encoder.d_ff));
    config.validate()?;
    let calibrations = args.making.calibrations(None, Some(&dense.model), device)?;
    let models: Vec<_> = checkpoints.iter().map(|checkpoint| &checkpoint.model).collect();
    let sparse = config.init(dense.embed_dim, device);
    let upcycled = args.upcycle(sparse, &models, Probe::Texts(texts(&config, device)), calibrations)?;
    clock.lap("upcycle and compare");
    TextCheckpoint { config, embed_dim: dense.embed_dim, model: upcycled.model }.save_sparse(&args.out, args.precision.into())?;
    clock.lap("save");
    TextCheckpoint::load(&args.out, device)?;
    clock.lap("load the sparse one");
    Ok(upcycled.report)
}

impl Args {
    /// Refuses options that nothing would read.
    fn check_lists(&self) -> Result<(), String> {
        let (making, several, models) = (&self.making, &self.several, self.dense.len());
        if models == 1 && (several.rest != RestOf::First || several.router != RouterOf::Random) {
            return Err("--rest and --router are for several --dense".into());
        }
        if models > 1 && making.strategy != Strategy::Copy {
            return Err("with several --dense, experts are copies: leave --strategy out".into());
        }
        let reads = if models == 1 { making.strategy == Strategy::ClusterAware } else { several.router == RouterOf::Centroids };
        if (!making.list.is_empty() || making.columns.images.is_some()) && !reads {
            return Err(
                "--list and --images are for --strategy cluster-aware and --router centroids, which alone read images and \
                        captions"
                    .into(),
            );
        }
        let lists = making.list.len();
        if (reads && models > 1 && lists != models) || (models == 1 && lists > 1) {
            return Err(format!("there are {lists} --list and {models} --dense: name a list for each"));
        }
        Ok(())
    }

    /// From one dense model or from several, compared on `probe`; calibrations are there if something reads them.
    fn upcycle<M: UpcycleFromDense<M> + UpcycleFromMany<M>>(
        &self,
        sparse: M,
        dense: &[&M],
        probe: Probe,
        mut calibrations: Vec<Probe>,
    ) -> Result<Upcycled<M>, UpcycleError> {
        if let [dense] = dense {
            let options = UpcycleOptions::default().with_strategy(self.making.strategy()).with_probe(probe);
            return sparse.upcycle_from_dense(dense, &UpcycleOptions { calibration: calibrations.pop(), ..options });
        }
        if calibrations.is_empty() {
            calibrations = vec![probe; dense.len()];
        }
        let options = UpcycleManyOptions::default()
            .with_rest(match self.several.rest {
                RestOf::First => Rest::First,
                RestOf::Average => Rest::Average,
            })
            .with_router(match self.several.router {
                RouterOf::Random => RouterStart::Kept,
                RouterOf::Centroids => RouterStart::Centroids,
            })
            .with_probes(calibrations);
        sparse.upcycle_from_many(dense, &options)
    }
}

/// Samples that both models are compared on.
const PROBES: usize = 4;

/// Random images.
fn images(vision: &VisionConfig, device: &Device) -> Tensor<4> {
    let side = vision.image_size;
    Tensor::random([PROBES, vision.channels, side, side], Distribution::Normal(0.0, 1.0), device)
}

/// Random texts of several lengths.
fn texts(text: &TextConfig, device: &Device) -> Tensor<2, Int> {
    let (context, vocabulary) = (text.context_length, text.vocab_size as i32);
    let mut tokens = vec![0; PROBES * context];
    for (text, tokens) in tokens.chunks_exact_mut(context).enumerate() {
        let end = (2 + text * context / 5).min(context - 1);
        for (i, token) in tokens.iter_mut().take(end).enumerate() {
            *token = (1 + (text * 977 + i * 131) as i32) % (vocabulary - 1).max(1);
        }
        tokens[end] = vocabulary - 1;
    }
    Tensor::from_data(TensorData::new(tokens, [PROBES, context]), device)
}

struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, what: &str) {
        println!("{what}: {:.2} s", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

/// In MB, where Linux tells.
fn peak_memory() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1024 / 1_000_000)
}
