//! Runs reference cases from PyTorch, transformers and open_clip on a device of yours, and says how far the results are apart.
//!
//! ```sh
//! cargo run --release --example verify -- tests/fixtures/moe-top2-dropless tests/fixtures/clip-hf-gelu
//! ```
//!
//! The files in a directory tell its kind: `case.json` is one layer with losses and gradients, `config.json` a Hugging Face
//! CLIP or, with `*.input` in `reference.safetensors`, a language model with MoE layers, `open_clip_config.json` an open_clip CLIP, `moevie_config.json` a
//! MoE-ViE, of which each sparse layer is run from its recorded input, too. Every tensor is printed with its largest error, `max|a − b| / max(1, max|b|)`.
//! The exit status is 1 when an error is above its tolerance (1e-4, gradients 1e-3; 1e-5 and 1e-4 for MoE-ViE and layers of language models), or a case needs what is not there yet. On `cuda`
//! tolerances are 40 times as wide, as burn's f32 products are TF32 there where that measures faster.

pub(crate) mod support;

use std::{
    collections::BTreeMap,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use burn::{
    module::{Module, Param},
    tensor::{Bool, Device, Int, Tensor, TensorData},
};
use burn_moe::{
    Activation, AssignmentConfig, Capacity, ExpertChoiceConfig, ExpertOptions, FillOrder, GateNormalization, MoeFeedForwardConfig,
    MoeInput, TokenChoiceConfig,
    clip::checkpoint::ClipCheckpoint,
    language_models::MoeCheckpoint,
    loss::{global_entropy_loss, importance_loss, load_balancing_loss, router_z_loss},
    stats::RoutingStats,
    transformer::FeedForward,
};
use clap::Parser;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use support::device_by_name;

const FORWARD: f64 = 1e-4;
const GRADIENT: f64 = 1e-3;

/// How the input of a layer is named behind the layer.
const INPUT: &str = ".input";

#[derive(Parser)]
#[command(
    about = "Checks burn-moe on a device against reference cases",
    after_help = "Example: verify --device wgpu tests/fixtures/*"
)]
struct Args {
    /// Directories of reference cases
    #[arg(required = true)]
    cases: Vec<PathBuf>,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What tolerances are multiplied by [default: 40 for cuda, 1 elsewhere]
    #[arg(long)]
    slack: Option<f64>,
}

fn main() -> ExitCode {
    support::run(check_all)
}

fn check_all() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let device = device_by_name(&args.device)?;
    let slack = args.slack.unwrap_or(usual_slack(&args.device));
    let mut failed = 0;
    for case in &args.cases {
        println!("{}", case.display());
        let mut errors = Errors::new(slack);
        match run(case, &device, &mut errors) {
            Ok(()) if errors.above == 0 => {}
            Ok(()) => failed += 1,
            Err(error) => {
                println!("  FAILED: {error}");
                failed += 1;
            }
        }
    }
    println!("{} passed, {failed} failed", args.cases.len() - failed);
    if failed == 0 { Ok(()) } else { Err("reference cases failed".into()) }
}

pub(crate) fn run(folder: &Path, device: &Device, errors: &mut Errors) -> Result<(), Box<dyn Error>> {
    if folder.join("case.json").is_file() {
        return layer_case(folder, device, errors);
    }
    if folder.join("config.json").is_file() {
        let reference = Reference::read(&folder.join("reference.safetensors"))?;
        if reference.0.keys().any(|name| name.ends_with(INPUT)) {
            return language_model_case(folder, &reference, device, errors);
        }
    }
    if ["config.json", "open_clip_config.json", "moevie_config.json"].iter().any(|name| folder.join(name).is_file()) {
        return clip_case(folder, device, errors);
    }
    Err("no `case.json`, `config.json`, `open_clip_config.json` or `moevie_config.json` in it".into())
}

/// What tolerances are multiplied by on this device: TF32 keeps 10 bits of 23.
pub(crate) fn usual_slack(device: &str) -> f64 {
    if device == "cuda" { 40.0 } else { 1.0 }
}

