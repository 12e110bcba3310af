//! Embeddings of a CLIP on a CPU, batch by batch: this crate's side of `benches/peers/inference.py`, which starts it with `--serve`.
//!
//! ```sh
//! cargo bench --bench inference                                    # a small table, of a B/16 with random weights
//! RAYON_NUM_THREADS=1 cargo bench --bench inference -- --checkpoint path/to/clip-vit-base-patch32
//! ```
//!
//! With `--serve` it reads a cell from each line of standard input, the name of a tensor in the file `--inputs`, and answers with the
//! milliseconds of embedding it. A file's name behind the cell has the embeddings written there instead, raw f32, and `written` answered.

mod support;

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    io::{self, BufRead, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use burn_moe::{
    Precision,
    clip::{Clip, ClipConfig, checkpoint::ClipCheckpoint},
    pack_weights,
};
use clap::Parser;
use safetensors::{Dtype, SafeTensors};
use support::{device, finish};

/// A measurement repeats what takes less than this many seconds.
const ENOUGH: f64 = 0.2;

#[derive(Parser)]
#[command(about = "Times the embedding of images and texts")]
struct Args {
    /// Folder of a checkpoint, dense or sparse; a dense B/16 with random weights without it
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// What weights are packed in: f32, f16, bf16 or int8; plain, as they were loaded
    #[arg(long, default_value = "plain")]
    precision: String,
    /// Answer cells from standard input
    #[arg(long, requires = "inputs")]
    serve: bool,
    /// A safetensors file with images, f32 `[B, C, H, W]`, and token ids, i64 `[B, N]`
    #[arg(long)]
    inputs: Option<PathBuf>,
    /// What cargo adds
    #[arg(long, hide = true)]
    bench: bool,
}

/// One batch.
enum Input {
    Images(Tensor<4>),
    Texts(Tensor<2, Int>),
}

/// The model in the precision that is measured.
fn prepare(model: Clip, precision: &str) -> Clip {
    let precision = match precision {
        "plain" => return model,
        "f32" => Precision::F32,
        "f16" => Precision::F16,
        "bf16" => Precision::BF16,
        "int8" => Precision::Int8,
        other => panic!("--precision {other}: expected plain, f32, f16, bf16 or int8"),
    };
    pack_weights(model, precision)
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device();
    let (config, model) = match &args.checkpoint {
        Some(folder) => {
            let ClipCheckpoint { config, model } = ClipCheckpoint::load(folder, &device)?;
            (config, model)
        }
        None => (ClipConfig::vit_b_16(), ClipConfig::vit_b_16().init(&device)),
    };
    let model = prepare(model, &args.precision);
    let inputs = match &args.inputs {
        Some(file) => read_inputs(file, &device)?,
        None => random_inputs(&config, &device),
    };
    if args.serve {
        return serve(&model, &inputs, &device);
    }
    println!("{:<16}{:>10}", "cell", "ms");
    for (cell, input) in &inputs {
        embed(&model, input); // what is done once, such as drawing weights, isn't timed
        println!("{cell:<16}{:>10.2}", milliseconds(|| embed(&model, input), &device));
    }
    Ok(())
}

fn serve(model: &Clip, inputs: &BTreeMap<String, Input>, device: &Device) -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (cell, file) = line.split_once(' ').map_or((&line[..], None), |(cell, file)| (cell, Some(file)));
        let input = inputs.get(cell).ok_or_else(|| format!("the inputs have no `{cell}`"))?;
        match file {
            Some(file) => {
                let values = embed(model, input).try_into_vec_as::<f32>().expect("a float tensor reads as f32");
                fs::write(file, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
                writeln!(out, "written")?;
            }
            None => writeln!(out, "{}", milliseconds(|| embed(model, input), device))?,
        }
        out.flush()?;
    }
    Ok(())
}

fn embed(model: &Clip, input: &Input) -> Tensor<2> {
    match input {
        Input::Images(images) => model.vision.embedding(images.clone()),
        Input::Texts(tokens) => model.text.embedding(tokens.clone()),
    }
}

/// The mean of as many calls as take [`ENOUGH`], after one that finds other data in the caches; of that one alone if it takes as long by itself.
fn milliseconds(call: impl Fn() -> Tensor<2>, device: &Device) -> f64 {
    let first = finish(&call, device);
    if first >= ENOUGH {
        return 1e3 * first;
    }
    let (mut seconds, mut calls) = (0.0, 0);
    while seconds < ENOUGH {
        seconds += finish(&call, device);
        calls += 1;
    }
    1e3 * seconds / f64::from(calls)
}

fn read_inputs(file: &Path, device: &Device) -> Result<BTreeMap<String, Input>, Box<dyn Error>> {
    let bytes = fs::read(file)?;
    let mut inputs = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes)?.tensors() {
        let input = match (view.dtype(), view.shape()) {
            (Dtype::F32, shape @ [_, _, _, _]) => {
                let values: Vec<f32> = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                Input::Images(Tensor::from_data(TensorData::new(values, shape), device))
            }
            (Dtype::I64, shape @ [_, _]) => {
                let ids: Vec<i64> = view.data().as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
                Input::Texts(Tensor::from_data(TensorData::new(ids, shape), device))
            }
            (dtype, shape) => {
                return Err(
                    format!("{}: `{name}` is {dtype:?} {shape:?}: expected f32 images or i64 tokens", file.display()).into()
                );
            }
        };
        inputs.insert(name, input);
    }
    Ok(inputs)
}

/// Images, texts that fill the context, and texts of 5 to 15 words of a token each.
fn random_inputs(config: &ClipConfig, device: &Device) -> BTreeMap<String, Input> {
    let side = config.vision.image_size;
    let context = config.text.context_length;
    let end = config.text.vocab_size as i64 - 1;
    let mut inputs = BTreeMap::new();
    for batch in [1, 8] {
        let images = Tensor::random([batch, config.vision.channels, side, side], Distribution::Normal(0.0, 1.0), device);
        inputs.insert(format!("image/{batch}"), Input::Images(images));
    }
    for batch in [1, 64] {
        for (kind, words) in [("full", None), ("short", Some(5..16))] {
            let mut ids = vec![0; batch * context];
            for (text, ids) in ids.chunks_exact_mut(context).enumerate() {
                let last = words.clone().map_or(context - 1, |mut words| 1 + words.nth(text * 7 % 11).expect("11 lengths"));
                ids[..last].fill(end / 2);
                ids[last] = end;
            }
            inputs.insert(
                format!("text/{kind}/{batch}"),
                Input::Texts(Tensor::from_data(TensorData::new(ids, [batch, context]), device)),
            );
        }
    }
    inputs
}
