//! Errors of configurations.

/// A configuration that no layer can be built from.
///
/// `init` panics with this text, because a configuration written in code is the programmer's; file loaders return it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A size that must be at least one is zero.
    #[error("`{field}` must be at least 1, got 0")]
    Zero {
        /// Name of the field.
        field: &'static str,
    },
    /// More choices per token than there are experts.
    #[error("`top_k` is {top_k}, but there are only {num_experts} experts")]
    TopKExceedsExperts {
        /// Choices per token, `K`.
        top_k: usize,
        /// Number of experts, `E`.
        num_experts: usize,
    },
    /// A capacity from which no slot count follows.
    #[error("capacity `{capacity}` is refused: {reason}")]
    Capacity {
        /// The capacity as written.
        capacity: String,
        /// Why it cannot be used.
        reason: &'static str,
    },
    /// One choice per token with gates that sum to one.
    #[error(
        "`top_k` 1 with gate normalization `{normalization}` is refused: the only gate is then the constant 1, so no task \
         gradient reaches the router; use `GateNormalization::None`"
    )]
    TopOneNormalized {
        /// The normalization as written.
        normalization: String,
    },
    /// One size must divide another.
    #[error("`{divisor}` ({divisor_value}) must divide `{field}` ({value})")]
    NotDivisible {
        /// The field to be divided.
        field: &'static str,
        /// Its value.
        value: usize,
        /// The field that must divide it.
        divisor: &'static str,
        /// Its value.
        divisor_value: usize,
    },
    /// A sparse block that the encoder does not have.
    #[error("block {index} is named sparse, but the encoder has {num_layers} blocks")]
    NoSuchBlock {
        /// The block that was named.
        index: usize,
        /// Number of blocks in the encoder.
        num_layers: usize,
    },
    /// A setting that does not go with the others.
    #[error("`{field}` is refused: {reason}")]
    Refused {
        /// Name of the field.
        field: &'static str,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// A number outside its range.
    #[error("`{field}` is {value}: {reason}")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// The value as written.
        value: f64,
        /// The range that is allowed, in words.
        reason: &'static str,
    },
}

impl ConfigError {
    /// `Err` when a size is zero.
    pub(crate) fn non_zero(field: &'static str, value: usize) -> Result<(), Self> {
        if value == 0 { Err(Self::Zero { field }) } else { Ok(()) }
    }
}

/// Panics with the text of a configuration error; for `init`.
#[track_caller]
pub(crate) fn expect_valid(result: Result<(), ConfigError>) {
    if let Err(error) = result {
        panic!("{error}");
    }
}
