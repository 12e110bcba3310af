//! Which tokens compete for the same slots.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::support::error::ConfigError;

/// The groups that tokens are routed in. Capacity is counted, and slots are assigned, in each group by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenGroups {
    /// All tokens of a call are one group.
    #[default]
    Whole,
    /// This many tokens, in order; the last group is smaller when the size does not divide the token count.
    OfSize(usize),
    /// Each sample is a group: of an input `[B, N, D]`, the `N` tokens of one index of the first axis. A sample's result then does not
    /// depend on the rest of the batch, whatever the assignment. An input `[T, D]` is one sample.
    PerSample,
}

impl TokenGroups {
    /// Refuses a group of no tokens.
    ///
    /// # Errors
    /// `OfSize(0)`.
    pub fn validate(&self) -> Result<(), ConfigError> {
        match self {
            Self::OfSize(0) => Err(ConfigError::Zero { field: "group_size" }),
            _ => Ok(()),
        }
    }

    /// Tokens of each group, at least 1; the last group may have fewer.
    ///
    /// # Panics
    /// When samples do not divide the tokens.
    pub(super) fn size(&self, num_tokens: usize, tokens_per_sample: usize) -> usize {
        match *self {
            Self::Whole => num_tokens.max(1),
            Self::OfSize(size) => size.clamp(1, num_tokens.max(1)),
            Self::PerSample => {
                let divides = num_tokens == 0 || (tokens_per_sample > 0 && num_tokens.is_multiple_of(tokens_per_sample));
                assert!(divides, "samples of {tokens_per_sample} tokens do not divide {num_tokens} tokens");
                tokens_per_sample.max(1)
            }
        }
    }

    /// The tokens of each group, in order.
    pub(super) fn ranges(&self, num_tokens: usize, tokens_per_sample: usize) -> impl Iterator<Item = Range<usize>> {
        let size = self.size(num_tokens, tokens_per_sample);
        (0..num_tokens.div_ceil(size)).map(move |group| group * size..((group + 1) * size).min(num_tokens))
    }
}
