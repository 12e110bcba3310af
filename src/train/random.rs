//! Random numbers that depend on what they are for, and on nothing that was drawn before.

use rand::{SeedableRng, rngs::StdRng};

/// Numbers for one purpose of a run.
pub(super) fn rng(seed: u64, purpose: u64, index: [u64; 2]) -> StdRng {
    let mut bytes = [0; 32];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip([seed, purpose, index[0], index[1]]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    StdRng::from_seed(bytes)
}
