//! Upcycles a CLIP and trains it on data of any size, on one machine or many.
//!
//! ```sh
//! cargo run --release --example train -- --dense clip-vit-base-patch16 --data 'shards/{00000..01242}.tar' --samples 10M \
//!     --batch-size 4096 --micro-batch 64 --eval karpathy:dataset_coco.json --eval-images coco --out run
//! ```
//!
//! The same command again goes on where the run was stopped. `--out` holds `log.jsonl`, `report.html` (with `--report`, it is made anew while a run is
//! going on), `checkpoints` and, at the end, the model in `model` and, with `--eval`, the picture `experts.png`.
//! With several `--devices`, a thread trains on each. Processes on several machines are started by MPI (cargo feature `mpi`):
//! `mpirun -n 4 train --mpi …`.

#[path = "../support/canvas.rs"]
mod canvas;
#[path = "../support/experts.rs"]
#[allow(dead_code, reason = "what only the main job reports")]
mod experts;
mod progress;
mod settings;
#[path = "../support/mod.rs"]
mod support;

use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Instant,
};

use burn::module::{Module, ParamGroup};
use burn::tensor::Device;
use burn_moe::{
    AssignmentConfig, Capacity, UpcycleFromDense, UpcycleOptions,
    clip::{
        Clip, ClipConfig,
        checkpoint::{ClipCheckpoint, LoadOptions, Precision},
        lists::{CaptionedImages, ListOptions},
        preprocess::{ImagePreprocessor, Orientation},
        tokenizer::ClipTokenizer,
    },
    routing::Phase,
    train::{
        Arm, Checkpointing, JsonLog, KeptRun, Observer, TrainData, TrainError, TrainInput, TrainedArm,
        data::{DataError, ImageTextSet, LoadedImages, load_images},
        html_report,
        ranks::{Ranks, Solo, Threads},
        stream::{ListedImages, Part, Samples, Stream, StreamConfig, is_tar, load_samples, open_samples},
        train,
    },
    transformer::FeedForward,
};
use clap::Parser;
use progress::Progress;
use settings::Args;
use support::{progress as progress_bar, refuse_checkpoint, report_skipped, write_atomic};

/// The picture of which words and patches go to which expert, made at the end of a run that is evaluated.
const EXPERTS: &str = "experts.png";

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let Some(out) = args.out.clone() else { return Err("name the run's folder with --out".into()) };
    if args.report {
        return report(&out);
    }
    args.check()?;
    let devices = args.devices()?;
    #[cfg(feature = "mpi")]
    if args.mpi {
        let ranks = burn_moe::train::ranks::Mpi::start()?;
        let run = std::panic::AssertUnwindSafe(|| -> Result<(), String> {
            let device = args.device_of_process(&devices)?;
            let start = start(&args, &device, ranks.part().rank == 0).map_err(|error| error.to_string())?;
            train_on(&args, &out, &ranks, &device, start).map_err(|error| error.to_string())
        });
        // The others wait for a rank that fails.
        match std::panic::catch_unwind(run) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => eprintln!("error: {error}"),
            Err(_) => {}
        }
        ranks.abort(1)
    }
    if args.mpi {
        return Err("--mpi is not built in: build with `--features mpi`".into());
    }
    // Made once: threads that draw a router at the same time would draw each other's numbers.
    let start = start(&args, &devices[0], true)?;
    match &devices[..] {
        [device] => train_on(&args, &out, &Solo, device, start),
        devices => {
            let (args, out, start) = (&args, &out, &start);
            let run = |ranks: Box<dyn Ranks>, device: &Device| {
                ranks.check().map_err(|error| format!("{error} (without --nccl, sums go through the host)"))?;
                let own = Start { config: start.config.clone(), model: start.model.clone().fork(device) };
                train_on(args, out, &*ranks, device, own).map_err(|error| error.to_string())
            };
            let results: Vec<Result<(), String>> = thread::scope(|scope| {
                let ranks = ranks_of(args, devices).into_iter().zip(devices);
                let threads: Vec<_> = ranks.map(|(ranks, device)| scope.spawn(move || run(ranks, device))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a rank has panicked".into()))).collect()
            });
            // The first rank's own error rather than that another one is gone.
            let mut errors: Vec<String> = results.into_iter().filter_map(Result::err).collect();
            errors.sort_by_key(|error| error.contains("has ended before the others"));
            errors.into_iter().next().map_or(Ok(()), |error| Err(error.into()))
        }
    }
}

