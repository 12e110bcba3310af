//! What every level uses: errors, costs, parameters, files.

pub(crate) mod cost;
pub(crate) mod error;
#[cfg(feature = "store")]
pub(crate) mod files;
pub mod finite;
pub(crate) mod param;
