//! Where an optimiser was when a run ended.

use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::Bytes;

use super::{OptimizerConfig, WarmupCosine};
use crate::{
    clip::Clip,
    upcycle::{UpcycleError, upcycle_optimizer},
};

/// Moments and step counts of an optimiser at the end of a run, to go on from in another one on the same data.
#[derive(Clone, Hash)]
pub struct OptimizerState {
    bytes: Vec<u8>,
    /// Token ids that the run had: the state of the token embedding has as many rows.
    vocabulary: usize,
}

impl OptimizerState {
    pub(super) fn new(optimizer: &ModuleOptimizer, vocabulary: usize) -> Self {
        let bytes = optimizer.to_record().into_bytes().expect("a state in memory can be written");
        Self { bytes: bytes.to_vec(), vocabulary }
    }

    /// The state for a sparse model that was upcycled from the model that this one belongs to; see [`upcycle_optimizer`].
    ///
    /// # Errors
    /// When experts are not as wide as the dense network.
    pub fn upcycle(&self, dense: &Clip, sparse: &Clip) -> Result<Self, UpcycleError> {
        let device = dense.logit_scale.device();
        let trained = self.load(OptimizerConfig::new(WarmupCosine::new(0.0)).init(&device));
        let record = upcycle_optimizer(&trained, dense, sparse)?;
        let bytes = record.into_bytes().expect("a state in memory can be written");
        Ok(Self { bytes: bytes.to_vec(), vocabulary: self.vocabulary })
    }

    pub(super) fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// `optimizer`, gone on from here.
    pub(super) fn load(&self, optimizer: ModuleOptimizer) -> ModuleOptimizer {
        let record = OptimizerRecord::from_bytes(Bytes::from_bytes_vec(self.bytes.clone()));
        optimizer.load_record(record.expect("a state that was written in memory can be read"))
    }
}

impl std::fmt::Debug for OptimizerState {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("OptimizerState").field("bytes", &self.bytes.len()).field("vocabulary", &self.vocabulary).finish()
    }
}
