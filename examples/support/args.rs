//! Options that several examples have, under one name.

use std::{error::Error, path::PathBuf};

use burn::tensor::Device;
use burn_moe::clip::{
    VisionConfig,
    checkpoint::{LoadOptions, Precision},
    lists::{CaptionedImages, Columns, ListOptions},
    preprocess::{ImagePreprocessor, Orientation},
};
use clap::{Args, ValueEnum};

use super::device_by_name;

/// The model and where it runs.
#[derive(Args)]
pub(crate) struct ModelArgs {
    /// Folder of the checkpoint: Hugging Face, open_clip or sparse
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/clip-emoji"))]
    pub(crate) model: PathBuf,
    /// Side of the images in pixels, if it should be another than the checkpoint's: its position embeddings are then interpolated
    #[arg(long)]
    pub(crate) image_size: Option<usize>,
    /// Images or texts in one forward pass
    #[arg(long, alias = "batch", default_value_t = 32)]
    pub(crate) batch_size: usize,
    /// cpu, wgpu, vulkan, metal or cuda (each but cpu needs the cargo feature of its name)
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What the weights of experts, feed-forward networks and attention are packed in, on cpu [default: f32]
    #[arg(long)]
    precision: Option<Stored>,
}

impl ModelArgs {
    pub(crate) fn device(&self) -> Result<Device, Box<dyn Error>> {
        Ok(device_by_name(&self.device)?)
    }

    /// With packed weights, which are for the CPU.
    pub(crate) fn load_options(&self) -> Result<LoadOptions, Box<dyn Error>> {
        let options = LoadOptions::new().with_image_size(self.image_size);
        match (&*self.device, self.precision) {
            #[cfg(feature = "flex")]
            ("cpu", precision) => Ok(options.with_packed(Some(precision.unwrap_or(Stored::F32).into()))),
            (_, None) => Ok(options),
            (device, Some(_)) => {
                Err(format!("--precision is for --device cpu, not {device}: other devices compute in 32 bits").into())
            }
        }
    }
}

/// How images are read.
#[derive(Args)]
pub(crate) struct ImageArgs {
    /// Leave images as the camera stored them, as open_clip and CLIP_benchmark do, instead of turning them the right way up
    #[arg(long)]
    pub(crate) as_stored: bool,
    /// Stop with an error when an image cannot be read, instead of skipping it
    #[arg(long)]
    pub(crate) strict: bool,
}

impl ImageArgs {
    pub(crate) fn preprocessor(&self, vision: &VisionConfig) -> ImagePreprocessor {
        let orientation = if self.as_stored { Orientation::AsStored } else { Orientation::Exif };
        ImagePreprocessor::for_model(vision).with_orientation(orientation)
    }
}

/// How a list of images and captions is read: any kind that `CaptionedImages::read` knows.
#[derive(Args)]
pub(crate) struct ListArgs {
    /// Folder of the images; of a list, if it is another than the one that the list is in
    #[arg(long)]
    pub(crate) images: Option<PathBuf>,
    /// Which split of a list that holds several: train, val, test, …, or all
    #[arg(long, requires = "list")]
    pub(crate) split: Option<String>,
    /// A file with the names of a published split's images, one in every line: only these are read
    #[arg(long, requires = "list")]
    only: Option<PathBuf>,
    /// The column of images, where it has no usual name
    #[arg(long, requires = "list")]
    image_column: Option<String>,
    /// A column of captions, where it has no usual name; may be given several times
    #[arg(long = "caption-column", requires = "list")]
    caption_columns: Vec<String>,
}

impl ListArgs {
    /// The list, and the folder of its images.
    pub(crate) fn read(&self, list: &PathBuf) -> Result<(CaptionedImages, PathBuf), Box<dyn Error>> {
        let columns = Columns { image: self.image_column.clone(), captions: self.caption_columns.clone() };
        let mut found = CaptionedImages::read(list, &ListOptions { columns, split: self.split.clone() })?;
        if let Some(names) = &self.only {
            found.keep_named(names)?;
        }
        let beside = || list.parent().map(PathBuf::from).unwrap_or_default();
        Ok((found, self.images.clone().unwrap_or_else(beside)))
    }
}

/// How the numbers of a checkpoint are stored.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
    Int8,
}

impl From<Stored> for Precision {
    fn from(stored: Stored) -> Self {
        match stored {
            Stored::F32 => Self::F32,
            Stored::F16 => Self::F16,
            Stored::Bf16 => Self::BF16,
            Stored::Int8 => Self::Int8,
        }
    }
}
