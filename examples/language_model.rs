//! The MoE layers of a published language model: what they are, what they cost, and how they route tokens.
//!
//! ```sh
//! hf download allenai/OLMoE-1B-7B-0924 --include config.json 'model*.json' 'model-00001-*' --local-dir olmoe
//! cargo run --release --example language_model -- olmoe --blocks 0,1 --tokens 512
//! ```
//!
//! A folder has `config.json` and safetensors, as transformers' `save_pretrained` writes them; of a model in shards, those of the blocks that are
//! named are enough. Without `--input`, the tokens are drawn from a normal distribution: they show cost and speed, and no load of real text. Hidden states
//! of real text come from a forward hook on the layer in Python, saved by `safetensors.torch.save_file`.

mod support;

use std::{error::Error, fs, path::PathBuf, process::ExitCode, time::Instant};

use burn::tensor::{Device, Distribution, FloatDType, Tensor, TensorData};
use burn_moe::{
    Precision,
    language_models::{LayerOptions, MoeCheckpoint, save_mixtral},
    stats::RoutingStats,
};
use clap::Parser;
use safetensors::{Dtype, SafeTensors};
use support::{Stored, device_by_name};

#[derive(Parser)]
#[command(
    about = "Shows the MoE layers of a language model, their cost and their load",
    after_help = "Example: language_model Mixtral-8x7B-v0.1 --blocks 0 --tokens 64 --precision bf16"
)]
struct Args {
    /// Folder with config.json and safetensors: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v3, glm4_moe, gpt_oss or granitemoe
    folder: PathBuf,
    /// Blocks whose layers are loaded and run [default: all that have a MoE layer]
    #[arg(long, value_delimiter = ',')]
    blocks: Option<Vec<usize>>,
    /// Number of random tokens
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// A safetensors file with tokens [.., D] to run instead
    #[arg(long)]
    input: Option<PathBuf>,
    /// The tensor in that file, if there are several
    #[arg(long)]
    tensor: Option<String>,
    /// Forward passes of which the median time is printed
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Writes the layers into this folder in Mixtral's layout, which transformers reads
    #[arg(long)]
    save_mixtral: Option<PathBuf>,
    /// How weights are kept in memory on the CPU, packed for inference [default: plain, in f32]
    #[arg(long)]
    precision: Option<Stored>,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn main() -> ExitCode {
    support::run(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    let checkpoint = MoeCheckpoint::open(&args.folder)?;
    if let Some(out) = &args.save_mixtral
        && out.canonicalize().is_ok_and(|out| args.folder.canonicalize().is_ok_and(|folder| folder == out))
    {
        return Err(format!("{}: `--save-mixtral` would overwrite the model that is read", out.display()).into());
    }
    let config = checkpoint.config();
    let (blocks, sparse) = (checkpoint.num_blocks(), checkpoint.moe_blocks());
    println!("{}: {blocks} blocks, {} of them with a MoE layer", checkpoint.family().model_type(), sparse.len());
    println!(
        "each: {} experts of which a token passes {}; width {}, hidden width {}{}",
        config.num_experts,
        config.assignment.active_experts(config.num_experts),
        config.d_model,
        config.d_ff,
        config.shared_expert.map_or(String::new(), |width| format!(", and a shared expert of hidden width {width}"))
    );
    let cost = config.cost(1);
    let millions = |count: u64| count as f64 / 1e6;
    println!(
        "each: {:.1} million parameters, {:.1} active; {:.3} GFLOPs per token",
        millions(cost.params_total),
        millions(cost.params_active),
        cost.gflops()
    );

    let tokens = match &args.input {
        Some(file) => read_tokens(file, args.tensor.as_deref(), config.d_model, &device)?,
        None => Tensor::random([args.tokens, config.d_model], Distribution::Normal(0.0, 1.0), &device),
    };
    let [num_tokens, _] = tokens.dims();
    if num_tokens == 0 {
        return Err("there is no token: `--tokens` must be at least 1".into());
    }
    println!("{:>6} {:>9} {:>11} {:>9} {:>9} {:>9}", "", "load", "forward of", "least", "largest", "entropy");
    println!("{:>6} {:>9} {:>11} {:>9} {:>9} {:>9}", "block", "s", format!("{num_tokens}, ms"), "load, %", "load, %", "nats");
    let options = layer_options(&args)?;
    let mut layers = Vec::new();
    for &block in args.blocks.as_deref().unwrap_or(sparse) {
        let start = Instant::now();
        let layer = checkpoint.load_layer_with(block, &options, &device)?;
        let loading = start.elapsed();
        // The first pass prepares memory and, on a GPU, kernels.
        let result = layer.forward(tokens.clone());
        drop(result.output.into_data());
        let mut times: Vec<f64> = (0..args.repeats.max(1))
            .map(|_| {
                let start = Instant::now();
                drop(layer.forward(tokens.clone()).output.into_data());
                start.elapsed().as_secs_f64() * 1e3
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let stats = RoutingStats::new(&result.routing);
        let load = |pick: fn(f64, f64) -> f64| 100.0 * stats.load.iter().copied().reduce(pick).unwrap_or(0.0);
        println!(
            "{block:>6} {:>9.1} {:>11.1} {:>9.2} {:>9.2} {:>9.3}",
            loading.as_secs_f64(),
            times[times.len() / 2],
            load(f64::min),
            load(f64::max),
            stats.entropy
        );
        layers.extend(args.save_mixtral.is_some().then_some(layer));
    }
    if let Some(folder) = &args.save_mixtral {
        save_mixtral(&layers, folder, Precision::F32)?;
        println!("{}: {} layers in Mixtral's layout", folder.display(), layers.len());
    }
    Ok(())
}

#[cfg(feature = "flex")]
fn layer_options(args: &Args) -> Result<LayerOptions, Box<dyn Error>> {
    Ok(LayerOptions::new().with_packed(args.precision.map(Into::into)))
}

#[cfg(not(feature = "flex"))]
fn layer_options(args: &Args) -> Result<LayerOptions, Box<dyn Error>> {
    match args.precision {
        Some(_) => Err("`--precision` packs weights for the CPU: build with `--features flex`".into()),
        None => Ok(LayerOptions::new()),
    }
}

/// Tokens `[.., D]` of a file, as `[T, D]`.
fn read_tokens(file: &PathBuf, name: Option<&str>, width: usize, device: &Device) -> Result<Tensor<2>, Box<dyn Error>> {
    let at = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
    let bytes = fs::read(file).map_err(|error| at(&error))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| at(&error))?;
    let names = tensors.names();
    let name = match (name, &names[..]) {
        (Some(name), _) => name,
        (None, [only]) => only,
        _ => return Err(at(&format!("it has {} tensors: name one by `--tensor`", names.len())).into()),
    };
    let view = tensors.tensor(name).map_err(|error| at(&error))?;
    if view.shape().last() != Some(&width) {
        return Err(at(&format!("`{name}` is {:?}, expected [.., {width}]", view.shape())).into());
    }
    let bytes = view.data();
    let values: Vec<f32> = match view.dtype() {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        other => return Err(at(&format!("`{name}` has dtype {other:?}, expected F32, F16 or BF16")).into()),
    };
    let shape = [values.len() / width, width];
    Ok(Tensor::<2>::from_data(TensorData::new(values, shape), device).cast(FloatDType::F32))
}
