//! One sparse model from several dense ones.

mod average;
mod layer;
mod models;

pub(super) use layer::{OnlyModel, copy_many, experts_per_model};

use serde::{Deserialize, Serialize};

use super::{Probe, UpcycleError, Upcycled};

/// Takes over the feed-forward networks of several dense modules as experts.
///
/// `self` is a new sparse module, and the dense modules have one architecture: models that were trained from a common one, each on its own data
/// or with its own loss. Of the `E` experts of a sparse layer, the first `E / n` are copies, biases included, of the feed-forward network of the
/// first of `n` models, the next of the second, and so on. Everything else is from the first model or the mean of all, by [`Rest`]; routers
/// are kept or made of directions of each model's data, by [`RouterStart`].
///
/// The result computes what one of the models computes only where tokens pass experts of that model alone and the rest is that model's, too;
/// [`UpcycledModel`](super::UpcycledModel) says how far it is from each. If all models are the same, it computes what they compute, as long as
/// gates sum to one and nothing is dropped.
///
/// Papers: Branch-Train-MiX ([arXiv 2403.07816](https://arxiv.org/abs/2403.07816), section 3.2), CLIP-MoE
/// ([arXiv 2409.19291](https://arxiv.org/abs/2409.19291)), whose models share all but their feed-forward networks.
pub trait UpcycleFromMany<Dense: ?Sized>: Sized {
    /// The sparse module with the feed-forward networks of the dense ones.
    ///
    /// ```
    /// # use burn::tensor::Device;
    /// # use burn_moe::{MoeFeedForwardConfig, transformer::MlpConfig};
    /// use burn_moe::upcycle::{UpcycleFromMany, UpcycleManyOptions};
    /// # let device = Device::default();
    /// let (photos, drawings) = (MlpConfig::new(16, 64).init(&device), MlpConfig::new(16, 64).init(&device));
    /// let sparse = MoeFeedForwardConfig::new(16, 64, 4).init(&device); // experts 0 and 1 of photos, 2 and 3 of drawings
    /// let upcycled = sparse.upcycle_from_many(&[&photos, &drawings], &UpcycleManyOptions::default())?;
    /// # assert_eq!(upcycled.report.models.len(), 2);
    /// # Ok::<(), burn_moe::upcycle::UpcycleError>(())
    /// ```
    ///
    /// # Errors
    /// When there is no dense module, when `E` of a sparse layer is no multiple of their number, when one of them does not fit the sparse module or,
    /// to be averaged, the first (the error names it, counted from 0), and when probes are missing or do not fit. Nothing is changed then; `self`
    /// is gone, and can be made again from its configuration.
    fn upcycle_from_many(self, dense: &[&Dense], options: &UpcycleManyOptions) -> Result<Upcycled<Self>, UpcycleError>;
}

/// How to upcycle from several dense modules.
#[derive(Clone, Debug, Default)]
pub struct UpcycleManyOptions {
    /// Where everything but experts and routers comes from. Default: the first model
    pub rest: Rest,
    /// What routers start from. Default: they are kept
    pub router: RouterStart,
    /// For each model, in their order, a batch that represents its data: for a layer, tokens that the model's network reads; for an encoder, a
    /// tower or a CLIP, its inputs. Each model is compared with the result on its own batch, and [`RouterStart::Centroids`] is computed from
    /// them. Default: none, and the report has no deviations
    pub probes: Vec<Probe>,
}

/// Where everything but the experts and the routers comes from: attention, norms, embeddings, projections, and the feed-forward networks of blocks
/// that stay dense. A single layer has none of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rest {
    /// From the first model: for models that share it, or one that the others were trained from.
    #[default]
    First,
    /// Each parameter is the mean of those of all models, as in Branch-Train-MiX.
    Average,
}

/// What the routers start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RouterStart {
    /// What they are: those of a new module are random and small.
    #[default]
    Kept,
    /// The column of an expert is the mean direction, of length 1, of the valid tokens that its model's own feed-forward network reads on that
    /// model's [probe](UpcycleManyOptions::probes): tokens go to the models whose data they are like. The experts of one model must not have equal
    /// columns, which would tie: if there are several, the tokens are clustered by their direction, and each expert gets the direction of one
    /// cluster, as with [`UpcycleStrategy::ClusterAware`](super::UpcycleStrategy::ClusterAware).
    Centroids,
}

impl UpcycleManyOptions {
    /// Options with another source of everything but the experts.
    pub fn with_rest(mut self, rest: Rest) -> Self {
        self.rest = rest;
        self
    }

    /// Options with another start of the routers.
    pub fn with_router(mut self, router: RouterStart) -> Self {
        self.router = router;
        self
    }

    /// Options with a batch for each model.
    pub fn with_probes(mut self, probes: Vec<Probe>) -> Self {
        self.probes = probes;
        self
    }

    /// Refuses what does not fit so many models.
    fn check(&self, models: usize) -> Result<(), UpcycleError> {
        let probes = self.probes.len();
        if models == 0 {
            return Err(UpcycleError::models("there are none"));
        }
        if probes == 0 && self.router == RouterStart::Centroids {
            return Err(UpcycleError::models("centroids need a probe for each model, and there are none"));
        }
        if probes != 0 && probes != models {
            return Err(UpcycleError::models(format!("there are {models} models and {probes} probes, not one for each model")));
        }
        Ok(())
    }
}
