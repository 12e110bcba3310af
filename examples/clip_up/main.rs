//! The main job: upcycles a real dense CLIP, trains it and the dense one on side by side, and compares what they retrieve.
//!
//! ```sh
//! cargo run --release --example clip_up
//! ```
//!
//! It takes the small CLIP of this repository (`data/clip-tiny`) and the emoji pack (`data/emoji`): five vendors' drawings to
//! train on, Twemoji's to test on. Everything is written into `--out`: the sparse checkpoint, `report.json` and `clip_up.png`.
//! With `--list pairs.csv` it takes your own images: a list of any kind that `CaptionedImages::read` knows. `--test` names another list to test
//! on; without it every tenth image is held out. Images are prepared as the dense checkpoint says.

mod support;

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use burn_moe::{
    Capacity, Cost, TokenChoiceConfig, UpcycleFromDense, UpcycleOptions,
    clip::{
        ClipAuxiliaryLossConfig, SparseClipConfig, VisionConfig,
        checkpoint::{ClipCheckpoint, Precision},
        preprocess::{ImagePreprocessor, Orientation},
        tokenizer::ClipTokenizer,
    },
    train::{
        Arm, Checkpointing, Evaluation, KeptRun, Observer, OptimizerConfig, PairedBootstrap, StepLosses, TrainConfig, TrainInput,
        TrainedArm, WarmupCosine,
        data::{DataError, EmojiPack, EmojiVendor, ImageTextSet, LoadedImages, load_images},
        paired_bootstrap, train,
    },
    transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
    upcycle::Probe,
};
use clap::Parser;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use plotters::prelude::*;
use serde_json::{Value, json};
use support::{ListArgs, device_by_name, progress, report_skipped, write_atomic};

