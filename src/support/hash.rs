//! A hash that is the same in every version and on every machine.

use std::hash::Hasher;

/// Fowler, Noll and Vo's hash of 64 bits (FNV-1a), four bytes at a time where there are so many.
#[derive(Debug, Clone)]
pub(crate) struct StableHasher(u64);

impl Default for StableHasher {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl StableHasher {
    fn mix(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(5);
    }
}

impl Hasher for StableHasher {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        words.iter().for_each(|word| self.mix(u32::from_le_bytes(*word).into()));
        rest.iter().for_each(|byte| self.mix(u64::from(*byte) | 1 << 32));
    }

    fn write_u32(&mut self, word: u32) {
        self.mix(word.into());
    }

    fn finish(&self) -> u64 {
        // What came last reaches all bits.
        let mixed = (self.0 ^ (self.0 >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ (mixed >> 29)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_stays_what_it_was() {
        let of = |bytes: &[u8]| {
            let mut hasher = StableHasher::default();
            hasher.write(bytes);
            hasher.finish()
        };
        assert_eq!(of(b""), 9_615_434_041_927_672_947);
        let texts: [&[u8]; 6] = [b"", b"a", b"b", b"abcd", b"abce", b"abcda"];
        let hashes: std::collections::HashSet<u64> = texts.iter().map(|text| of(text)).collect();
        assert_eq!(hashes.len(), texts.len());
    }
}
