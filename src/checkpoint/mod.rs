//! Weights in files, whatever model they are of: tensors read one at a time, numbers as they are stored, and what can be wrong.

pub(crate) mod error;
pub(crate) mod numbers;
pub(crate) mod params;
pub(crate) mod pickle;
pub(crate) mod tensors;

pub use error::CheckpointError;
