//! Ranks that are processes, on one machine or many.

use std::{
    sync::{Mutex, PoisonError, mpsc},
    thread,
};

use mpi::{
    Threading,
    collective::SystemOperation,
    traits::{Communicator, CommunicatorCollectives},
};

use super::{RankError, Ranks};
use crate::train::stream::Part;

/// A rank that is a process, started by `mpirun`. Sums go through the host's memory, in one order on all ranks.
///
/// When a process dies, `mpirun` ends the others. One that fails and lives on must call [`abort`](Self::abort), as the others wait for it.
#[derive(Debug)]
pub struct Mpi {
    part: Part,
    /// MPI belongs to one thread, which answers.
    calls: Mutex<(mpsc::Sender<Call>, mpsc::Receiver<Vec<f32>>)>,
    thread: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
enum Call {
    Sum(Vec<f32>),
    Abort(i32),
}

impl Mpi {
    /// The rank of this process; the only one where it was not started by `mpirun`.
    ///
    /// # Errors
    /// When MPI has been started in this process before.
    pub fn start() -> Result<Self, RankError> {
        let (call, calls) = mpsc::channel();
        let (answer, answers) = mpsc::channel();
        let (part, parts) = mpsc::channel();
        let run = move || {
            let Some((universe, _)) = mpi::initialize_with_threading(Threading::Funneled) else { return };
            let world = universe.world();
            // The one who asked is gone: nothing is left to do.
            let _ = part.send(Part { rank: world.rank() as usize, ranks: world.size() as usize });
            for call in calls {
                match call {
                    Call::Sum(values) => {
                        let mut sum = vec![0.0; values.len()];
                        world.all_reduce_into(&values[..], &mut sum[..], SystemOperation::sum());
                        if answer.send(sum).is_err() {
                            return;
                        }
                    }
                    Call::Abort(status) => world.abort(status),
                }
            }
        };
        let thread = thread::spawn(run);
        let started = RankError { rank: 0, ranks: 0, reason: "MPI was started in this process before".into() };
        let part = parts.recv().map_err(|_| started)?;
        Ok(Self { part, calls: Mutex::new((call, answers)), thread: Some(thread) })
    }

    /// Ends all ranks with this exit status.
    pub fn abort(&self, status: i32) -> ! {
        match self.calls.lock().unwrap_or_else(PoisonError::into_inner).0.send(Call::Abort(status)) {
            Ok(()) => loop {
                thread::park();
            },
            // The thread that calls MPI is gone: mpirun sees this process end.
            Err(_) => std::process::exit(status),
        }
    }
}

impl Ranks for Mpi {
    fn part(&self) -> Part {
        self.part
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), RankError> {
        let Part { rank, ranks } = self.part;
        let gone = || RankError { rank, ranks, reason: "the thread that calls MPI is gone".into() };
        let calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        calls.0.send(Call::Sum(values.to_vec())).map_err(|_| gone())?;
        values.copy_from_slice(&calls.1.recv().map_err(|_| gone())?);
        Ok(())
    }
}

impl Drop for Mpi {
    /// Ends MPI: all ranks come to it.
    fn drop(&mut self) {
        // Without a sender, the thread ends.
        let (call, _) = mpsc::channel();
        self.calls.get_mut().unwrap_or_else(PoisonError::into_inner).0 = call;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
