//! How numbers are stored.

/// How numbers are stored: in files, and in weights that were packed for inference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits, IEEE half precision.
    F16,
    /// 16 bits with the exponent of 32.
    BF16,
    /// 8 bits, for the weights of experts, feed-forward networks and attention: `w[d, f] ≈ scale[f] · byte[d, f]`, with bytes from −127 to 127 and
    /// a scale for each output column. Everything else has 32 bits.
    Int8,
}

#[cfg(any(feature = "flex", feature = "store"))]
impl Precision {
    /// Whether a value is stored as a finite number.
    pub(crate) fn holds(self, value: f32) -> bool {
        match self {
            Self::F32 | Self::Int8 => value.is_finite(),
            Self::F16 => half::f16::from_f32(value).is_finite(),
            Self::BF16 => half::bf16::from_f32(value).is_finite(),
        }
    }
}
