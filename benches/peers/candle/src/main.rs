//! candle's CLIP behind the line protocol of `benches/peers/inference.py`.
//!
//! ```sh
//! candle-peer FOLDER INPUTS
//! ```
//!
//! `FOLDER` holds `model.safetensors` in Hugging Face's layout, of a CLIP of ViT-B's widths; `INPUTS` is a safetensors file of images and token ids.
//! Each line of standard input names a tensor of it, and is answered with the milliseconds of embedding it. A file's name behind that has the
//! embeddings written there instead, raw f32, and `written` answered.

use std::{
    collections::HashMap,
    error::Error,
    fs,
    hint::black_box,
    io::{self, BufRead, Write},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use candle_core::{DType, Device, Tensor, safetensors};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::{ClipConfig, ClipModel};

/// A measurement repeats what takes less than this many seconds.
const ENOUGH: f64 = 0.2;

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
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, inputs] = &args[..] else { return Err("expected two arguments: FOLDER INPUTS".into()) };
    let model = load(&Path::new(folder).join("model.safetensors"))?;
    let mut inputs = safetensors::load(inputs, &Device::Cpu)?;
    for input in inputs.values_mut().filter(|input| input.dtype() == DType::I64) {
        *input = input.to_dtype(DType::U32)?;
    }
    serve(&model, &inputs)
}

/// candle has the sizes of B/32; those of B/16 differ in the patches alone.
fn load(file: &Path) -> Result<ClipModel, Box<dyn Error>> {
    let weights = safetensors::load(file, &Device::Cpu)?;
    let patches = weights.get("vision_model.embeddings.patch_embedding.weight").ok_or("the file has no vision model")?;
    let mut config = ClipConfig::vit_base_patch32();
    config.vision_config.patch_size = patches.dims4()?.3;
    Ok(ClipModel::new(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu), &config)?)
}

fn serve(model: &ClipModel, inputs: &HashMap<String, Tensor>) -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let (cell, file) = line.split_once(' ').map_or((&line[..], None), |(cell, file)| (cell, Some(file)));
        let input = inputs.get(cell).ok_or_else(|| format!("the inputs have no `{cell}`"))?;
        match file {
            Some(file) => {
                let values = embed(model, input)?.flatten_all()?.to_vec1::<f32>()?;
                fs::write(file, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
                writeln!(out, "written")?;
            }
            None => writeln!(out, "{}", milliseconds(model, input)?)?,
        }
        out.flush()?;
    }
    Ok(())
}

fn embed(model: &ClipModel, input: &Tensor) -> candle_core::Result<Tensor> {
    if input.rank() == 4 { model.get_image_features(input) } else { model.get_text_features(input) }
}

/// The mean of as many calls as take [`ENOUGH`], after one that finds other data in the caches; of that one alone if it takes as long by itself.
fn milliseconds(model: &ClipModel, input: &Tensor) -> candle_core::Result<f64> {
    let seconds = || {
        let start = Instant::now();
        black_box(embed(model, input)?);
        candle_core::Result::Ok(start.elapsed().as_secs_f64())
    };
    let first = seconds()?;
    if first >= ENOUGH {
        return Ok(1e3 * first);
    }
    let (mut sum, mut calls) = (0.0, 0);
    while sum < ENOUGH {
        sum += seconds()?;
        calls += 1;
    }
    Ok(1e3 * sum / f64::from(calls))
}
