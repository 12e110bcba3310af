//! The order of samples, which only the seed decides.

use std::sync::Arc;

use rand::{RngExt, rngs::StdRng, seq::SliceRandom};

use super::{SampleId, Samples};
use crate::train::{data::DataError, random::rng};

/// An endless row of samples: in each epoch all shards in another order, and their samples drawn from a window that moves over them.
pub(super) struct Order {
    samples: Arc<dyn Samples>,
    /// Samples that are drawn from.
    window: usize,
    seed: u64,
    epoch: u64,
    rng: StdRng,
    /// The shards of this epoch that are not begun, the last one first.
    shards: Vec<usize>,
    /// What comes into the window next.
    next: Option<SampleId>,
    waiting: Vec<SampleId>,
    /// Samples of this epoch so far.
    drawn: u64,
    /// Samples of an epoch, once one is over.
    in_epoch: Option<u64>,
}

impl Order {
    pub(super) fn new(samples: Arc<dyn Samples>, window: usize, seed: u64) -> Self {
        let mut order = Self {
            samples,
            window,
            seed,
            epoch: 0,
            rng: rng(seed, 0, [0, 0]),
            shards: Vec::new(),
            next: None,
            waiting: Vec::new(),
            drawn: 0,
            in_epoch: None,
        };
        order.begin(0);
        order
    }

    fn begin(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.rng = rng(self.seed, 0, [epoch, 0]);
        self.shards = (0..self.samples.shards()).collect();
        self.shards.shuffle(&mut self.rng);
        self.next = self.shards.pop().map(|shard| SampleId { shard, place: 0 });
        self.waiting.clear();
        self.drawn = 0;
    }

    /// The next sample, and the epoch that it belongs to.
    pub(super) fn next(&mut self) -> Result<(u64, SampleId), DataError> {
        loop {
            while self.waiting.len() < self.window
                && let Some(id) = self.next
            {
                if self.samples.has(id)? {
                    self.waiting.push(id);
                    self.next = Some(SampleId { place: id.place + 1, ..id });
                } else {
                    self.next = self.shards.pop().map(|shard| SampleId { shard, place: 0 });
                }
            }
            if !self.waiting.is_empty() {
                self.drawn += 1;
                let chosen = self.rng.random_range(0..self.waiting.len());
                return Ok((self.epoch, self.waiting.swap_remove(chosen)));
            }
            if self.drawn == 0 {
                return Err(DataError::NoSample);
            }
            self.in_epoch = Some(self.drawn);
            self.begin(self.epoch + 1);
        }
    }

    /// Passes over samples that were used already. From the second epoch on, whole epochs are passed over at once.
    pub(super) fn skip(&mut self, count: u64) -> Result<(), DataError> {
        let mut left = count;
        while left > 0 {
            if self.drawn == 0
                && let Some(in_epoch) = self.in_epoch
                && left >= in_epoch
            {
                left -= in_epoch;
                self.begin(self.epoch + 1);
            } else {
                let (_, id) = self.next()?;
                self.samples.pass(id);
                left -= 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::train::stream::{Sample, SampleError};

    /// Shards of these lengths.
    struct Lengths(Vec<usize>);

    impl Samples for Lengths {
        fn shards(&self) -> usize {
            self.0.len()
        }

        fn has(&self, id: SampleId) -> Result<bool, DataError> {
            Ok(id.place < self.0[id.shard])
        }

        fn read(&self, _: SampleId) -> Result<Sample, SampleError> {
            unreachable!("an order reads no sample")
        }

        fn fingerprint(&self) -> String {
            String::new()
        }
    }

    fn order(lengths: &[usize], window: usize) -> Order {
        Order::new(Arc::new(Lengths(lengths.to_vec())), window, 7)
    }

    #[test]
    fn an_epoch_has_every_sample_once_in_an_order_of_its_own() {
        for window in [1, 4, 100] {
            let mut order = order(&[3, 0, 5, 1, 4], window);
            let epochs: Vec<Vec<SampleId>> = (0..3)
                .map(|epoch| {
                    let ids = (0..13).map(|_| order.next().unwrap());
                    ids.map(|(of, id)| (of == epoch).then_some(id).expect("epochs do not mix")).collect()
                })
                .collect();
            let sets: Vec<HashSet<&SampleId>> = epochs.iter().map(|epoch| epoch.iter().collect()).collect();
            assert!(sets.iter().all(|set| set.len() == 13));
            assert!(epochs[0] != epochs[1] && epochs[1] != epochs[2]);
        }
    }

    #[test]
    fn passing_over_samples_is_drawing_them() {
        for count in [0, 1, 12, 13, 14, 40, 200] {
            let mut drawn = order(&[3, 5, 1, 4], 4);
            for _ in 0..count {
                drawn.next().unwrap();
            }
            let mut skipped = order(&[3, 5, 1, 4], 4);
            skipped.skip(count).unwrap();
            let next = |order: &mut Order| (0..30).map(|_| order.next().unwrap()).collect::<Vec<_>>();
            assert_eq!(next(&mut skipped), next(&mut drawn), "after {count}");
        }
    }

    #[test]
    fn a_source_without_samples_is_an_error() {
        assert!(matches!(order(&[0, 0], 4).next(), Err(DataError::NoSample)));
        assert!(matches!(order(&[], 4).next(), Err(DataError::NoSample)));
    }
}