/// Prints errors and counts those above their tolerance.
pub(crate) struct Errors {
    pub(crate) checked: usize,
    pub(crate) above: usize,
    slack: f64,
}

impl Errors {
    pub(crate) fn new(slack: f64) -> Self {
        Self { checked: 0, above: 0, slack }
    }

    fn check(&mut self, name: &str, found: &[f64], expected: &[f64], tolerance: f64) {
        let scale = expected.iter().fold(1.0, |max: f64, b| max.max(b.abs()));
        let error = found.iter().zip(expected).map(|(a, b)| (a - b).abs() / scale);
        // `f64::max` would pass over a NaN.
        let error = error.fold(0.0, |max: f64, e| if e > max || e.is_nan() { e } else { max });
        let same_size = found.len() == expected.len();
        let tolerance = tolerance * self.slack;
        let good = same_size && error <= tolerance;
        let verdict = match (good, same_size) {
            (true, _) => "ok".to_string(),
            (false, true) => format!("ABOVE {tolerance:.0e}"),
            (false, false) => format!("SIZE {} instead of {}", found.len(), expected.len()),
        };
        println!("  {name:<40} {error:.2e}  {verdict}");
        self.checked += 1;
        self.above += usize::from(!good);
    }

    fn check_tensor<const D: usize>(&mut self, name: &str, found: Tensor<D>, expected: &[f64], tolerance: f64) {
        self.check(name, &values(found), expected, tolerance);
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32").into_iter().map(f64::from).collect()
}

/// The tensors of a safetensors file as f64.
struct Reference(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Reference {
    fn read(path: &Path) -> Result<Self, Box<dyn Error>> {
        let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| format!("{}: {error}", path.display()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let bytes = view.data();
            let values: Vec<f64> = match view.dtype() {
                Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect(),
                Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect(),
                Dtype::I64 => bytes.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b) as f64).collect(),
                Dtype::I32 => bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect(),
                Dtype::U8 | Dtype::BOOL => bytes.iter().map(|b| f64::from(*b)).collect(),
                other => return Err(format!("{}: `{name}` has dtype {other:?}", path.display()).into()),
            };
            tensors.insert(name, (view.shape().to_vec(), values));
        }
        Ok(Self(tensors))
    }

    fn values(&self, name: &str) -> Result<&[f64], Box<dyn Error>> {
        Ok(&self.0.get(name).ok_or_else(|| format!("the reference has no `{name}`"))?.1)
    }

    fn tensor<const D: usize>(&self, name: &str, shape: [usize; D], device: &Device) -> Result<Tensor<D>, Box<dyn Error>> {
        let values: Vec<f32> = self.values(name)?.iter().map(|v| *v as f32).collect();
        if values.len() != shape.iter().product::<usize>() {
            return Err(format!("`{name}` has {} values, the case says {shape:?}", values.len()).into());
        }
        Ok(Tensor::from_data(TensorData::new(values, shape), device))
    }

    fn shape<const D: usize>(&self, name: &str) -> Result<[usize; D], Box<dyn Error>> {
        let (shape, _) = self.0.get(name).ok_or_else(|| format!("the reference has no `{name}`"))?;
        shape.as_slice().try_into().map_err(|_| format!("`{name}` has shape {shape:?}, expected {D} axes").into())
    }
}

