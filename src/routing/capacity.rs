//! How many tokens an expert may take: pure arithmetic.

use serde::{Deserialize, Serialize};

use crate::support::error::ConfigError;

/// Slots per expert, `C`, as a rule of the token count.
///
/// Two conventions of "capacity factor" are in use and differ by a factor `K`; both have a name here, so that a number taken
/// from a paper or another framework can be written down unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Capacity {
    /// `C = ceil(c · T · K / E)`: a factor on the evenly spread load (V-MoE, Megatron, DeepSpeed). `c = 1` just holds a perfectly
    /// even routing.
    OfBalancedLoad(f64),
    /// `C = ceil(c · T / E)`, with `K` counted inside `c` (axlearn, flaxformer, ST-MoE; "expert capacity" in CLIP-UP).
    /// `OfTokens(2.0)` with two choices is `OfBalancedLoad(1.0)`.
    OfTokens(f64),
    /// Exactly this many slots, whatever the token count.
    Fixed(usize),
    /// Every choice gets a slot.
    Dropless,
}

impl Capacity {
    /// Refuses a rule from which no slot count follows.
    ///
    /// # Errors
    /// `Fixed(0)`, and factors that are not finite or not above zero.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let reason = match *self {
            Self::OfBalancedLoad(c) | Self::OfTokens(c) if !c.is_finite() => "the factor must be finite",
            Self::OfBalancedLoad(c) | Self::OfTokens(c) if c <= 0.0 => "the factor must be above 0",
            Self::Fixed(0) => "an expert needs at least one slot",
            _ => return Ok(()),
        };
        Err(ConfigError::Capacity { capacity: format!("{self:?}"), reason })
    }

    /// Slots per expert for `num_tokens` tokens (`T`, padding included, so that shapes stay static), `top_k` choices (`K`) and
    /// `num_experts` experts (`E`). `None`: as many as are requested.
    ///
    /// A computed count lies in `1..=T`; `Fixed` is returned as it is. Products within 1e-9 of an integer are rounded to it:
    /// `400 · 1.1 / 8` is 55 slots, where a plain `ceil` would say 56.
    pub fn slots(&self, num_tokens: usize, top_k: usize, num_experts: usize) -> Option<usize> {
        let per_expert = num_tokens as f64 / num_experts as f64;
        let slots = match *self {
            Self::Dropless => return None,
            Self::Fixed(slots) => return Some(slots),
            Self::OfBalancedLoad(c) => c * num_tokens as f64 * top_k as f64 / num_experts as f64,
            Self::OfTokens(c) => c * per_expert,
        };
        let nearest = slots.round();
        let slots = if (slots - nearest).abs() <= 1e-9 { nearest } else { slots.ceil() };
        // A float beyond the range of `usize` saturates, and the clamp below then brings it to T.
        Some((slots as usize).clamp(1, num_tokens.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_conventions_differ_by_top_k() {
        for tokens in [1, 7, 24, 400, 3152] {
            for top_k in [1, 2, 4] {
                let balanced = Capacity::OfBalancedLoad(1.25).slots(tokens, top_k, 8);
                let of_tokens = Capacity::OfTokens(1.25 * top_k as f64).slots(tokens, top_k, 8);
                assert_eq!(balanced, of_tokens, "T {tokens}, K {top_k}");
            }
        }
    }

    #[test]
    fn a_product_next_to_an_integer_is_that_integer() {
        // 400 · 1.1 / 8 = 55.00000000000001 in f64.
        assert_eq!(Capacity::OfTokens(1.1).slots(400, 2, 8), Some(55));
        assert_eq!(Capacity::OfTokens(1.11).slots(400, 2, 8), Some(56)); // 55.5
    }

    #[test]
    fn a_computed_count_stays_between_one_and_the_token_count() {
        assert_eq!(Capacity::OfTokens(1e-6).slots(10, 2, 4), Some(1));
        assert_eq!(Capacity::OfTokens(1e300).slots(10, 2, 4), Some(10));
        assert_eq!(Capacity::OfBalancedLoad(2.0).slots(0, 2, 4), Some(1));
        assert_eq!(Capacity::Fixed(64).slots(10, 2, 4), Some(64));
        assert_eq!(Capacity::Dropless.slots(10, 2, 4), None);
    }

    #[test]
    fn impossible_rules_are_refused_by_name() {
        for (rule, text) in [
            (Capacity::Fixed(0), "capacity `Fixed(0)` is refused: an expert needs at least one slot"),
            (Capacity::OfTokens(0.0), "capacity `OfTokens(0.0)` is refused: the factor must be above 0"),
            (Capacity::OfBalancedLoad(-1.0), "capacity `OfBalancedLoad(-1.0)` is refused: the factor must be above 0"),
            (Capacity::OfTokens(f64::NAN), "capacity `OfTokens(NaN)` is refused: the factor must be finite"),
        ] {
            assert_eq!(rule.validate().unwrap_err().to_string(), text);
        }
        assert_eq!(Capacity::Dropless.validate(), Ok(()));
    }
}
