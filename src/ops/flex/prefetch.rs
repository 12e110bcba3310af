//! Weights asked for before they are needed, fenced: the one place that calls the instruction.
//!
//! With few rows each weight is used so few times that memory is slower than arithmetic. While one panel is multiplied, the next comes into the
//! cache, evenly over that time: asked for at once, it would have to be waited for.
#![allow(unsafe_code)]

/// Bytes that come at a time.
const CACHE_LINE: usize = 64;

/// Memory that is read next.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    start: *const u8,
    /// The next cache line, times 2¹⁶.
    at: u64,
    step: u64,
}

impl Ahead {
    /// Nothing: always the same byte. An address that is not mapped would be looked up anew at every step.
    pub(super) const NONE: Self = {
        static BYTE: u8 = 0;
        Self { start: &raw const BYTE, at: 0, step: 0 }
    };

    /// All of `next`, in `turns` turns of `steps` steps each.
    pub(super) fn new<T>(next: &[T], turns: usize, steps: usize) -> Self {
        let step = ((size_of_val(next) / CACHE_LINE) as u64) << 16;
        let step = step / (turns * steps).max(1) as u64;
        Self { start: next.as_ptr().cast(), at: 0, step }
    }

    /// What follows the given number of steps.
    pub(super) fn after(self, step: usize) -> Self {
        Self { at: step as u64 * self.step, ..self }
    }

    /// Asks for the next part.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        let address = self.start.wrapping_add((self.at >> 16) as usize * CACHE_LINE);
        self.at += self.step;
        // SAFETY: the instruction is a hint, which reads nothing that a program sees, at any address. All x86-64 processors have it.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T1>(address.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = address;
    }
}