#[derive(Deserialize)]
struct Case {
    num_tokens: usize,
    d_model: usize,
    d_ff: usize,
    num_experts: usize,
    top_k: usize,
    slots: usize,
    policy: String,
    gate_normalization: String,
    fill_order: String,
    activation: String,
    #[serde(default)]
    protected_tokens: usize,
    load_balancing_loss: f64,
    router_z_loss: f64,
    #[serde(default)]
    importance_loss: Option<f64>,
    #[serde(default)]
    entropy_of_mean: Option<f64>,
    mean_token_entropy: f64,
    dropped_fraction: f64,
    /// Options of later cases: known here only so that one that does not exist yet can be named.
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

impl Case {
    fn config(&self) -> Result<MoeFeedForwardConfig, Box<dyn Error>> {
        let missing =
            |option: &str, value: &str| Err(format!("the case needs `{option}` = {value}, which does not exist yet").into());
        let known = ["padding_tokens"];
        let off = |value: &serde_json::Value| value.is_null() || value == false || value.as_f64() == Some(0.0);
        if let Some((option, value)) = self.rest.iter().find(|(option, value)| !known.contains(&option.as_str()) && !off(value)) {
            return missing(option, &value.to_string());
        }
        let normalization = match self.gate_normalization.as_str() {
            "none" => GateNormalization::None,
            "before_drop" => GateNormalization::BeforeDrop,
            "after_drop" => GateNormalization::AfterDrop,
            other => return missing("gate_normalization", other),
        };
        let activation = match self.activation.as_str() {
            "gelu" => Activation::Gelu,
            "quick_gelu" => Activation::QuickGelu,
            "relu" => Activation::Relu,
            "silu" => Activation::Silu,
            other => return missing("activation", other),
        };
        let fill_order = match self.fill_order.as_str() {
            "choice_major" => FillOrder::ChoiceMajor,
            "token_major" => FillOrder::TokenMajor,
            "batch_priority" => FillOrder::BatchPriority,
            other => return missing("fill_order", other),
        };
        let capacity = Capacity::Fixed(self.slots);
        let assignment: AssignmentConfig = match self.policy.as_str() {
            "token_choice" => TokenChoiceConfig::new()
                .with_top_k(self.top_k)
                .with_gate_normalization(normalization)
                .with_fill_order(fill_order)
                .with_training_capacity(capacity)
                .with_inference_capacity(capacity)
                .into(),
            "expert_choice" => ExpertChoiceConfig::new().with_capacity(capacity).into(),
            other => return missing("policy", other),
        };
        let config = MoeFeedForwardConfig::new(self.d_model, self.d_ff, self.num_experts)
            .with_assignment(assignment)
            .with_experts(ExpertOptions::new().with_activation(activation));
        config.validate()?;
        Ok(config)
    }
}

fn layer_case(folder: &Path, device: &Device, errors: &mut Errors) -> Result<(), Box<dyn Error>> {
    let case: Case = serde_json::from_str(&fs::read_to_string(folder.join("case.json"))?)?;
    let config = case.config()?;
    let reference = Reference::read(&folder.join("case.safetensors"))?;
    let device = device.clone().autodiff();
    let (t, d, e, f) = (case.num_tokens, case.d_model, case.num_experts, case.d_ff);

    let mut moe = config.init(&device);
    let bias = |name: &str, width| -> Result<_, Box<dyn Error>> {
        Ok(Some(Param::from_tensor(reference.tensor(name, [e, width], &device)?)))
    };
    moe.router.weight = Param::from_tensor(reference.tensor("router_weight", [d, e], &device)?);
    moe.experts.w_in = Param::from_tensor(reference.tensor("w_in", [e, d, f], &device)?);
    moe.experts.w_out = Param::from_tensor(reference.tensor("w_out", [e, f, d], &device)?);
    moe.experts.b_in = bias("b_in", f)?;
    moe.experts.b_out = bias("b_out", d)?;

    let tokens = reference.tensor("tokens", [t, d], &device)?.require_grad();
    let valid: Vec<bool> = reference.values("valid")?.iter().map(|v| *v != 0.0).collect();
    let mask = Tensor::<1, Bool>::from_data(TensorData::new(valid.clone(), [t]), &device);
    let mut input = MoeInput::new(tokens.clone()).valid(mask);
    if case.protected_tokens > 0 {
        let protected: Vec<bool> = reference.values("protected")?.iter().map(|v| *v != 0.0).collect();
        input = input.protected(Tensor::<1, Bool>::from_data(TensorData::new(protected, [t]), &device));
    }
    let result = moe.forward(input);
    let routing = &result.routing;
    let (router, plan) = (&routing.router, &routing.plan);

    // What the router says of padding is of no consequence.
    let of_valid = |flat: &[f64]| -> Vec<f64> {
        flat.chunks(e).zip(&valid).filter(|(_, valid)| **valid).flat_map(|(row, _)| row.to_vec()).collect()
    };
    for (name, found) in [("logits", &router.logits), ("probs", &router.probs)] {
        errors.check(name, &of_valid(&values(found.clone())), &of_valid(reference.values(name)?), FORWARD);
    }
    let mut gates = vec![0.0; t * e];
    let row_expert = plan.row_expert();
    for (choice, (row, gate)) in plan.choice_row().iter().zip(values(plan.gates())).enumerate() {
        if let Ok(row) = usize::try_from(*row) {
            gates[choice / plan.num_choices() * e + row_expert[row]] = gate;
        }
    }
    errors.check("gates", &gates, reference.values("gates")?, FORWARD);
    let mut slot_token = vec![-1.0; e * case.slots];
    for expert in 0..e {
        for (slot, row) in (plan.offsets()[expert]..plan.offsets()[expert + 1]).enumerate() {
            slot_token[expert * case.slots + slot] = f64::from(plan.row_token()[row]);
        }
    }
    errors.check("slot_token", &slot_token, reference.values("slot_token")?, 0.0);
    errors.check_tensor("output", result.output.clone(), reference.values("output")?, FORWARD);

    let (balance, z) = (load_balancing_loss(routing), router_z_loss(routing));
    let stats = RoutingStats::new(routing);
    errors.check_tensor("load_balancing_loss", balance.clone(), &[case.load_balancing_loss], FORWARD);
    errors.check_tensor("router_z_loss", z.clone(), &[case.router_z_loss], FORWARD);
    if let Some(expected) = case.importance_loss {
        errors.check_tensor("importance_loss", importance_loss(routing), &[expected], FORWARD);
    }
    if let Some(expected) = case.entropy_of_mean {
        // The global entropy loss is ln E − H of the mean, as H never exceeds ln E.
        let found = (e as f64).ln() - values(global_entropy_loss(routing, e as f64))[0];
        errors.check("entropy_of_mean", &[found], &[expected], FORWARD);
    }
    errors.check("mean_token_entropy", &[stats.entropy], &[case.mean_token_entropy], FORWARD);
    errors.check("dropped_fraction", &[stats.dropped], &[case.dropped_fraction], FORWARD);

    let cotangent = reference.tensor("cotangent", [t, d], &device)?;
    let gradients = ((result.output * cotangent).sum() + balance + z).backward();
    let missing = |name: &str| format!("no gradient reached `{name}`");
    let grad = |p: &Param<Tensor<2>>, name| p.grad(&gradients).ok_or_else(|| missing(name));
    let grad3 = |p: &Param<Tensor<3>>, name| p.grad(&gradients).ok_or_else(|| missing(name));
    let experts = &moe.experts;
    let (b_in, b_out) = (experts.b_in.as_ref().expect("set above"), experts.b_out.as_ref().expect("set above"));
    let grad_tokens = tokens.grad(&gradients).ok_or_else(|| missing("tokens"))?;
    errors.check_tensor("grad_tokens", grad_tokens, reference.values("grad_tokens")?, GRADIENT);
    for (name, found) in [
        ("grad_router_weight", values(grad(&moe.router.weight, "router_weight")?)),
        ("grad_w_in", values(grad3(&experts.w_in, "w_in")?)),
        ("grad_b_in", values(grad(b_in, "b_in")?)),
        ("grad_w_out", values(grad3(&experts.w_out, "w_out")?)),
        ("grad_b_out", values(grad(b_out, "b_out")?)),
    ] {
        errors.check(name, &found, reference.values(name)?, GRADIENT);
    }
    Ok(())
}

/// The MoE layers of a language model: outputs, and the gradient of the input.
fn language_model_case(folder: &Path, reference: &Reference, device: &Device, errors: &mut Errors) -> Result<(), Box<dyn Error>> {
    let checkpoint = MoeCheckpoint::open(folder)?;
    let device = device.clone().autodiff();
    for layer in reference.0.keys().filter_map(|name| name.strip_suffix(INPUT)) {
        let block = layer.split("layers.").nth(1).and_then(|rest| rest.split('.').next()?.parse().ok());
        let block = block.ok_or_else(|| format!("`{layer}` names no block, as `layers.0` would"))?;
        let mut moe = checkpoint.load_layer(block, &device)?;
        // The reference is of inference, and gradients are of training, which would draw it.
        moe.router.jitter = 0.0;
        let named = |what: &str| format!("{layer}.{what}");
        let shape = reference.shape::<3>(&named("input"))?;
        let input = reference.tensor(&named("input"), shape, &device)?.require_grad();
        let output = moe.forward(input.clone()).output;
        let loss = (output.clone() * reference.tensor(&named("cotangent"), shape, &device)?).sum();
        errors.check_tensor(&named("output"), output, reference.values(&named("output"))?, FORWARD / 10.0);
        let gradient = input.grad(&loss.backward()).ok_or("no gradient reached the input")?;
        errors.check_tensor(&named("grad_input"), gradient, reference.values(&named("grad_input"))?, GRADIENT / 10.0);
    }
    Ok(())
}

fn clip_case(folder: &Path, device: &Device, errors: &mut Errors) -> Result<(), Box<dyn Error>> {
    let reference = Reference::read(&folder.join("reference.safetensors"))?;
    let tolerance = if folder.join("moevie_config.json").is_file() { FORWARD / 10.0 } else { FORWARD };
    let model = ClipCheckpoint::load(folder, device)?.model.valid();
    let images = reference.tensor("pixel_values", reference.shape::<4>("pixel_values")?, device)?;
    let shape = reference.shape::<2>("input_ids")?;
    let ids: Vec<i64> = reference.values("input_ids")?.iter().map(|v| *v as i64).collect();
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(ids, shape), device);