/// Parameters of models that take the learning rate of this repository's.
const SMALL: u64 = 5_000_000;

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
    #[arg(long, default_value = "out/clip_up")]
    out: PathBuf,
    /// With --list: stop with an error when an image cannot be read, instead of skipping it
    #[arg(long, requires = "list")]
    strict: bool,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Go on with the run in --out, from its last evaluation; all other options as before, but for --steps: with more of them, a run that has ended
    /// goes on, and the learning rate follows the schedule of all steps from there on
    #[arg(long)]
    resume: bool,
    /// Compute activations again in the backward pass where that is cheap, instead of keeping them: less memory, longer steps
    #[arg(long)]
    gradient_checkpointing: bool,
    /// A few steps only (at most 20), to see that everything works
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
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-tiny"))]
    dense: PathBuf,
    /// A training vendor to test on instead of Twemoji; for tuning, with a `--dense` that has not seen it either
    #[arg(long)]
    hold_out: Option<String>,
    /// Which blocks become sparse: every N-th. CLIP-UP has 2; a model as small as this one gains more with 1 (docs/experiments.md)
    #[arg(long, default_value_t = 1)]
    every: usize,
    /// Slots per expert in training, in parts of the tokens (2 is the even share of two choices); without it, every choice has one
    #[arg(long)]
    capacity: Option<f64>,
    /// Experts of each sparse block
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Highest learning rate of the dense model; without it 8e-3 for a model as small as this repository's, and 1e-5 for others
    #[arg(long)]
    dense_lr: Option<f64>,
    /// Highest learning rate of the sparse model; without it as for the dense one
    #[arg(long)]
    sparse_lr: Option<f64>,
    /// Weight decay, times the learning rate at each step
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// Pairs in a batch, no caption twice; without it 256, or as many as half of the images or the different captions allow
    #[arg(long)]
    batch_size: Option<usize>,
    /// Steps between evaluations
    #[arg(long, default_value_t = 500)]
    eval_every: usize,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut args = Args::parse();
    if args.quick {
        args.steps = args.steps.min(20);
        args.eval_every = args.eval_every.min(10);
    }
    let device = device_by_name(&args.device)?;
    device.seed(args.seed);
    let training = device.clone().autodiff();
    let training = if args.gradient_checkpointing { training.gradient_checkpointing() } else { training };

    fs::create_dir_all(&args.out)?;

    let dense = ClipCheckpoint::load_with_image_size(&args.dense, args.image_size, &device).map_err(|error| {
        format!("{error}\n(the published package holds no data: `data/clip-tiny` is in the repository, and `--example pretrain` makes one)")
    })?;
    ClipTokenizer::check(&dense.model.text)?;
    let Data { set, test, skipped } = data(&args, &dense.config.vision)?;
    println!("{} images to train on, {} to test on", set.len(), test.len());

    let capacity = args.capacity.map_or(Capacity::Dropless, Capacity::OfTokens);
    let tokens = TokenChoiceConfig::new().with_training_capacity(capacity);
    let experts = SparseEncoderConfig::new()
        .with_blocks(BlockSelection::EveryNth(args.every))
        .with_num_experts(args.experts)
        .with_layer(RoutedLayerConfig::new().with_assignment(tokens.into()).into());
    let towers = SparseClipConfig::new().with_vision(Some(experts.clone())).with_text(Some(experts));
    let sparse_config = dense.config.clone().sparse(towers);
    sparse_config.validate()?;
    let context_length = dense.config.text.context_length;
    let probe = Probe::ImagesAndTexts {
        images: test.images(0..test.len().min(32), &device),
        tokens: ClipTokenizer::new().tokenize(&captions(&test, 32), context_length).tensor(&device),
    };
    let options = UpcycleOptions::default().with_probe(probe);
    let upcycled = sparse_config.init(&device).upcycle_from_dense(&dense.model, &options)?;
    println!("{}", upcycled.report);

    let is_small = dense.config.cost().params_total < SMALL;
    let rate = if is_small { 8e-3 } else { 1e-5 };
    let (dense_lr, sparse_lr) = (args.dense_lr.unwrap_or(rate), args.sparse_lr.unwrap_or(rate));
    let optimizer = |rate| OptimizerConfig::new(WarmupCosine::new(rate)).with_weight_decay(args.weight_decay);
    let arm = |name: &str, model, rate| Arm {
        name: name.to_string(),
        model,
        optimizer: optimizer(rate),
        auxiliary: ClipAuxiliaryLossConfig::new(),
        state: None,
    };
    let arms = vec![arm("dense_continued", dense.model.clone(), dense_lr), arm("sparse", upcycled.model.clone(), sparse_lr)];
    let mut config = TrainConfig::new(args.steps).with_eval_every(args.eval_every).with_seed(args.seed);
    let different = config.batch.with_context_length(context_length).largest_batch(&set);
    let batch_size = args.batch_size.unwrap_or((set.len() / 2).min(different).clamp(1, config.batch.batch_size));
    println!("batches of {batch_size}, highest learning rate {dense_lr} (dense) and {sparse_lr} (sparse)");
    config.batch = config.batch.with_batch_size(batch_size).with_context_length(context_length);
    let checkpointing = Checkpointing { folder: args.out.join("checkpoints"), every: args.eval_every };
    check_kept_run(&args, checkpointing.kept_run()?)?;
    if !args.resume && checkpointing.folder.is_dir() {
        fs::remove_dir_all(&checkpointing.folder)?;
    }
    let mut progress = Progress::new(&arms, args.steps);
    let trained = train(TrainInput {
        arms,
        set: &set,
        test: &test,
        config: &config,
        checkpointing: Some(&checkpointing),
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
    print_table(&results, sparse.truncated);
    let gain = gain(dense_continued, sparse);
    println!(
        "text to image R@1, sparse minus dense_continued: {:+.2} points (95 % interval {:+.2} to {:+.2})",
        100.0 * gain.difference,
        100.0 * gain.low,
        100.0 * gain.high
    );
    let step_ratio = sparse.time.as_secs_f64() / dense_continued.time.as_secs_f64();
    println!("a sparse step took {step_ratio:.2} times as long as a dense one");

    let report = json!({
        "dense": results[0].json(),
        "dense_continued": results[1].json(),
        "sparse": results[2].json(),
        "t2i_r1_gain": gain,
        "step_time_ratio": step_ratio,
        "upcycling": upcycled.report,
        "history": trained.iter().map(|arm| (arm.name.clone(), history(arm))).collect::<serde_json::Map<_, _>>(),
        "truncated_captions_in_training": sparse.truncated,
        "skipped_images": skipped,
        "seed": args.seed,
        "config": {
            "train": config,
            "optimizer": { "dense_continued": optimizer(dense_lr), "sparse": optimizer(sparse_lr) },
            "auxiliary": ClipAuxiliaryLossConfig::new(),
            "model": sparse_config,
            "device": args.device,
            "dense_checkpoint": args.dense,
            "list": args.list,
            "test": args.test,
        },
    });
    let checkpoint = ClipCheckpoint { config: sparse_config, model: sparse.model.clone() };
    checkpoint.save_sparse(args.out.join("sparse"), Precision::F32)?;
    write_atomic(args.out.join("report.json"), serde_json::to_string_pretty(&report)?.as_bytes())?;
    picture(&args.out.join("clip_up.png"), &trained, args.steps)?;
    // A trial is not worth going on with, and must not stand in the way of the run itself.
    if args.quick {
        fs::remove_dir_all(&checkpointing.folder)?;
    }
    println!("checkpoint, report.json and clip_up.png are in {}", args.out.display());
    Ok(())
}

/// Refuses to overwrite a run that could go on, and to resume what is not there or has done its steps. A run that has ended makes room for one
/// of as many steps.
fn check_kept_run(args: &Args, kept: Option<KeptRun>) -> Result<(), Box<dyn Error>> {
    let out = args.out.display();
    match kept {
        Some(KeptRun { step, steps }) if !args.resume && step < steps => Err(format!(
            "{out} holds a run that was interrupted at step {step} of {steps}: go on with --resume, take another --out, or remove it"
        )
        .into()),
        None if args.resume => Err(format!("{out} holds no run to go on with: leave --resume out, or name its --out").into()),
        Some(KeptRun { step, .. }) if !args.resume && step < args.steps => Err(format!(
            "{out} holds a run of {step} steps that has ended: go on with --resume, take another --out, or remove it"
        )
        .into()),
        Some(KeptRun { step, .. }) if args.resume && step >= args.steps => {
            Err(format!("the run in {out} has done {step} steps already: name more with --steps").into())
        }
        _ => Ok(()),
    }
}

/// What the models are trained and tested on.
struct Data {
    set: ImageTextSet,
    test: ImageTextSet,
    /// Images that could not be read, and why.
    skipped: Vec<String>,
}

fn data(args: &Args, vision: &VisionConfig) -> Result<Data, Box<dyn Error>> {
    if args.list.is_none() && args.columns.images.is_some() {
        return Err("--images is the folder of a list's images: name the list with --list".into());
    }
    if let Some(list) = &args.list {
        let preprocessor = ImagePreprocessor::for_model(vision).with_orientation(Orientation::Exif);
        let mut skipped = Vec::new();
        let mut read = |list: &PathBuf| -> Result<ImageTextSet, Box<dyn Error>> {
            let (list, folder) = args.columns.read(list)?;
            let bar = progress("images", list.images.len());
            let loaded = load_images(list, folder, &preprocessor, |done| bar.set_position(done as u64))?;
            bar.finish_and_clear();
            let LoadedImages { set, skipped: bad } = loaded;
            report_skipped(&bad, set.len(), args.strict)?;
            skipped.extend(bad.iter().map(ToString::to_string));
            Ok(set)
        };
        let all = read(list)?;
        if let Some(test) = &args.test {
            let test = read(test)?;
            return Ok(Data { set: all, test, skipped });
        }
        if all.len() < 10 {
            let (list, images) = (list.display(), all.len());
            return Err(format!("{list}: {images} images; at least 10 are needed, because every tenth is held out").into());
        }
        return Ok(Data { set: all.select(|image| image % 10 != 9), test: all.select(|image| image % 10 == 9), skipped });
    }
    let pack = EmojiPack::open(concat!(env!("CARGO_MANIFEST_DIR"), "/data/emoji"))?;
    let test = match &args.hold_out {
        None => EmojiVendor::Twemoji,
        Some(name) => EmojiVendor::TRAINING.into_iter().find(|v| v.name() == name).ok_or_else(|| {
            let names: Vec<_> = EmojiVendor::TRAINING.iter().map(EmojiVendor::name).collect();
            format!("`{name}` is no training vendor: expected one of {names:?}")
        })?,
    };
    let vendors: Vec<_> = EmojiVendor::TRAINING.into_iter().filter(|vendor| *vendor != test).collect();
    let load =
        |vendors: &[EmojiVendor], tags| Ok::<_, DataError>(pack.load(vendors, tags)?.with_preprocessing(vision.preprocessing));
    Ok(Data { set: load(&vendors, true)?, test: load(&[test], false)?, skipped: Vec::new() })
}

fn captions(set: &ImageTextSet, count: usize) -> Vec<String> {
    set.concept_of_image().iter().take(count).map(|&concept| set.concepts()[concept].captions[0].clone()).collect()
}

/// One row of the table.
struct Outcome<'a> {
    name: &'a str,
    evaluation: &'a Evaluation,
    cost: Cost,
    dropped: f64,
}

