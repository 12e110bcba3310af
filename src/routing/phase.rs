//! Training or inference.

/// What a forward pass is for. Capacity may differ between the two, and only training is noisy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Inside a training step.
    Training,
    /// Outside of training: a token's result must not depend on what else is in the batch.
    Inference,
}
