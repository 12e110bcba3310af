//! Turning a trained dense model into a sparse one that computes the same, and back; or several dense models into one sparse model.
//!
//! Sparse Upcycling ([arXiv 2212.05055](https://arxiv.org/abs/2212.05055)), and CLIP-UP
//! ([arXiv 2502.00965](https://arxiv.org/abs/2502.00965)) for the recipe on CLIP.

#[cfg(feature = "clip")]
mod clip;
mod cluster;
mod dense;
mod encoders;
mod error;
mod layer;
mod many;
#[cfg(feature = "train")]
mod moments;
mod reduce;
mod report;
mod source;
mod strategy;
mod transformer;

pub use dense::{DenseFeedForward, DenseWeights};
pub use error::UpcycleError;
pub use many::{Rest, RouterStart, UpcycleFromMany, UpcycleManyOptions};
#[cfg(feature = "train")]
pub use moments::{HasBlocks, upcycle_optimizer};
pub use reduce::{Reduced, Reduction, ReductionReport, expert_similarity};
pub use report::{UpcycleReport, UpcycledLayer, UpcycledModel};

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::support::param::placed;

/// Takes over the weights of a trained dense module.
///
/// `self` is a new sparse module. Its router is kept, except with [`UpcycleStrategy::Granular`] and [`UpcycleStrategy::ClusterAware`];
/// parameters that both modules have are copied, and experts are made from the dense feed-forward network, biases included, by the
/// [`UpcycleStrategy`]: copies by default. With copies, gates that sum to one and nothing dropped, which is the default outside of training,
/// the result computes what the dense module computes.
pub trait UpcycleFromDense<Dense>: Sized {
    /// The sparse module with the dense one's weights.
    ///
    /// ```
    /// # use burn::{nn::transformer::PositionWiseFeedForwardConfig, tensor::Device};
    /// # use burn_moe::{MoeFeedForwardConfig, UpcycleFromDense, UpcycleOptions};
    /// # let device = Device::default();
    /// let dense = PositionWiseFeedForwardConfig::new(16, 64).init(&device);
    /// let sparse = MoeFeedForwardConfig::new(16, 64, 8).init(&device);
    /// let upcycled = sparse.upcycle_from_dense(&dense, &UpcycleOptions::default())?;
    /// # assert_eq!(upcycled.report.layers.len(), 1);
    /// # Ok::<(), burn_moe::upcycle::UpcycleError>(())
    /// ```
    ///
    /// # Errors
    /// When the two do not fit: sizes, activations, biases, number of blocks. Nothing is changed then; `self` is gone, and can be
    /// made again from its configuration.
    fn upcycle_from_dense(self, dense: &Dense, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError>;
}

/// How to upcycle.
#[derive(Clone, Debug, Default)]
pub struct UpcycleOptions {
    /// How experts are made from the dense network. Default: copies.
    pub strategy: UpcycleStrategy,
    /// A batch on which both models are compared. Default: none, and the report has no deviation.
    pub probe: Option<Probe>,
    /// A batch that [`UpcycleStrategy::ClusterAware`] clusters; no other strategy reads it. Default: none.
    pub calibration: Option<Probe>,
}

/// How experts are made from the dense network. What is random is drawn on the device of the sparse module, so `device.seed` decides it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UpcycleStrategy {
    /// Every expert is a copy (Komatsuzaki et al., [arXiv 2212.05055](https://arxiv.org/abs/2212.05055)).
    #[default]
    Copy,
    /// Every expert is a copy with normal noise on its two weights, so that experts differ from the start.
    CopyWithNoise {
        /// Standard deviation of the noise, relative to that of the weight it is added to.
        relative_std: f64,
    },
    /// Every expert is a copy of which a share of the hidden units, drawn for each expert, starts anew: their columns of `w_in` and
    /// `b_in` and rows of `w_out` are normal, with the mean and standard deviation of the dense weight (drop-upcycling,
    /// [arXiv 2502.19261](https://arxiv.org/abs/2502.19261), section 3).
    Drop {
        /// Share of the hidden units, from 0 to 1; the paper takes one half.
        ratio: f64,
    },
    /// Every expert is one of `shards` equal parts of the hidden units, and the parts of one dense copy are chosen together: `E` and
    /// `top_k` of the sparse layer are `shards` times larger than for copies and its hidden width that much smaller, so the
    /// operations stay. The part's `w_out` is multiplied by `shards`, as its gate is that much smaller (virtual groups,
    /// [arXiv 2410.07524](https://arxiv.org/abs/2410.07524), section 3.2). Exact for every activation, with normalised gates.
    Granular {
        /// Parts of the hidden units.
        shards: usize,
    },
    /// The valid tokens that the dense network reads on the [calibration batch](UpcycleOptions::calibration) are clustered by their
    /// direction. The router's columns are the unit centroids; each expert is a copy whose two weights keep only the output directions
    /// that matter in its cluster, `W · V · Vᵀ` with `V` the leading right singular vectors of the cluster's data times `W` (cluster-aware
    /// upcycling, [arXiv 2604.13508](https://arxiv.org/abs/2604.13508), without its self-distillation loss).
    ClusterAware {
        /// Share of the squared singular values that is kept, above 0; 1 keeps copies.
        energy: f64,
    },
}