/// A rank for each device.
fn ranks_of(args: &Args, devices: &[Device]) -> Vec<Box<dyn Ranks>> {
    #[cfg(feature = "cuda")]
    if args.nccl {
        return burn_moe::train::ranks::Devices::new(devices).into_iter().map(|ranks| Box::new(ranks) as _).collect();
    }
    debug_assert!(!args.nccl, "it is refused without CUDA");
    Threads::new(devices.len()).into_iter().map(|ranks| Box::new(ranks) as _).collect()
}

/// What a run starts from.
struct Start {
    config: ClipConfig,
    model: Clip,
}

/// Reads the checkpoint, and upcycles it.
fn start(args: &Args, device: &Device, speaks: bool) -> Result<Start, Box<dyn Error>> {
    // Every process draws the same router.
    device.seed(args.seed);
    let ClipCheckpoint { config, model } =
        ClipCheckpoint::load_with(&args.dense, &LoadOptions::new().with_image_size(args.image_size), device)?;
    let Start { config, model } = if config.is_sparse() {
        args.check_sparse()?;
        if speaks && limits_slots(&model) {
            println!(
                "note: this checkpoint limits the slots of experts in training, so choices are dropped where loads are uneven (`upcycle_checkpoint --capacity 0` sets no limit)"
            );
        }
        Start { config, model }
    } else if args.keep_dense {
        Start { config, model }
    } else {
        let sparse = args.sparse_config(&config)?;
        let upcycled = sparse.init(device).upcycle_from_dense(&model, &UpcycleOptions::default())?;
        if speaks {
            println!("{}", upcycled.report);
        }
        Start { config: sparse, model: upcycled.model }
    };
    let model = match args.lora()? {
        None => model,
        Some(options) => {
            let (before, model) = (model.num_params(), model.with_lora(&options));
            if speaks {
                println!("{} parameters of adapters are trained, {before} are frozen", model.num_params() - before);
            }
            model
        }
    };
    // With every number drawn.
    Ok(Start { config, model: model.fork(device) })
}

/// Whether experts have a limited number of slots in training.
fn limits_slots(model: &Clip) -> bool {
    let blocks = model.vision.encoder.blocks.iter().chain(&model.text.encoder.blocks);
    let mut capacities = blocks.filter_map(|block| match &block.feed_forward {
        // Where experts choose, each takes as many tokens as it has slots.
        FeedForward::Moe(moe) if matches!(moe.assignment, AssignmentConfig::TokenChoice(_)) => {
            Some(moe.assignment.capacity(Phase::Training))
        }
        _ => None,
    });
    capacities.any(|capacity| capacity != Capacity::Dropless)
}

