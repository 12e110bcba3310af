//! Ranks that are threads, one for each CUDA card of a machine.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    thread,
    time::Duration,
};

use burn::tensor::{
    DType, Device, Tensor, TensorData,
    distributed::{ReduceOperation, all_reduce},
};

use super::{RankError, Ranks, Threads};
use crate::train::stream::Part;

/// How long a sum between cards may take once all have done what came before it. A card that has failed makes the others wait for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// A rank that is a thread with a CUDA card of its own. Sums of tensors go from card to card, by burn's `all_reduce` on NVIDIA's NCCL, which
/// must be installed as `libnccl.so`; other sums are those of [`Threads`].
///
/// **Not yet run on more than one card.** Call [`check`](Ranks::check) on each rank's thread before anything else; where it fails, [`Threads`]
/// does the same through the host's memory.
///
/// When a rank is dropped, the others' next sum is an error. A sum between cards that does not end within a minute ends the process.
#[derive(Debug)]
pub struct Devices {
    threads: Threads,
    devices: Arc<[Device]>,
}

impl Devices {
    /// A rank for each device, in their order: give each to a thread of its own.
    ///
    /// # Panics
    /// When there is no device, or one twice.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(devices: &[Device]) -> Vec<Self> {
        let twice = devices.iter().enumerate().find(|(i, device)| devices[..*i].contains(device));
        assert!(twice.is_none(), "{:?} is there twice: each rank needs a card of its own", twice.map(|(_, device)| device));
        let devices: Arc<[Device]> = devices.into();
        Threads::new(devices.len()).into_iter().map(|threads| Self { threads, devices: devices.clone() }).collect()
    }

    fn error(&self, reason: impl Into<String>) -> RankError {
        let Part { rank, ranks } = self.part();
        RankError { rank, ranks, reason: reason.into() }
    }

    /// Sums known numbers, and compares with what they should be.
    fn sum_known_numbers(&self, count: usize) -> Result<(), RankError> {
        let Part { rank, ranks } = self.part();
        let value = |rank: usize, i: usize| ((rank + 1) * (i % 1000)) as f32;
        let own: Vec<f32> = (0..count).map(|i| value(rank, i)).collect();
        let sum = self.sum_tensor(Tensor::from_data(TensorData::new(own, [count]), (&self.devices[rank], DType::F32)))?;
        let sum =
            sum.try_into_vec_as::<f32>().map_err(|error| self.error(format!("the sum of its card cannot be read: {error}")))?;
        match (0..count).find(|&i| sum[i] != (0..ranks).map(|rank| value(rank, i)).sum::<f32>()) {
            None => Ok(()),
            Some(i) => Err(self.error(format!("its card's sum of {count} known numbers is wrong: value {i} is {}", sum[i]))),
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

    /// Sums known numbers from card to card, few and many.
    fn check(&self) -> Result<(), RankError> {
        for count in [1000, 1 << 22, 1 << 22] {
            // burn panics where NCCL's library is missing.
            catch_unwind(AssertUnwindSafe(|| self.sum_known_numbers(count)))
                .unwrap_or_else(|_| Err(self.error("NVIDIA's NCCL could not be used; is `libnccl.so` installed?")))?;
        }
        Ok(())
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), RankError> {
        self.threads.sum(values)
    }

    fn sum_tensor(&self, tensor: Tensor<1>) -> Result<Tensor<1>, RankError> {
        let device = tensor.device();
        let failed = |error| self.error(format!("its card has failed: {error}"));
        let [count] = tensor.shape().dims();
        device.sync().map_err(failed)?;
        // All come here before any card waits for another, with equally many values: a rank that is gone is an error, and no card waits for it.
        let counts = (&self.threads as &dyn Ranks).gather_counts(count)?;
        if let Some(other) = counts.iter().position(|&other| other != count) {
            return Err(self.error(format!("it sums {count} values and rank {other} {}", counts[other])));
        }
        let _ends_in_time = watch(LIMIT);
        let sum = all_reduce(tensor.cast(DType::F32), ReduceOperation::Sum, self.devices.to_vec()).resolve();
        device.sync().map_err(failed)?;
        Ok(sum)
    }
}

/// Ends the process, unless what is returned is dropped within the limit.
fn watch(limit: Duration) -> Sender<()> {
    let (watched, end) = mpsc::channel();
    thread::spawn(move || {
        if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!(
                "error: a sum between cards has not ended within {} s; the run can go on from its last checkpoint",
                limit.as_secs()
            );
            // Without waiting for the cards.
            process::abort();
        }
    });
    watched
}
