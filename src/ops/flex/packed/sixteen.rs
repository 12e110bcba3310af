//! Weights in 16 bits.

use crate::ops::flex::tiles::{Line, PANEL, scratch};

/// A panel of 16-bit numbers in 32.
#[inline(always)]
pub(super) fn unpacked<'a>(panel: &[Line<u16>], f: impl Fn(u16) -> f32, out: &'a mut Vec<Line<f32>>) -> &'a [Line<f32>] {
    let out = scratch(out, panel.len(), Line([0.0; PANEL]));
    for (out, line) in out.iter_mut().zip(panel) {
        for (out, value) in out.0.iter_mut().zip(&line.0) {
            *out = f(*value);
        }
    }
    out
}

/// A finite f16 from its bits: shifted, its exponent is 112 too small.
#[inline(always)]
pub(super) fn of_f16(bits: u16) -> f32 {
    const SCALE: f32 = f32::from_bits((127 + 112) << 23);
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * SCALE;
    f32::from_bits(magnitude.to_bits() | sign)
}

/// A bf16 from its bits.
#[inline(always)]
pub(super) fn of_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn sixteen_bits_are_the_numbers_that_they_stand_for() {
        for bits in 0..=u16::MAX {
            if f16::from_bits(bits).is_finite() {
                assert_eq!(of_f16(bits).to_bits(), f16::from_bits(bits).to_f32().to_bits());
            }
            if bf16::from_bits(bits).is_finite() {
                assert_eq!(of_bf16(bits).to_bits(), bf16::from_bits(bits).to_f32().to_bits());
            }
        }
    }
}