/// One rank.
fn train_on(args: &Args, out: &Path, ranks: &dyn Ranks, device: &Device, start: Start) -> Result<(), Box<dyn Error>> {
    let is_first = ranks.part().rank == 0;
    let say = |text: String| {
        if is_first {
            println!("{text}");
        }
    };
    fs::create_dir_all(out).map_err(|error| format!("{}: {error}", out.display()))?;
    let Start { config, model } = start;
    let adapters = args.lora()?;
    let mut arm = Arm::new("model", model, args.optimizer());
    arm.frozen = args.frozen();

    let orientation = if args.as_stored { Orientation::AsStored } else { Orientation::Exif };
    let preprocessor = ImagePreprocessor::for_model(&config.vision).with_orientation(orientation);
    let samples = match (&args.images, &args.data[..]) {
        (Some(folder), [list]) => {
            Arc::new(ListedImages::new(CaptionedImages::read(list, &args.list_options())?, folder)) as Arc<dyn Samples>
        }
        _ => open_samples(&args.data, &args.list_options())?,
    };
    if args.names_list() && samples.shards() < args.batch_size {
        let (images, batch) = (samples.shards(), args.batch_size);
        return Err(format!(
            "the list has {images} images, and a batch of {batch} would hold some of them twice, as wrong answers for each other: take a smaller --batch-size"
        )
        .into());
    }
    let stream = StreamConfig::new(args.batch_size)
        .with_shuffle(args.shuffle)
        .with_context_length(config.text.context_length)
        .with_vocab_size(config.text.vocab_size)
        .with_crop(args.crop()?)
        .with_seed(args.seed);
    let stream = Stream::new(samples, preprocessor.clone(), stream)?;
    if args.load_only {
        return load_only(args, &stream, ranks.part());
    }
    let test = match &args.eval {
        Some(list) if is_first => Some(test_set(args, list, &preprocessor)?),
        _ => None,
    };
    let run = args.config()?;
    let steps = run.steps;
    say(format!("{steps} steps of {} pairs; {}", args.batch_size, describe(&config)));
    let (keep, overwrite) = (args.keep, args.overwrite);
    let checkpointing = Checkpointing { keep, overwrite, ..Checkpointing::new(out.join("checkpoints"), args.checkpoint_every()) };
    if is_first && !overwrite && checkpointing.kept_run()?.is_none() {
        ["model", "model-last"].into_iter().try_for_each(|name| refuse_checkpoint(&out.join(name), false))?;
    }
    let training = device.clone().autodiff();
    let input = |observer| TrainInput {
        arms: vec![arm],
        data: TrainData::Stream { stream: &stream, threads: args.workers },
        test: test.as_ref(),
        config: &run,
        checkpointing: Some(&checkpointing),
        ranks,
        device: &training,
        observer,
    };
    let trained = if is_first {
        let log = out.join("log.jsonl");
        let mut progress = Progress::new(steps, args.batch_size, log.clone(), out.join("report.html"));
        let mut log = JsonLog::new(log, vec!["model".into()], args.log_every, &mut progress)
            .map_err(|error| format!("{}: {error}", out.display()))?;
        let trained = train(input(&mut log as &mut dyn Observer)).map_err(|error| what_is_kept(error, args, &checkpointing))?;
        // The model is worth more than the log.
        if let Err(error) = log.finish() {
            eprintln!("warning: the log is not whole: {error}");
        }
        progress.finish();
        trained
    } else {
        train(input(&mut ()))?
    };
    let [TrainedArm { model, average, truncated, .. }] = <[TrainedArm; 1]>::try_from(trained).expect("one arm was trained");
    if is_first {
        // What another run has left that this one has no equal of.
        let remove = |name: &str| {
            let path = out.join(name);
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(format!("{}: {error}", path.display())),
                _ => Ok(()),
            }
        };
        let model = match average {
            None => {
                remove("model-last")?;
                model
            }
            Some(average) => {
                let last = ClipCheckpoint { config: config.clone(), model: model.valid().materialize() };
                last.save_sparse(out.join("model-last"), Precision::F32)?;
                average
            }
        };
        let model = model.valid();
        if let Some(options) = &adapters {
            write_atomic(out.join("adapters.json"), options.to_string().as_bytes())?;
            let adapters = model.clone().into_record_group(ParamGroup::from_predicate(".lora.")).into_bytes()?;
            write_atomic(out.join("adapters.bpk"), &adapters)?;
        } else {
            ["adapters.json", "adapters.bpk"].into_iter().try_for_each(remove)?;
        }
        let checkpoint = ClipCheckpoint { config, model: model.materialize() };
        checkpoint.save_sparse(out.join("model"), Precision::F32)?;
        if let Some(test) = test.as_ref().filter(|_| checkpoint.config.is_sparse()) {
            let tokenizer = ClipTokenizer::for_model(&checkpoint.model.text)?;
            let context_length = checkpoint.config.text.context_length;
            let known = experts::look_into(&checkpoint.model, test, &tokenizer, context_length, device);
            experts::draw(&out.join(EXPERTS), &known, test)?;
        } else {
            remove(EXPERTS)?;
        }
        report(out)?;
        let of_rank = if ranks.part().ranks > 1 { " (of the first rank)" } else { "" };
        println!("captions that did not fit the context and were cut, since the run began: {truncated}{of_rank}");
        println!("the model is in {}, the log and the report beside it", out.join("model").display());
    }
    Ok(())
}

