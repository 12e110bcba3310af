//! Turning a trained dense model into a sparse one that computes the same, and back.
//!
//! Sparse Upcycling ([arXiv 2212.05055](https://arxiv.org/abs/2212.05055)), and CLIP-UP
//! ([arXiv 2502.00965](https://arxiv.org/abs/2502.00965)) for the recipe on CLIP.

#[cfg(feature = "clip")]
mod clip;
mod dense;
mod error;
mod layer;
mod reduce;
mod report;
mod strategy;
mod transformer;

pub use dense::{DenseFeedForward, DenseWeights};
pub use error::UpcycleError;
pub use reduce::{Reduced, Reduction, ReductionReport, expert_similarity};
pub use report::{UpcycleReport, UpcycledLayer};

use burn::tensor::{Bool, Int, Tensor};
use serde::{Deserialize, Serialize};

/// Takes over the weights of a trained dense module.
///
/// `self` is a freshly made sparse module (its router, normal with std 0.02, stays but for [`UpcycleStrategy::Granular`]); what it
/// shares with the dense one is copied, and experts are made from the dense feed-forward network, biases included, by the
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
    /// # Ok::<(), burn_moe::UpcycleError>(())
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
}

/// A batch on which a dense and a sparse model are compared.
#[derive(Clone, Debug)]
pub enum Probe {
    /// For a layer, a block or an encoder.
    Tokens {
        /// `[B, N, D]`
        tokens: Tensor<3>,
        /// `[B, N]`, false for padding. For an encoder, leave it out: its tokens look at padding here, and padding differs.
        valid: Option<Tensor<2, Bool>>,
    },
    /// For a CLIP.
    ImagesAndTexts {
        /// `[B, channels, image_size, image_size]`
        images: Tensor<4>,
        /// `[B, N]` token ids.
        tokens: Tensor<2, Int>,
    },
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

    /// The probe's tokens, for a module that takes tokens.
    fn probe_tokens(&self) -> Result<Option<ProbeTokens>, UpcycleError> {
        match &self.probe {
            None => Ok(None),
            Some(Probe::Tokens { tokens, valid }) => Ok(Some((tokens.clone(), valid.clone()))),
            Some(Probe::ImagesAndTexts { .. }) => Err(UpcycleError::Probe { expected: "tokens", found: "images and texts" }),
        }
    }
}
