//! Training by processes that MPI starts: `cargo test --features mpi --test mpi`. Run alone, this program starts itself as one, two and four ranks,
//! and compares what they trained.

use std::{
    env, fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use burn::tensor::Device;
use burn_moe::{
    Capacity, TokenChoiceConfig,
    clip::{ClipConfig, SparseClipConfig, TextConfig, VisionConfig},
    train::{
        Arm, Checkpointing, Observer, OptimizerConfig, StepReport, TrainConfig, TrainData, TrainInput, WarmupCosine,
        data::{AugmentConfig, BatchConfig, Caption, Concept, ImageTextSet},
        ranks::{Mpi, Ranks, Solo},
        train,
    },
    transformer::{EncoderConfig, RoutedLayerConfig, SparseEncoderConfig},
};

const STEPS: usize = 20;
/// Where a rank writes its weights; what it is asked to do.
const FOLDER: &str = "BURN_MOE_MPI_FOLDER";
const TASK: &str = "BURN_MOE_MPI_TASK";

fn main() {
    match env::var(FOLDER) {
        Ok(folder) => rank(Path::new(&folder), &env::var(TASK).unwrap_or_default()),
        Err(_) => all(),
    }
}

/// Starts ranks of this program; whether they ended well.
fn start(ranks: usize, folder: &Path, task: &str) -> bool {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]);
    command.args(["--mca", "btl_vader_single_copy_mechanism", "none"]);
    command.arg(env::current_exe().unwrap()).env(FOLDER, folder).env(TASK, task).env("RAYON_NUM_THREADS", "1");
    command.status().expect("mpirun can be started: install Open MPI").success()
}

fn all() {
    let folder = tempfile::tempdir().unwrap();
    let weights = |ranks: usize, rank: usize| {
        let bytes = fs::read(folder.path().join(format!("{ranks}-{rank}"))).unwrap();
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect::<Vec<f32>>()
    };
    let square = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
    for ranks in [1, 2, 4] {
        assert!(start(ranks, folder.path(), "train"), "{ranks} ranks failed");
        for rank in 1..ranks {
            assert!(weights(ranks, rank) == weights(ranks, 0), "rank {rank} of {ranks} has other bits than rank 0");
        }
        let (alone, together) = (weights(1, 0), weights(ranks, 0));
        let difference: Vec<f32> = alone.iter().zip(&together).map(|(a, b)| a - b).collect();
        let apart = (square(&difference) / square(&alone)).sqrt();
        println!("{ranks} ranks: {apart:.1e} from one rank after {STEPS} steps, {} numbers", alone.len());
        assert!(apart < 1e-5);
    }
    // A rank that dies or fails ends all, soon, and the run goes on from its checkpoint.
    for task in ["die", "fail"] {
        let begin = Instant::now();
        assert!(!start(2, folder.path(), task), "a rank was to {task}");
        assert!(begin.elapsed() < Duration::from_secs(60), "the others ended after {:?}", begin.elapsed());
    }
    assert!(start(2, folder.path(), "resume"));
    println!("a rank that dies ends all, and the run goes on");
}

/// Stops this rank in some way at step 7.
struct Stop<'a>(&'a str);

impl Observer for Stop<'_> {
    fn on_step(&mut self, _: usize, step: usize, _: &StepReport) {
        match self.0 {
            "die" if step == 7 => std::process::abort(),
            "fail" if step == 7 => panic!("failed"),
            _ => {}
        }
    }
}

fn rank(folder: &Path, task: &str) {
    let mpi = Mpi::start().unwrap();
    let part = mpi.part();
    let device = Device::default();
    device.seed(3);
    let tokens = TokenChoiceConfig::new().with_training_capacity(Capacity::Dropless);
    let layer = RoutedLayerConfig::new().with_assignment(tokens.into());
    let sparse = SparseEncoderConfig::new().with_layer(layer.into());
    let sparse = SparseClipConfig::new().with_vision(Some(sparse.clone())).with_text(Some(sparse));
    let encoder = || EncoderConfig::new(16, 2, 2, 32);
    let text = TextConfig::new(encoder()).with_context_length(8).with_vocab_size(600);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 16).sparse(sparse);
    let arm = Arm::new("sparse", config.init(&device), OptimizerConfig::new(WarmupCosine::new(1e-3).with_warmup_steps(3)));
    let pixels = (0..32 * 192).map(|place| (place * 7919 % 251) as u8).collect();
    let concepts = (0..32).map(|number| Concept { captions: vec![Caption::new(format!("n {number}"))] });
    let set = ImageTextSet::new(8, pixels, (0..32).collect(), concepts.collect());
    let batch =
        BatchConfig::new().with_batch_size(16).with_context_length(8).with_vocab_size(600).with_augment(AugmentConfig::none());
    let run = TrainConfig::new(STEPS).with_micro_batch(Some(2));
    let checkpointing =
        Checkpointing::new(folder.join(format!("run-{}-{}", part.ranks, if task == "train" { task } else { "stop" })), 5);
    let mut stop = Stop(if part.rank == part.ranks - 1 { task } else { "" });
    let input = TrainInput {
        arms: vec![arm],
        data: TrainData::Set { set: &set, batch },
        test: (part.ranks == 1).then_some(&set),
        config: &run,
        checkpointing: Some(&checkpointing),
        ranks: if part.ranks == 1 { &Solo } else { &mpi },
        device: &device,
        observer: &mut stop,
    };
    let trained = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| train(input)));
    let trained = match trained {
        Ok(Ok(trained)) => trained,
        Ok(Err(error)) => {
            eprintln!("rank {} of {}: {error}", part.rank, part.ranks);
            mpi.abort(1)
        }
        Err(_) => mpi.abort(1),
    };
    let model = &trained[0].model;
    let weights = [&model.vision.projection.weight, &model.text.projection.weight, &model.text.token_embedding.weight];
    let values = weights.into_iter().flat_map(|weight| weight.val().detach().try_into_vec_as::<f32>().unwrap());
    let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    fs::write(folder.join(format!("{}-{}", part.ranks, part.rank)), bytes).unwrap();
}