/// The error, with what can be done where the data has ended and the steps before are kept.
fn what_is_kept(error: TrainError, args: &Args, checkpointing: &Checkpointing) -> Box<dyn Error> {
    match (&error, checkpointing.kept_run()) {
        (TrainError::Data(DataError::StreamEnded { .. }), Ok(Some(KeptRun { step, .. }))) => {
            let samples = step * args.batch_size;
            let without = if args.overwrite { " and without --overwrite" } else { "" };
            format!(
                "{error} (step {step} is kept: the same command with --samples {samples}{without} ends there, and writes the model)"
            )
            .into()
        }
        _ => error.into(),
    }
}

fn describe(config: &ClipConfig) -> String {
    let cost = config.cost();
    format!("{:.3} GFLOPs per pair, {} parameters, {} of them active", cost.gflops(), cost.params_total, cost.params_active)
}

/// Reads as many batches as the run would take.
fn load_only(args: &Args, stream: &Stream, part: Part) -> Result<(), Box<dyn Error>> {
    let workers = match args.workers {
        0 => thread::available_parallelism()?.get(),
        workers => workers,
    };
    let piece = args.micro_batch.unwrap_or(args.batch_size);
    let mut batches = stream.batches(part, piece, workers, 0)?;
    let steps = args.steps()?;
    let bar = progress_bar("batches", steps);
    let begin = Instant::now();
    let mut pairs = 0;
    for _ in 0..steps {
        for _ in 0..batches.pieces() {
            pairs += batches.next_piece()?.len();
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let seconds = begin.elapsed().as_secs_f64();
    let skipped = batches.skipped();
    println!("{pairs} pairs in {seconds:.1} s by {workers} threads: {:.1} pairs/s", pairs as f64 / seconds);
    report_skipped(&skipped.first, pairs, false)?;
    println!("{} samples could not be used", skipped.count);
    Ok(())
}

/// The images that the model is evaluated on, in memory.
fn test_set(args: &Args, name: &str, preprocessor: &ImagePreprocessor) -> Result<ImageTextSet, Box<dyn Error>> {
    let (name, split) = match name.strip_prefix("karpathy:") {
        Some(list) => (list, Some("test".to_string())),
        None => (name, args.eval_split.clone()),
    };
    let path = PathBuf::from(name);
    if path.is_file() && !is_tar(&path) {
        let list = CaptionedImages::read(&path, &ListOptions { split, ..ListOptions::default() })?;
        let beside = || path.parent().map(PathBuf::from).unwrap_or_default();
        let folder = args.eval_images.clone().unwrap_or_else(beside);
        let bar = progress_bar("images to evaluate on", list.images.len());
        let loaded = load_images(list, folder, preprocessor, |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        let LoadedImages { set, skipped } = loaded;
        report_skipped(&skipped, set.len(), false)?;
        return Ok(set);
    }
    let samples = open_samples(&[name], &ListOptions::default())?;
    let (set, skipped) = load_samples(&*samples, preprocessor)?;
    report_skipped(&skipped, set.len(), false)?;
    Ok(set)
}

/// The page that shows a run, from its log.
fn report(out: &Path) -> Result<(), Box<dyn Error>> {
    let log = out.join("log.jsonl");
    let text = fs::read_to_string(&log).map_err(|error| format!("{}: {error}", log.display()))?;
    let mut page = html_report(&text);
    if out.join(EXPERTS).is_file() {
        let picture =
            format!("<h2>What the experts know</h2><img src={EXPERTS} alt=\"first experts of words and patches\"></body>");
        page = page.replace("</body>", &picture);
    }
    write_atomic(out.join("report.html"), page.as_bytes())?;
    println!("{}", support::file_url(&fs::canonicalize(out.join("report.html"))?));
    Ok(())
}