impl<'a> Outcome<'a> {
    fn of(name: &'a str, arm: &'a TrainedArm, cost: Cost) -> Self {
        Self { name, evaluation: last(arm), cost, dropped: arm.dropped }
    }

    fn json(&self) -> Value {
        let (t2i, i2t) = (self.evaluation.retrieval.text_to_image, self.evaluation.retrieval.image_to_text);
        json!({
            "t2i_r1": t2i.r1, "t2i_r5": t2i.r5, "t2i_r10": t2i.r10,
            "i2t_r1": i2t.r1, "i2t_r5": i2t.r5, "i2t_r10": i2t.r10,
            "gflops_per_pair": self.cost.gflops(),
            "params_total": self.cost.params_total,
            "params_active": self.cost.params_active,
            "dropped_in_training": self.dropped,
            "layers": self.evaluation.layers,
            "truncated_captions": self.evaluation.truncated,
        })
    }
}

fn last(arm: &TrainedArm) -> &Evaluation {
    &arm.history.last().expect("there is an evaluation at the end").1
}

fn history(arm: &TrainedArm) -> Value {
    arm.history
        .iter()
        .map(|(step, e)| json!({ "step": step, "t2i_r1": e.retrieval.text_to_image.r1, "i2t_r1": e.retrieval.image_to_text.r1 }))
        .collect()
}

