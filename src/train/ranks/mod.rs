//! Several processes or threads that train one model together, each with its part of every batch.

#[cfg(feature = "cuda")]
mod devices;
#[cfg(feature = "mpi")]
mod mpi;
mod threads;

#[cfg(feature = "cuda")]
pub use devices::Devices;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use threads::Threads;

use burn::tensor::{DType, Tensor, TensorData};

use super::stream::Part;

/// Ranks that cannot go on together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} of {ranks}: {reason}")]
pub struct RankError {
    /// The rank that noticed it.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
    /// What went wrong.
    pub reason: String,
}

/// One of several ranks. All of them call the same functions in the same order.
pub trait Ranks: Send + Sync + std::fmt::Debug {
    /// This rank and their number.
    fn part(&self) -> Part;

    /// Whether the others are threads of this process, with which it shares a device's random numbers.
    fn are_threads(&self) -> bool {
        false
    }

    /// Whether sums work: to be called by all ranks before anything else.
    ///
    /// # Errors
    /// When they do not, or another rank is gone.
    fn check(&self) -> Result<(), RankError> {
        Ok(())
    }

    /// Replaces the values by their sums over all ranks, which have the same bits on each.
    ///
    /// # Errors
    /// When another rank is gone. Ranks that bring other numbers of values are a programmer's mistake, which not every implementation notices.
    fn sum(&self, values: &mut [f32]) -> Result<(), RankError>;

    /// The sum of a tensor on this rank's device, as 32-bit floats; through the host, unless an implementation knows a shorter way.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    fn sum_tensor(&self, tensor: Tensor<1>) -> Result<Tensor<1>, RankError> {
        let device = tensor.device();
        let mut values = tensor.try_into_vec_as::<f32>().expect("a float tensor reads as f32");
        self.sum(&mut values)?;
        let count = values.len();
        Ok(Tensor::from_data(TensorData::new(values, [count]), (&device, DType::F32)))
    }
}

impl dyn Ranks + '_ {
    /// Whether there are others.
    pub(in crate::train) fn has_others(&self) -> bool {
        self.part().ranks > 1
    }

    /// Sums of whole numbers, exact up to 2^36 on at most 4,096 ranks.
    pub(in crate::train) fn sum_counts(&self, counts: &mut [usize]) -> Result<(), RankError> {
        if !self.has_others() {
            return Ok(());
        }
        // Whole numbers are exact as floats up to 2^24: three times 12 bits, and as many ranks as 12 bits count.
        const BITS: usize = 12;
        const LOW: usize = (1 << BITS) - 1;
        let mut digits: Vec<f32> =
            counts.iter().flat_map(|count| [0, 1, 2].map(|digit| ((count >> (digit * BITS)) & LOW) as f32)).collect();
        self.sum(&mut digits)?;
        for (count, digits) in counts.iter_mut().zip(digits.chunks_exact(3)) {
            *count = digits.iter().enumerate().map(|(digit, sum)| (*sum as usize) << (digit * BITS)).sum();
        }
        Ok(())
    }

    /// A number of each rank, by rank.
    pub(in crate::train) fn gather_counts(&self, count: usize) -> Result<Vec<usize>, RankError> {
        let Part { rank, ranks } = self.part();
        let mut counts = vec![0; ranks];
        counts[rank] = count;
        self.sum_counts(&mut counts)?;
        Ok(counts)
    }
}

/// No other ranks: one process trains alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Solo;

impl Ranks for Solo {
    fn part(&self) -> Part {
        Part::WHOLE
    }

    fn sum(&self, _values: &mut [f32]) -> Result<(), RankError> {
        Ok(())
    }

    fn sum_tensor(&self, tensor: Tensor<1>) -> Result<Tensor<1>, RankError> {
        Ok(tensor)
    }
}
