//! The command line.

use std::{error::Error, path::PathBuf};

use burn::tensor::Device;
use burn_moe::{
    Capacity, LoraOptions, TokenChoiceConfig,
    clip::{
        ClipConfig, SparseClipConfig,
        lists::{Columns, ListOptions},
        preprocess::RandomCropConfig,
    },
    train::{OptimizerConfig, RateFactors, Tower, TrainConfig, TrainPrecision, WarmupCosine, stream::is_tar},
    transformer::{BlockSelection, RoutedLayerConfig, SparseEncoderConfig},
};
use clap::{Parser, ValueEnum};

use super::support::device_by_name;

#[derive(Parser)]
#[command(
    about = "Upcycles a CLIP and trains it on data of any size",
    after_help = "Example: train --dense clip-vit-base-patch16 --data 'shards/{00000..01242}.tar' --samples 10M --batch-size 4096 --micro-batch 64 --eval karpathy:dataset_coco.json --eval-images coco --out run\nThe same command again goes on where the run was stopped."
)]
pub(crate) struct Args {
    /// Folder of the run: its log, report, checkpoints and model
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// Only make the report of the run in --out, which may be going on
    #[arg(long)]
    pub(crate) report: bool,
    /// The checkpoint to start from: Hugging Face, open_clip or sparse. A sparse one is trained as it is
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-emoji"))]
    pub(crate) dense: PathBuf,
    /// Train the dense model as it is, without upcycling
    #[arg(long)]
    pub(crate) keep_dense: bool,
    /// Freeze the model and train low-rank adapters of this rank: on attention, feed-forward networks and each expert
    #[arg(long, value_name = "RANK")]
    lora: Option<usize>,
    /// The change by adapters is multiplied by this over their rank [default: twice the rank]
    #[arg(long, requires = "lora")]
    lora_alpha: Option<f64>,
    /// What to train on: tar shards ('shards/{000..012}.tar'), a folder of them, a list, a folder of images with a .txt beside each, or - for a tar
    /// archive on standard input; shards may be named several times
    #[arg(long, required_unless_present = "report")]
    pub(crate) data: Vec<String>,
    /// Folder of the images of a list, if it is another than the one that the list is in
    #[arg(long)]
    pub(crate) images: Option<PathBuf>,
    /// The split of a list that holds several: train, val, test, …, or all
    #[arg(long)]
    split: Option<String>,
    /// The column of images of a list, where it has no usual name
    #[arg(long)]
    image_column: Option<String>,
    /// A column of captions, where it has no usual name; may be given several times
    #[arg(long = "caption-column")]
    caption_columns: Vec<String>,
    /// How many samples to train on, in all: 10M, 500k or 3G
    #[arg(long, required_unless_present = "report", default_value = "0", hide_default_value = true)]
    samples: String,
    /// Pairs in a batch, of all ranks
    #[arg(long, visible_alias = "batch", default_value_t = 256)]
    pub(crate) batch_size: usize,
    /// Pairs that a rank computes at a time; all of its part unless given
    #[arg(long)]
    pub(crate) micro_batch: Option<usize>,
    /// Size of the shuffle window: each sample is drawn at random from the so many that come next
    #[arg(long, default_value_t = 16_384)]
    pub(crate) shuffle: usize,
    /// Least share of an image's area that is seen in training; 1 for what the model sees at inference
    #[arg(long, default_value_t = 0.9)]
    least_area: f64,
    /// Leave images as the camera stored them, instead of turning them the right way up
    #[arg(long)]
    pub(crate) as_stored: bool,
    /// Threads of each rank that read and decode; 0: as many as the machine has cores
    #[arg(long, default_value_t = 0)]
    pub(crate) workers: usize,
    /// Only read the samples, and say how fast that is
    #[arg(long)]
    pub(crate) load_only: bool,
    /// What to evaluate on: a list, `karpathy:` and one of Karpathy's lists for its test split, or tar shards
    #[arg(long)]
    pub(crate) eval: Option<String>,
    /// Folder of the images of --eval, if it is another than the one that the list is in
    #[arg(long)]
    pub(crate) eval_images: Option<PathBuf>,
    /// The split of --eval
    #[arg(long)]
    pub(crate) eval_split: Option<String>,
    /// Steps between evaluations
    #[arg(long, visible_alias = "eval-every", default_value_t = 1000)]
    pub(crate) every: usize,
    /// Steps between checkpoints; as between evaluations unless given
    #[arg(long)]
    checkpoint_every: Option<usize>,
    /// How many of the last checkpoints are kept
    #[arg(long, default_value_t = 2)]
    pub(crate) keep: usize,
    /// Begin anew in a folder that holds another run, whose checkpoints and models are lost; leave it out to resume the new one
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Steps between lines of the log
    #[arg(long, default_value_t = 10)]
    pub(crate) log_every: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-5)]
    lr: f64,
    /// Steps until it is reached
    #[arg(long, default_value_t = 100)]
    warmup: usize,
    /// Learning rate of the vision tower, over --lr [default: 1]
    #[arg(long)]
    vision_rate: Option<f64>,
    /// Learning rate of the text tower, over --lr [default: 1]
    #[arg(long)]
    text_rate: Option<f64>,
    /// Learning rate of the routers, over --lr; that of their tower unless given
    #[arg(long)]
    router_rate: Option<f64>,
    /// Weight decay, times the learning rate at each step
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f32,
    /// The largest norm of all gradients together; larger ones are scaled down
    #[arg(long)]
    clip_norm: Option<f64>,
    /// Keep an average of the weights, of which so much stays at each step (0.9999; less in the first steps). It is evaluated, and is the model at
    /// the end; the weights themselves are then in `model-last`
    #[arg(long)]
    average: Option<f64>,
    /// A tower that stays as it is; `vision` (or `image`) is LiT. It does not become sparse
    #[arg(long)]
    freeze: Option<Frozen>,
    /// Share of the patches of each image that training does not look at
    #[arg(long, default_value_t = 0.0)]
    pub(crate) patch_dropout: f64,
    /// What passes are computed with: f32 or bf16
    #[arg(long, default_value = "f32")]
    precision: Numbers,
    /// Keep only what goes into each block, and compute the block again in the backward pass: less memory, longer steps
    #[arg(long)]
    pub(crate) gradient_checkpointing: bool,
    /// Of a dense checkpoint, which blocks become sparse: every N-th [default: 2]
    #[arg(long, conflicts_with = "keep_dense")]
    sparse_every: Option<usize>,
    /// Of a dense checkpoint, experts of each sparse block [default: 8]
    #[arg(long, conflicts_with = "keep_dense")]
    experts: Option<usize>,
    /// Of a dense checkpoint, experts of each token [default: 2]
    #[arg(long, conflicts_with = "keep_dense")]
    top_k: Option<usize>,
    /// Of a dense checkpoint, slots per expert in training, over an even share of all choices of a micro-batch: 1 holds a perfectly even load; without
    /// it there is no limit, and nothing is dropped
    #[arg(long, conflicts_with = "keep_dense")]
    capacity: Option<f64>,
    /// Side of the images in pixels, if it should be another than the checkpoint's
    #[arg(long)]
    pub(crate) image_size: Option<usize>,
    /// Decides routers, order and parts of images
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Numbers of the devices, 0-7 or 0,2: a rank trains on each. Of the CPU, numbers only count threads
    #[arg(long, default_value = "0")]
    devices: String,
    /// Sum the gradients of several CUDA cards of this machine by NVIDIA's NCCL instead of in the host's memory; NCCL must be installed. Not yet tried
    /// on more than one card
    #[arg(long)]
    pub(crate) nccl: bool,
    /// This process is one of several, started by mpirun (needs the cargo feature mpi)
    #[arg(long)]
    pub(crate) mpi: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Frozen {
    #[value(alias = "image")]
    Vision,
    Text,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Numbers {
    F32,
    Bf16,
}

impl Args {
    pub(crate) fn checkpoint_every(&self) -> usize {
        self.checkpoint_every.unwrap_or(self.every)
    }

    pub(crate) fn list_options(&self) -> ListOptions {
        let columns = Columns { image: self.image_column.clone(), captions: self.caption_columns.clone() };
        ListOptions { columns, split: self.split.clone() }
    }

    pub(crate) fn frozen(&self) -> Option<Tower> {
        self.freeze.map(|tower| if tower == Frozen::Vision { Tower::Vision } else { Tower::Text })
    }

    pub(crate) fn lora(&self) -> Result<Option<LoraOptions>, Box<dyn Error>> {
        let Some(rank) = self.lora else { return Ok(None) };
        let options = LoraOptions::new().with_rank(rank).with_alpha(self.lora_alpha.unwrap_or(2.0 * rank as f64));
        options.validate()?;
        Ok(Some(options))
    }

    pub(crate) fn crop(&self) -> Result<Option<RandomCropConfig>, Box<dyn Error>> {
        let crop = RandomCropConfig::new().with_area([self.least_area, 1.0]);
        crop.validate()?;
        Ok((self.least_area < 1.0).then_some(crop))
    }

    pub(crate) fn optimizer(&self) -> OptimizerConfig {
        let [vision, text] = [self.vision_rate, self.text_rate].map(|rate| rate.unwrap_or(1.0));
        let rates = RateFactors::new().with_vision(vision).with_text(text).with_router(self.router_rate);
        OptimizerConfig::new(WarmupCosine::new(self.lr).with_warmup_steps(self.warmup))
            .with_weight_decay(self.weight_decay)
            .with_clip_norm(self.clip_norm)
            .with_average(self.average)
            .with_rates(rates)
    }

    pub(crate) fn sparse_config(&self, dense: &ClipConfig) -> Result<ClipConfig, Box<dyn Error>> {
        let capacity = self.capacity.map_or(Capacity::Dropless, Capacity::OfBalancedLoad);
        let tokens = TokenChoiceConfig::new().with_top_k(self.top_k.unwrap_or(2)).with_training_capacity(capacity);
        let experts = SparseEncoderConfig::new()
            .with_blocks(BlockSelection::EveryNth(self.sparse_every.unwrap_or(2)))
            .with_num_experts(self.experts.unwrap_or(8))
            .with_layer(RoutedLayerConfig::new().with_assignment(tokens.into()).into());
        let tower = |tower| (self.freeze != Some(tower)).then(|| experts.clone());
        let sparse = SparseClipConfig::new().with_vision(tower(Frozen::Vision)).with_text(tower(Frozen::Text));
        let config = dense.clone().sparse(sparse);
        config.validate()?;
        Ok(config)
    }

    /// Refuses options for upcycling with a checkpoint that is sparse already.
    pub(crate) fn check_sparse(&self) -> Result<(), Box<dyn Error>> {
        let named = [
            ("--sparse-every", self.sparse_every.is_some()),
            ("--experts", self.experts.is_some()),
            ("--top-k", self.top_k.is_some()),
            ("--capacity", self.capacity.is_some()),
            ("--keep-dense", self.keep_dense),
        ];
        match named.into_iter().find(|(_, is_named)| *is_named) {
            Some((name, _)) => {
                let folder = self.dense.display();
                Err(format!("{name} is about a dense checkpoint, and {folder} is sparse: it is trained as it is").into())
            }
            None => Ok(()),
        }
    }

    /// The run, but for its data.
    pub(crate) fn config(&self) -> Result<TrainConfig, Box<dyn Error>> {
        let precision = if self.precision == Numbers::Bf16 { TrainPrecision::Bf16 } else { TrainPrecision::F32 };
        Ok(TrainConfig::new(self.steps()?)
            .with_micro_batch(self.micro_batch)
            .with_eval_every(self.every)
            .with_seed(self.seed)
            .with_patch_dropout(self.patch_dropout)
            .with_recompute_blocks(self.gradient_checkpointing)
            .with_precision(precision))
    }

    /// Steps of the whole run.
    pub(crate) fn steps(&self) -> Result<usize, Box<dyn Error>> {
        let text = self.samples.trim();
        let wrong = || format!("--samples {text}: expected a number such as 500000, 500k, 10M or 3G");
        let (digits, factor) = match text.char_indices().last() {
            Some((end, 'k' | 'K')) => (&text[..end], 1e3),
            Some((end, 'm' | 'M')) => (&text[..end], 1e6),
            Some((end, 'g' | 'G' | 'b' | 'B')) => (&text[..end], 1e9),
            _ => (text, 1.0),
        };
        let samples = digits.parse::<f64>().map_err(|_| wrong())? * factor;
        if !(1.0..1e15).contains(&samples) {
            return Err(wrong().into());
        }
        Ok((samples as usize).div_ceil(self.batch_size.max(1)))
    }

    /// Whether the data is a list of images and captions.
    pub(crate) fn names_list(&self) -> bool {
        self.data.iter().any(|name| is_list(name))
    }

    /// Refuses numbers that cannot be used, and options that would do nothing, before anything is read.
    pub(crate) fn check(&self) -> Result<(), Box<dyn Error>> {
        let has_list_options = self.images.is_some() || self.list_options() != ListOptions::default();
        if let [only] = &self.data[..]
            && has_list_options
            && !PathBuf::from(only).exists()
            && only != "-"
            && !is_tar(only)
        {
            return Err(format!("{only}: there is no such file").into());
        }
        if has_list_options && !self.names_list() {
            return Err("--images, --split, --image-column and --caption-column are about a list, and --data names none".into());
        }
        let eval = self.eval.as_deref().unwrap_or_default();
        if self.eval_split.is_some() && !is_list(eval) {
            return Err("--eval-split is about a list, and --eval names none (`karpathy:` takes the test split)".into());
        }
        if self.eval_images.is_some() && !is_list(eval.strip_prefix("karpathy:").unwrap_or(eval)) {
            return Err("--eval-images is the folder of a list's images, and --eval names no list".into());
        }
        if self.every == 0 || self.checkpoint_every() == 0 || self.keep == 0 || self.batch_size == 0 || self.shuffle == 0 {
            return Err("--every, --checkpoint-every, --keep, --batch-size and --shuffle are at least 1".into());
        }
        self.config()?.validate()?;
        self.optimizer().validate()?;
        self.crop()?;
        self.lora()?;
        if self.lora.is_some() && self.router_rate.is_some() {
            return Err("--router-rate is about routers, which --lora freezes".into());
        }
        if self.keep_dense && self.router_rate.is_some() {
            return Err("--router-rate is about routers, and --keep-dense makes none".into());
        }
        for (tower, name, rate) in [(Frozen::Vision, "vision", self.vision_rate), (Frozen::Text, "text", self.text_rate)] {
            if self.freeze == Some(tower) && rate.is_some() {
                return Err(format!("--{name}-rate is about the tower that --freeze {name} leaves as it is").into());
            }
        }
        if self.nccl && (self.device != "cuda" || self.mpi || self.device_numbers()?.len() < 2) {
            return Err("--nccl is for several cards of this machine: --device cuda --devices 0-7".into());
        }
        if self.data.iter().any(|name| name == "-") && self.shuffle > 4096 {
            eprintln!("note: {} samples of standard input wait in memory; --shuffle takes fewer", self.shuffle);
        }
        Ok(())
    }

    /// The device of a process that MPI started: one for each process of a machine.
    #[cfg(feature = "mpi")]
    pub(crate) fn device_of_process(&self, devices: &[Device]) -> Result<Device, String> {
        let names = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID", "PMI_LOCAL_RANK"];
        let place = names.iter().find_map(|name| std::env::var(name).ok()?.parse::<usize>().ok());
        match place {
            _ if self.device == "cpu" => Ok(devices[0].clone()),
            Some(place) if place < devices.len() => Ok(devices[place].clone()),
            Some(place) => {
                Err(format!("process {place} of this machine has no device: name one for each process with --devices, such as 0-7"))
            }
            None => Err(format!("which process of its machine this is cannot be told: none of {} is set", names.join(", "))),
        }
    }

    /// The devices of this process.
    pub(crate) fn devices(&self) -> Result<Vec<Device>, Box<dyn Error>> {
        self.device_numbers()?.into_iter().map(|number| device_number(&self.device, number)).collect()
    }

    fn device_numbers(&self) -> Result<Vec<usize>, String> {
        let wrong = || format!("--devices {}: expected numbers such as 0, 0-7 or 0,2, each once", self.devices);
        let mut numbers = Vec::new();
        for part in self.devices.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
            let (first, last) = (number(first)?, number(last)?);
            if first > last || last - first > 1024 || numbers.iter().any(|number| (first..=last).contains(number)) {
                return Err(wrong());
            }
            numbers.extend(first..=last);
        }
        Ok(numbers)
    }
}

fn is_list(name: &str) -> bool {
    PathBuf::from(name).is_file() && !is_tar(name)
}

/// One of several devices of a kind.
pub(crate) fn device_number(name: &str, number: usize) -> Result<Device, Box<dyn Error>> {
    let first = device_by_name(name)?;
    match name {
        "cpu" => Ok(first),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(number)),
        _ if number == 0 => Ok(first),
        _ => Err(format!("of `{name}`, only device 0 can be named").into()),
    }
}