impl std::fmt::Display for UpcycleStrategy {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Copy => f.write_str("copy"),
            Self::CopyWithNoise { relative_std } => write!(f, "copy with noise of {relative_std}"),
            Self::Drop { ratio } => write!(f, "drop of {ratio}"),
            Self::Granular { shards } => write!(f, "granular with {shards} shards"),
            Self::ClusterAware { energy } => write!(f, "cluster-aware with an energy of {energy}"),
        }
    }
}

/// A batch on which a dense and a sparse model are compared, or that experts are made from; on any device.
#[derive(Clone, Debug)]
pub enum Probe {
    /// For a layer, a block or an encoder.
    Tokens {
        /// `[B, N, D]`
        tokens: Tensor<3>,
        /// `[B, N]`, false for padding. `None` for an encoder: its attention does not mask padding here, so that outputs of valid tokens depend on
        /// what padding holds.
        valid: Option<Tensor<2, Bool>>,
    },
    /// For a CLIP.
    ImagesAndTexts {
        /// `[B, channels, image_size, image_size]`
        images: Tensor<4>,
        /// `[B, N]` token ids.
        tokens: Tensor<2, Int>,
    },
    /// For a vision tower, `[B, channels, image_size, image_size]`.
    Images(Tensor<4>),
    /// For a text tower, `[B, N]` token ids.
    Texts(Tensor<2, Int>),
}

/// Tokens and which of them are valid.
type ProbeTokens = (Tensor<3>, Option<Tensor<2, Bool>>);

/// A sparse module and what became of it.
#[derive(Clone, Debug)]
pub struct Upcycled<M> {
    /// The module.
    pub model: M,
    /// What was done.
    pub report: UpcycleReport,
}

impl UpcycleOptions {
    /// Options with a batch to compare on.
    pub fn with_probe(mut self, probe: Probe) -> Self {
        self.probe = Some(probe);
        self
    }

    /// Options with another strategy.
    pub fn with_strategy(mut self, strategy: UpcycleStrategy) -> Self {
        self.strategy = strategy;
        self
    }

    /// Options with a batch to calibrate with.
    pub fn with_calibration(mut self, calibration: Probe) -> Self {
        self.calibration = Some(calibration);
        self
    }

    /// The calibration batch, if the strategy reads it.
    fn calibration_batch(&self) -> Result<Option<&Probe>, UpcycleError> {
        match (self.strategy, &self.calibration) {
            (UpcycleStrategy::ClusterAware { .. }, None) => {
                Err(UpcycleError::Strategy { strategy: self.strategy.to_string(), reason: "it needs a calibration batch".into() })
            }
            (UpcycleStrategy::ClusterAware { .. }, batch) => Ok(batch.as_ref()),
            _ => Ok(None),
        }
    }
}

impl Probe {
    /// The batch of a module that takes tokens of width `d_model`.
    fn tokens(&self, d_model: usize) -> Result<ProbeTokens, UpcycleError> {
        let Self::Tokens { tokens, valid } = self else { return Err(self.is_not("tokens")) };
        let [batch, len, width] = tokens.dims();
        fits("tokens", width == d_model, format!("[B, N, {d_model}]"), &tokens.dims())?;
        if let Some(valid) = valid {
            fits("valid flags", valid.dims() == [batch, len], format!("[{batch}, {len}]"), &valid.dims())?;
        }
        Ok((tokens.clone(), valid.clone()))
    }

