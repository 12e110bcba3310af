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

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Int8 => "int8",
        })
    }
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

/// Weights `[E, D, F]` in 8 bits with the scale of each output column, `[E, F]`: the largest of a column is 127 or −127.
#[cfg(any(feature = "flex", feature = "store"))]
pub(crate) fn quantize(weights: &[f32], d_in: usize, d_out: usize) -> (Vec<i8>, Vec<f32>) {
    let (mut bytes, mut all_scales) = (Vec::with_capacity(weights.len()), Vec::new());
    for weights in weights.chunks_exact((d_in * d_out).max(1)) {
        let mut scales = vec![0f32; d_out];
        for row in weights.chunks_exact(d_out) {
            for (scale, weight) in scales.iter_mut().zip(row) {
                *scale = scale.max(weight.abs());
            }
        }
        scales.iter_mut().for_each(|scale| *scale /= 127.0);
        for row in weights.chunks_exact(d_out) {
            // A column of zeros has a scale of zero.
            let byte =
                |(weight, scale): (&f32, &f32)| if *scale > 0.0 { (weight / scale).round().clamp(-127.0, 127.0) as i8 } else { 0 };
            bytes.extend(row.iter().zip(&scales).map(byte));
        }
        all_scales.extend(scales);
    }
    (bytes, all_scales)
}