fn gain(dense: &TrainedArm, sparse: &TrainedArm) -> PairedBootstrap {
    let hits = |arm| -> Vec<f64> { last(arm).retrieval.text_ranks.iter().map(|&rank| f64::from(rank == 0)).collect() };
    paired_bootstrap(&hits(dense), &hits(sparse), 0)
}

fn print_table(results: &[Outcome], truncated_in_training: usize) {
    println!(
        "\n{:<16} {:^23} {:^23} {:>11} {:>10} {:>10} {:>8}",
        "", "text to image, %", "image to text, %", "GFLOPs per", "parameters", "parameters", "dropped"
    );
    println!(
        "{:<16} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>11} {:>10} {:>10} {:>8}",
        "", "R@1", "R@5", "R@10", "R@1", "R@5", "R@10", "pair", "total", "active", "choices"
    );
    for row in results {
        let (t2i, i2t) = (row.evaluation.retrieval.text_to_image, row.evaluation.retrieval.image_to_text);
        print!("{:<16}", row.name);
        for recall in [t2i.r1, t2i.r5, t2i.r10, i2t.r1, i2t.r5, i2t.r10] {
            print!(" {:>7.2}", 100.0 * recall);
        }
        let Cost { params_total, params_active, .. } = row.cost;
        println!(" {:>11.5} {params_total:>10} {params_active:>10} {:>7.2}%", row.cost.gflops(), 100.0 * row.dropped);
    }
    for layer in results.iter().flat_map(|row| &row.evaluation.layers) {
        let load: Vec<String> = layer.stats.load.iter().map(|share| format!("{:.0}", 100.0 * share)).collect();
        println!("load of {}, % by expert: {} (entropy {:.2} nats)", layer.path, load.join(" "), layer.stats.entropy);
    }
    let truncated: usize = results.last().map_or(0, |row| row.evaluation.truncated);
    println!(
        "captions that did not fit the context and were cut: {truncated} of the test set, {truncated_in_training} in training"
    );
    println!();
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
    fn on_step(&mut self, arm: usize, step: usize, losses: &StepLosses) {
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

/// Recall over the steps on the left, load per expert and layer on the right; written aside and renamed.
fn picture(path: &Path, arms: &[TrainedArm], steps: usize) -> Result<(), Box<dyn Error>> {
    plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| "the font cannot be read")?;
    let (width, height) = (1200, 520);
    let mut pixels = vec![0; width as usize * height as usize * 3];
    {
        let root = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let (left, right) = root.split_horizontally(640);
        draw_recall(&left, arms, steps)?;
        draw_load(&right, last(&arms[1]))?;
        root.present()?;
    }
    let mut png = std::io::Cursor::new(Vec::new());
    image::RgbImage::from_raw(width, height, pixels)
        .ok_or("the picture has another size")?
        .write_to(&mut png, image::ImageFormat::Png)?;
    write_atomic(path, png.get_ref())?;
    Ok(())
}

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

fn draw_recall(area: &Area, arms: &[TrainedArm], steps: usize) -> Result<(), Box<dyn Error>> {
    let points = |arm: &TrainedArm| -> Vec<(f64, f64)> {
        arm.history.iter().map(|(step, e)| (*step as f64, 100.0 * e.retrieval.text_to_image.r1)).collect()
    };
    let top = arms.iter().flat_map(points).map(|(_, y)| y).fold(1.0, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .caption("Text to image R@1 on the test set", ("sans-serif", 20))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..steps as f64, 0.0..top)?;
    chart.configure_mesh().x_desc("steps").y_desc("%").x_label_formatter(&|x| format!("{x:.0}")).light_line_style(WHITE).draw()?;
    for (arm, color) in arms.iter().zip([RGBColor(90, 90, 90), RGBColor(200, 60, 30)]) {
        let name = if arm.name == "sparse" { "sparse (upcycled)" } else { "dense (trained on)" };
        chart
            .draw_series(LineSeries::new(points(arm), color.stroke_width(3)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], color.stroke_width(3)));
        chart.draw_series(points(arm).into_iter().map(|point| Circle::new(point, 4, color.filled())))?;
    }
    chart.configure_series_labels().position(SeriesLabelPosition::LowerRight).border_style(BLACK).background_style(WHITE).draw()?;
    Ok(())
}

