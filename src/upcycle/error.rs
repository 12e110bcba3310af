//! Why a dense model cannot be upcycled.

use crate::layer::experts::Activation;

/// A dense and a sparse module that do not fit each other.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum UpcycleError {
    /// A size differs.
    #[error("{at}`{what}` is {dense:?} in the dense module and {sparse:?} in the sparse one")]
    Shape {
        /// Path of the module, empty for the module itself, else with ": " at its end.
        at: String,
        /// What was compared.
        what: &'static str,
        /// Sizes found in the dense module.
        dense: Vec<usize>,
        /// Sizes found in the sparse module.
        sparse: Vec<usize>,
    },
    /// The feed-forward networks have different non-linearities.
    #[error("{at}the dense activation is {dense}{}", experts(*sparse))]
    Activation {
        /// Path of the module.
        at: String,
        /// Found in the dense module.
        dense: String,
        /// Found in the sparse module; `None` where there is none to compare with yet.
        sparse: Option<Activation>,
    },
    /// One has a bias, the other has none.
    #[error("{at}`{what}`: the dense module has {}, the sparse one has {}", bias(*dense), bias(!*dense))]
    Bias {
        /// Path of the module.
        at: String,
        /// Which bias.
        what: &'static str,
        /// Whether the dense module has it.
        dense: bool,
    },
    /// A block that should be dense is sparse already.
    #[error("{at}the module to upcycle from is sparse already")]
    NotDense {
        /// Path of the module.
        at: String,
    },
    /// A strategy that cannot be used here.
    #[error("strategy `{strategy}` is refused: {reason}")]
    Strategy {
        /// The strategy as written.
        strategy: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// One of several dense models does not fit.
    #[error("dense model {model}: {error}")]
    Model {
        /// Which model, counted from 0.
        model: usize,
        /// What does not fit.
        error: Box<UpcycleError>,
    },
    /// Several dense models that cannot become the experts of this module.
    #[error("{at}these dense models cannot be combined: {reason}")]
    Models {
        /// Path of the module.
        at: String,
        /// Why.
        reason: String,
    },
    /// An optimiser's state that cannot be taken over.
    #[error("the optimiser's state{} cannot be taken over: {reason}", of(parameter))]
    OptimizerState {
        /// Path of the parameter, empty for the state as a whole.
        parameter: String,
        /// Why.
        reason: String,
    },
    /// A reduction that cannot be done.
    #[error("reduction `{reduction}` is refused: {reason}")]
    Reduction {
        /// The reduction as written.
        reduction: String,
        /// Why it cannot be done.
        reason: String,
    },
    /// The module to upcycle to has no sparse block.
    #[error("the module to upcycle to has no sparse block: its configuration names none")]
    NotSparse,
    /// A setting that changes what is computed differs.
    #[error("{at}`{what}` is {dense} in the dense module and {sparse} in the sparse one")]
    Setting {
        /// Path of the module.
        at: String,
        /// Which setting.
        what: &'static str,
        /// Found in the dense module.
        dense: String,
        /// Found in the sparse module.
        sparse: String,
    },
    /// The probe is not of the kind that the module takes.
    #[error("the probe holds {found}, but this module takes {expected}")]
    Probe {
        /// What the module takes.
        expected: &'static str,
        /// What the probe holds.
        found: &'static str,
    },
    /// The probe, or the calibration batch, does not have the sizes that the module takes.
    #[error("the {what} of the probe or calibration batch are {found:?}, but this module takes {expected}")]
    ProbeShape {
        /// What was compared.
        what: &'static str,
        /// Sizes that the module takes.
        expected: String,
        /// Sizes of the batch.
        found: Vec<usize>,
    },
    /// Dense weights or outputs on the probe are not finite.
    #[error(transparent)]
    NonFinite(#[from] crate::support::finite::NonFiniteError),
}

fn of(parameter: &str) -> String {
    if parameter.is_empty() { String::new() } else { format!(" of `{parameter}`") }
}

fn experts(activation: Option<Activation>) -> String {
    activation.map_or(String::new(), |activation| format!(", the experts' is {activation:?}"))
}

fn bias(has: bool) -> &'static str {
    if has { "a bias" } else { "no bias" }
}

impl UpcycleError {
    /// The same error, which also names the activation of the experts that were to be made.
    pub(super) fn for_experts(mut self, activation: Activation) -> Self {
        if let Self::Activation { sparse, .. } = &mut self {
            *sparse = Some(activation);
        }
        self
    }

    /// The same error, one module further out.
    pub(super) fn within(mut self, name: &str) -> Self {
        match &mut self {
            Self::Shape { at, .. }
            | Self::Activation { at, .. }
            | Self::Bias { at, .. }
            | Self::Setting { at, .. }
            | Self::Models { at, .. }
            | Self::NotDense { at } => {
                let inner = if at.is_empty() { ": ".to_string() } else { format!(".{at}") };
                *at = format!("{name}{inner}");
            }
            Self::NonFinite(error) => error.tensor = format!("{name}.{}", error.tensor),
            Self::NotSparse
            | Self::Model { .. }
            | Self::Probe { .. }
            | Self::ProbeShape { .. }
            | Self::Strategy { .. }
            | Self::OptimizerState { .. }
            | Self::Reduction { .. } => {}
        }
        self
    }

    /// The same error, which also names one of several dense models, unless it is about all of them.
    pub(super) fn of_model(self, model: usize) -> Self {
        match self {
            Self::Models { .. } => self,
            error => Self::Model { model, error: Box::new(error) },
        }
    }

    pub(super) fn models(reason: impl Into<String>) -> Self {
        Self::Models { at: String::new(), reason: reason.into() }
    }

    pub(super) fn shapes(what: &'static str, dense: &[usize], sparse: &[usize]) -> Result<(), Self> {
        if dense == sparse {
            return Ok(());
        }
        Err(Self::Shape { at: String::new(), what, dense: dense.to_vec(), sparse: sparse.to_vec() })
    }

    pub(super) fn settings<T: PartialEq + std::fmt::Debug>(what: &'static str, dense: T, sparse: T) -> Result<(), Self> {
        if dense == sparse {
            return Ok(());
        }
        Err(Self::Setting { at: String::new(), what, dense: format!("{dense:?}"), sparse: format!("{sparse:?}") })
    }
}
