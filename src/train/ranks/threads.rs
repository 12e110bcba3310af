//! Ranks that are threads of one process.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{RankError, Ranks};
use crate::train::stream::Part;

/// A rank that is a thread: one for each device of a machine. Sums go through the host's memory, in the order of the ranks.
///
/// When one of them is dropped, the others' next sum is an error: a rank that failed ends all.
#[derive(Debug)]
pub struct Threads {
    part: Part,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What each rank brought so far.
    brought: Vec<Option<Vec<f32>>>,
    sum: Arc<Vec<f32>>,
    /// Ranks that have not taken the last sum yet.
    takers: usize,
    gone: Option<usize>,
}

impl Threads {
    /// So many ranks: give each to a thread of its own.
    ///
    /// # Panics
    /// When there are none.
    #[allow(clippy::new_ret_no_self)]
    pub fn new(ranks: usize) -> Vec<Self> {
        assert!(ranks > 0, "there must be a rank");
        let state = State { brought: vec![None; ranks], ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        (0..ranks).map(|rank| Self { part: Part { rank, ranks }, shared: shared.clone() }).collect()
    }

    /// Waits until `ready`, unless a rank is gone. There is no limit: the first rank may be evaluating or writing a checkpoint.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        ready: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, RankError> {
        let Part { rank, ranks } = self.part;
        let error = |reason| RankError { rank, ranks, reason };
        loop {
            if ready(&state) {
                return Ok(state);
            }
            if let Some(gone) = state.gone {
                return Err(error(format!("rank {gone} has ended before the others")));
            }
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Ranks for Threads {
    fn part(&self) -> Part {
        self.part
    }

    fn are_threads(&self) -> bool {
        true
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), RankError> {
        let Part { rank, ranks } = self.part;
        let state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        // The last sum is still being taken.
        let mut state = self.wait(state, |state| state.takers == 0)?;
        state.brought[rank] = Some(values.to_vec());
        if state.brought.iter().all(Option::is_some) {
            let all: Vec<Vec<f32>> = state.brought.iter_mut().map(|values| values.take().expect("all have come")).collect();
            if let Some(other) = all.iter().position(|other| other.len() != values.len()) {
                let reason = format!("it sums {} values and rank {other} {}", values.len(), all[other].len());
                state.gone = Some(rank);
                self.shared.changed.notify_all();
                return Err(RankError { rank, ranks, reason });
            }
            let mut all = all.into_iter();
            let mut sum = all.next().expect("there is a rank");
            all.for_each(|other| sum.iter_mut().zip(other).for_each(|(sum, value)| *sum += value));
            state.sum = Arc::new(sum);
            state.takers = ranks;
            self.shared.changed.notify_all();
        }
        let mut state = self.wait(state, |state| state.takers > 0)?;
        let sum = state.sum.clone();
        state.takers -= 1;
        if state.takers == 0 {
            state.sum = Arc::default();
            self.shared.changed.notify_all();
        }
        drop(state);
        values.copy_from_slice(&sum);
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.gone.get_or_insert(self.part.rank);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn all_ranks_get_the_same_sums() {
        let results: Vec<Vec<f32>> = thread::scope(|scope| {
            let run = |ranks: Threads| {
                let rank = ranks.part().rank as f32;
                let mut found = Vec::new();
                for round in 0..200 {
                    let mut values = [rank, 0.1 * rank + round as f32, 1.0];
                    ranks.sum(&mut values).unwrap();
                    found.extend(values);
                }
                let mut counts = [3, 70_000_000_000 / 4];
                let ranks: &dyn Ranks = &ranks;
                ranks.sum_counts(&mut counts).unwrap();
                assert_eq!(counts, [12, 70_000_000_000]);
                assert_eq!(ranks.gather_counts(rank as usize + 5).unwrap(), [5, 6, 7, 8]);
                found
            };
            let threads: Vec<_> = Threads::new(4).into_iter().map(|ranks| scope.spawn(move || run(ranks))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!((results[0][1] - 0.6).abs() < 1e-6 && results[0][0] == 6.0 && results[0][2] == 4.0);
        assert!(results.iter().all(|result| result == &results[0]));
    }

    #[test]
    fn a_rank_that_is_gone_ends_the_others() {
        let mut ranks = Threads::new(2);
        drop(ranks.pop());
        let error = ranks[0].sum(&mut [1.0]).unwrap_err().to_string();
        assert_eq!(error, "rank 0 of 2: rank 1 has ended before the others");
    }

    #[test]
    fn sums_of_other_lengths_are_refused() {
        let errors: Vec<_> = thread::scope(|scope| {
            let run = |ranks: Threads| ranks.sum(&mut vec![0.0; 1 + ranks.part().rank]).map_err(|error| error.to_string());
            let threads: Vec<_> = Threads::new(2).into_iter().map(|ranks| scope.spawn(move || run(ranks))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap_err()).collect()
        });
        assert!(errors.iter().any(|error| error.contains("it sums ")), "{errors:?}");
    }
}