    let output = model.forward(images.clone(), tokens.clone());
    errors.check_tensor("image_embeds", output.image_embeds, reference.values("image_embeds")?, tolerance);
    errors.check_tensor("text_embeds", output.text_embeds, reference.values("text_embeds")?, tolerance);
    errors.check_tensor("logits_per_image", output.logits_per_image, reference.values("logits_per_image")?, tolerance);
    // open_clip has no name for these.
    if reference.0.contains_key("vision_last_hidden") {
        let hidden = model.encode_image(images.clone()).hidden;
        errors.check_tensor("vision_last_hidden", hidden, reference.values("vision_last_hidden")?, tolerance);
    }
    if reference.0.contains_key("text_last_hidden") {
        let hidden = model.encode_text(tokens).hidden;
        errors.check_tensor("text_last_hidden", hidden, reference.values("text_last_hidden")?, tolerance);
    }
    // Of a MoE-ViE.
    if reference.0.contains_key("image_features") {
        let features = model.encode_image(images).embedding;
        errors.check_tensor("image_features", features, reference.values("image_features")?, tolerance);
    }
    for path in reference.0.keys().filter_map(|name| name.strip_suffix(".mlp.moe.input")) {
        let name = format!("{path}.mlp.moe");
        let (tower, index) = path.rsplit_once(".resblocks.").ok_or_else(|| format!("`{name}` is in no block"))?;
        let encoder = if tower.starts_with("visual") { &model.vision.encoder } else { &model.text.encoder };
        let block = encoder.blocks.get(index.parse::<usize>()?);
        let Some(FeedForward::Moe(moe)) = block.map(|block| &block.feed_forward) else {
            return Err(format!("`{name}` is in the reference, and that block has no experts to choose").into());
        };
        let input = format!("{name}.input");
        let output = moe.forward(reference.tensor(&input, reference.shape::<3>(&input)?, device)?).output;
        errors.check_tensor(&format!("block {index}"), output, reference.values(&format!("{name}.output"))?, tolerance);
    }
    Ok(())
}