    /// The batch where a module is.
    fn on<M: Module>(&self, module: &M) -> Self {
        let devices = module.devices();
        let Some(device) = devices.first() else { return self.clone() };
        match self {
            Self::Tokens { tokens, valid } => {
                let valid = valid.as_ref().map(|valid| placed(valid.clone(), device));
                Self::Tokens { tokens: placed(tokens.clone(), device), valid }
            }
            Self::ImagesAndTexts { images, tokens } => {
                Self::ImagesAndTexts { images: placed(images.clone(), device), tokens: placed(tokens.clone(), device) }
            }
            Self::Images(images) => Self::Images(placed(images.clone(), device)),
            Self::Texts(tokens) => Self::Texts(placed(tokens.clone(), device)),
        }
    }

    /// The batch of a vision tower.
    #[cfg(feature = "clip")]
    fn images(&self, tower: &crate::clip::VisionTower) -> Result<Tensor<4>, UpcycleError> {
        let (Self::Images(images) | Self::ImagesAndTexts { images, .. }) = self else { return Err(self.is_not("images")) };
        let [_, channels, height, width] = images.dims();
        let expected = tower.image_dims();
        fits(
            "images",
            [channels, height, width] == expected,
            format!("[B, {}, {}, {}]", expected[0], expected[1], expected[2]),
            &images.dims(),
        )?;
        Ok(images.clone())
    }

    /// The batch of a text tower.
    #[cfg(feature = "clip")]
    fn texts(&self, tower: &crate::clip::TextTower) -> Result<Tensor<2, Int>, UpcycleError> {
        let (Self::Texts(tokens) | Self::ImagesAndTexts { tokens, .. }) = self else { return Err(self.is_not("texts")) };
        let [context_length, _] = tower.position_embedding.dims();
        fits("token ids", tokens.dims()[1] <= context_length, format!("[B, N], N at most {context_length}"), &tokens.dims())?;
        Ok(tokens.clone())
    }

    fn is_not(&self, expected: &'static str) -> UpcycleError {
        let found = match self {
            Self::Tokens { .. } => "tokens",
            Self::ImagesAndTexts { .. } => "images and texts",
            Self::Images(_) => "images",
            Self::Texts(_) => "texts",
        };
        UpcycleError::Probe { expected, found }
    }
}

/// Outputs with zeros for padding, which rests on different ground in a dense and a sparse block: a sparse one leaves it alone.
fn only_valid(outputs: Tensor<3>, valid: &Option<Tensor<2, Bool>>) -> Tensor<3> {
    match valid {
        None => outputs,
        Some(valid) => outputs.mask_fill(valid.clone().bool_not().unsqueeze_dim::<3>(2), 0.0),
    }
}

/// Tokens and their flags on another device.
fn on_device((tokens, valid): &ProbeTokens, device: &Device) -> ProbeTokens {
    (placed(tokens.clone(), device), valid.as_ref().map(|valid| placed(valid.clone(), device)))
}

/// Refuses a batch of other sizes than the module takes.
fn fits(what: &'static str, is_so: bool, expected: String, found: &[usize]) -> Result<(), UpcycleError> {
    if is_so { Ok(()) } else { Err(UpcycleError::ProbeShape { what, expected, found: found.to_vec() }) }
}

/// The valid tokens alone, `[B, N, D] -> [T, D]`, outside of any graph.
fn valid_rows(tokens: &Tensor<3>, valid: Option<&Tensor<2, Bool>>) -> Tensor<2> {
    let [batch, len, d_model] = tokens.dims();
    let rows = tokens.clone().detach().without_autodiff().reshape([batch * len, d_model]);
    let Some(valid) = valid else { return rows };
    let flags = valid.clone().into_data();
    let kept: Vec<i32> = flags.iter::<bool>().enumerate().filter(|(_, valid)| *valid).map(|(row, _)| row as i32).collect();
    let count = kept.len();
    rows.clone().select(0, Tensor::<1, Int>::from_data(TensorData::new(kept, [count]), &rows.device()))
}
