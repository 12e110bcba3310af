//! What every level uses: errors, costs, parameters, files.

#[cfg(any(feature = "store", feature = "preprocess"))]
pub(crate) mod content;
pub(crate) mod cost;
pub(crate) mod error;
#[cfg(feature = "store")]
pub(crate) mod files;
pub mod finite;
#[cfg(feature = "train")]
pub(crate) mod hash;
pub(crate) mod param;
#[cfg(feature = "preprocess")]
pub(crate) mod text;