/// One row of squares per sparse layer, one square per expert.
fn draw_load(area: &Area, evaluation: &Evaluation) -> Result<(), Box<dyn Error>> {
    area.titled("Load per expert, % of a layer's rows (test set)", ("sans-serif", 20))?;
    let (layers, experts) = (evaluation.layers.len() as i32, evaluation.layers.first().map_or(0, |l| l.stats.load.len()) as i32);
    let (left, top) = (150, 60);
    let (width, height) = (380 / experts.max(1), (400 / layers.max(1)).min(60));
    let label = ("sans-serif", 14).into_font();
    for (row, layer) in evaluation.layers.iter().enumerate() {
        let y = top + row as i32 * height;
        let path = layer.path.replace(".encoder.blocks.", " block ");
        area.draw(&Text::new(path, (10, y + height / 2 - 7), label.clone()))?;
        for (expert, share) in layer.stats.load.iter().enumerate() {
            let x = left + expert as i32 * width;
            let dark = (share * f64::from(experts) / 2.0).min(1.0);
            let shade = RGBColor(255 - (200.0 * dark) as u8, 255 - (160.0 * dark) as u8, 255 - (60.0 * dark) as u8);
            area.draw(&Rectangle::new([(x, y), (x + width - 2, y + height - 2)], shade.filled()))?;
            area.draw(&Text::new(format!("{:.0}", 100.0 * share), (x + width / 2 - 9, y + height / 2 - 7), label.clone()))?;
        }
    }
    Ok(())
}
