//! Memory that is used again, fenced: the one place that hands raw memory to burn's tensors.
//!
//! A layer's rows and hidden activations are tens of megabytes each, and the allocator gives memory of that size back to the system as
//! soon as it is free: every step would touch every page for the first time, which took a fifth of a training step.
#![allow(unsafe_code)]

use std::{
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, PoisonError},
};

use burn_std::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};

/// Values of the smallest buffer that is kept, 64 KiB: filling a smaller one with zeros costs no more than finding it here.
const MIN_LEN: usize = 1 << 14;
/// A buffer that was of no use to this many requests is given back to the system.
const MAX_AGE: u64 = 1024;

/// Values with room for an output; what they hold is of no meaning until they are written.
pub(super) struct Buffer {
    /// At least `len` values: as many as the size class has.
    values: Vec<f32>,
    len: usize,
}

impl Buffer {
    /// Room for `len` values, all of which the caller will write.
    pub(super) fn new(len: usize) -> Self {
        if len < MIN_LEN {
            // What is used again holds old values; tests see to it that nobody relies on zeros.
            return Self { values: vec![if cfg!(test) { f32::NAN } else { 0.0 }; len], len };
        }
        let size = size_class(len);
        // Two statements, so that the pool is not locked while memory is asked for.
        let idle = pool().take(size);
        Self { values: idle.unwrap_or_else(|| vec![0.0; size]), len }
    }

    /// The values as a tensor's memory, which comes back here when the tensor is gone.
    pub(super) fn into_bytes(self) -> Bytes {
        let size = self.len * size_of::<f32>();
        // SAFETY: all values of the vector are initialized, and `len` is at most as many.
        unsafe { Bytes::from_controller(Box::new(self), size) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.values.len() >= MIN_LEN {
            pool().give(std::mem::take(&mut self.values));
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.len]
    }
}

impl AllocationController for Buffer {
    fn alloc_align(&self) -> usize {
        align_of::<f32>()
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        let (start, size) = (self.values.as_mut_ptr(), self.len * size_of::<f32>());
        // SAFETY: the same memory, borrowed mutably, as bytes; the caller promises to write only initialized ones.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), size) })
    }

    fn memory(&self, _: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let (start, size) = (self.values.as_ptr(), self.len * size_of::<f32>());
        // SAFETY: the same memory, borrowed, as bytes.
        Ok(unsafe { std::slice::from_raw_parts(start.cast(), size) })
    }
}

/// Buffers that nobody uses at the moment.
struct Pool {
    idle: Vec<Idle>,
    /// Values in buffers that are in use, and the most there ever were.
    live: usize,
    peak: usize,
    requests: u64,
}

struct Idle {
    values: Vec<f32>,
    /// The request before which it came back.
    since: u64,
}

impl Pool {
    const fn new() -> Self {
        Self { idle: Vec::new(), live: 0, peak: 0, requests: 0 }
    }

    /// A buffer of exactly this size, if one is idle.
    fn take(&mut self, len: usize) -> Option<Vec<f32>> {
        self.requests += 1;
        self.live += len;
        self.peak = self.peak.max(self.live);
        // The one used last is the most likely to be in a cache.
        let found = self.idle.iter().rposition(|idle| idle.values.len() == len);
        let found = found.map(|index| self.idle.remove(index).values);
        self.trim();
        found
    }

    fn give(&mut self, values: Vec<f32>) {
        self.live -= values.len();
        self.idle.push(Idle { values, since: self.requests });
        self.trim();
    }

    /// Lets go of the oldest buffers: those of no use, and so many that all memory
    /// stays within a quarter more than was ever in use at once.
    fn trim(&mut self) {
        let held = |idle: &[Idle]| idle.iter().map(|idle| idle.values.len()).sum::<usize>();
        let mut first = self.idle.iter().take_while(|idle| idle.since + MAX_AGE < self.requests).count();
        while first < self.idle.len() && self.live + held(&self.idle[first..]) > self.peak + self.peak / 4 {
            first += 1;
        }
        self.idle.drain(..first);
    }
}

fn pool() -> MutexGuard<'static, Pool> {
    static POOL: Mutex<Pool> = Mutex::new(Pool::new());
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `len` rounded up to one of eight steps between powers of two, so that batches of nearly the same size share buffers.
fn size_class(len: usize) -> usize {
    let step = (len.next_power_of_two() / 16).max(1);
    len.next_multiple_of(step)
}

/// Gives back what nobody uses at the moment.
pub(in crate::ops) fn release_idle() {
    pool().idle.clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_rounded_up_by_an_eighth_at_most() {
        assert_eq!(size_class(MIN_LEN), MIN_LEN);
        assert_eq!(size_class(1000), 1024);
        assert_eq!(size_class(1025), 1152);
        for len in (1..5000).map(|i| i * 997) {
            let class = size_class(len);
            assert!(class >= len && class <= len + len.div_ceil(8) && size_class(class) == class, "{len}: {class}");
        }
    }

    #[test]
    fn a_buffer_that_came_back_is_used_again_and_the_rest_is_bounded() {
        let mut pool = Pool::new();
        let held = |pool: &Pool| pool.idle.iter().map(|idle| idle.values.len()).collect::<Vec<_>>();
        assert!(pool.take(8).is_none() && pool.take(8).is_none());
        pool.give(vec![1.0; 8]);
        assert_eq!(pool.take(4), None);
        assert_eq!(pool.take(8), Some(vec![1.0; 8]));
        pool.give(vec![2.0; 8]);
        pool.give(vec![3.0; 8]);
        pool.give(vec![4.0; 4]);
        // At most 20 were in use at once, so 25 may be held.
        assert_eq!((pool.live, pool.peak, held(&pool)), (0, 20, vec![8, 8, 4]));
        assert_eq!(pool.take(12), None);
        assert_eq!(held(&pool), [8, 4]);
        assert_eq!(pool.take(8), Some(vec![3.0; 8]));
    }

    #[test]
    fn a_buffer_that_nobody_asks_for_is_given_back() {
        let mut pool = Pool::new();
        assert!(pool.take(8).is_none());
        pool.give(vec![0.0; 8]);
        for _ in 0..=MAX_AGE {
            assert!(pool.take(1).is_none());
            pool.live -= 1;
        }
        assert!(pool.idle.is_empty());
    }

    #[test]
    fn bytes_are_the_values_and_may_be_written() {
        let mut buffer = Buffer::new(3);
        buffer.copy_from_slice(&[1.0, 2.0, 3.0]);
        let mut bytes = buffer.into_bytes();
        bytes[..4].copy_from_slice(&5.0f32.to_le_bytes());
        let copy = bytes.clone();
        let read = |bytes: &Bytes| bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
        assert_eq!((read(&bytes), read(&copy)), (vec![5.0, 2.0, 3.0], vec![5.0, 2.0, 3.0]));
    }
}
