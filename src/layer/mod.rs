//! The sparse layers, and the experts that they are made of.

pub(crate) mod experts;
pub(crate) mod lora;
pub(crate) mod moe;
pub(crate) mod packed;
pub(crate) mod soft_moe;
