//! Ranks that are threads, one for each CUDA card of a machine.

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use burn::tensor::{
    DType, Device, Tensor, TensorData,
    distributed::{ReduceOperation, all_reduce},
};

use super::{RankError, Ranks, Threads};
use crate::train::stream::Part;

/// How long a sum between cards may take once all ranks have come to it. A card that has failed makes the others wait for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// A rank that is a thread with a CUDA card of its own. Sums of tensors go from card to card, by burn's `all_reduce` on NCCL, whose library
/// must be installed; other sums are those of [`Threads`].
///
/// **Not yet run on more than one card.** [`new`](Self::new) is followed by a [`check`](Self::check) on each rank's thread; where it fails,
/// [`Threads`] does the same through the host's memory.
///
/// When a rank is dropped, the others' next sum is an error. A sum between cards that does not end within a minute ends the process.
#[derive(Debug)]
pub struct Devices {
    threads: Threads,
    devices: Arc<[Device]>,
    watchdog: Arc<Watchdog>,
}

impl Devices {
    /// A rank for each device, in their order: give each to a thread of its own.
    ///
    /// # Panics
    /// When there is no device.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(devices: &[Device]) -> Vec<Self> {
        let devices: Arc<[Device]> = devices.into();
        let ranks = Threads::new(devices.len()).into_iter();
        ranks.map(|threads| Self { threads, devices: devices.clone(), watchdog: Watchdog::start() }).collect()
    }

    /// Sums known numbers, and compares with what they should be.
    ///
    /// # Errors
    /// When the sum is another, or a rank is gone.
    pub fn check(&self) -> Result<(), RankError> {
        let Part { rank, ranks } = self.part();
        let count = 1 << 16;
        let value = |rank: usize, i: usize| ((rank + 1) * (i % 1000)) as f32;
        let own: Vec<f32> = (0..count).map(|i| value(rank, i)).collect();
        let sum = self.sum_tensor(Tensor::from_data(TensorData::new(own, [count]), (&self.devices[rank], DType::F32)))?;
        let sum = sum.try_into_vec_as::<f32>().expect("a float tensor reads as f32");
        match (0..count).find(|&i| sum[i] != (0..ranks).map(|rank| value(rank, i)).sum::<f32>()) {
            None => Ok(()),
            Some(i) => {
                let reason =
                    format!("its card's sum of known numbers is wrong: value {i} is {}; sum through the host instead", sum[i]);
                Err(RankError { rank, ranks, reason })
            }
        }
    }
}

impl Ranks for Devices {
    fn part(&self) -> Part {
        self.threads.part()
    }

    fn are_threads(&self) -> bool {
        true
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), RankError> {
        self.threads.sum(values)
    }

    fn sum_tensor(&self, tensor: Tensor<1>) -> Result<Tensor<1>, RankError> {
        let device = tensor.device();
        let [count] = tensor.shape().dims();
        // All come here before any card waits for another, with equally many values: a rank that is gone is an error here, not a card that waits.
        let Part { rank, ranks } = self.part();
        let counts = (&self.threads as &dyn Ranks).gather_counts(count)?;
        if let Some(other) = counts.iter().position(|&other| other != count) {
            return Err(RankError { rank, ranks, reason: format!("it sums {count} values and rank {other} {}", counts[other]) });
        }
        let _watched = self.watchdog.watch();
        let sum = all_reduce(tensor.cast(DType::F32), ReduceOperation::Sum, self.devices.to_vec()).resolve();
        device.sync().map_err(|error| RankError { rank, ranks, reason: format!("its card has failed: {error}") })?;
        Ok(sum)
    }
}

/// Ends the process when something that is watched takes too long.
#[derive(Debug)]
struct Watchdog {
    start: Instant,
    /// When what is watched began, in milliseconds since `start` and one more; 0 if nothing is watched.
    since: AtomicU64,
}

impl Watchdog {
    fn start() -> Arc<Self> {
        let watchdog = Arc::new(Self { start: Instant::now(), since: AtomicU64::new(0) });
        let watched: Weak<Self> = Arc::downgrade(&watchdog);
        thread::spawn(move || {
            while let Some(watchdog) = watched.upgrade() {
                if watchdog.is_over(LIMIT) {
                    eprintln!(
                        "error: a sum between cards has not ended within {} s; the run can go on from its last checkpoint",
                        LIMIT.as_secs()
                    );
                    std::process::exit(1);
                }
                drop(watchdog);
                thread::sleep(Duration::from_millis(500));
            }
        });
        watchdog
    }

    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64 + 1
    }

    fn is_over(&self, limit: Duration) -> bool {
        let since = self.since.load(Ordering::SeqCst);
        since > 0 && self.now() - since > limit.as_millis() as u64
    }

    /// Until it is dropped.
    fn watch(&self) -> Watched<'_> {
        self.since.store(self.now(), Ordering::SeqCst);
        Watched(self)
    }
}

struct Watched<'a>(&'a Watchdog);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::SeqCst);
    }
}
