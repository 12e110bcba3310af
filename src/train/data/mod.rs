//! Images with captions: the embedded emoji, a user's own folder, and the batches drawn from either.

mod augment;
mod batch;
mod emoji;
mod error;
mod folder;
mod set;

pub use augment::AugmentConfig;
pub use batch::{Batch, BatchConfig, Batches};
pub use emoji::{EmojiPack, EmojiVendor};
pub use error::DataError;
pub use folder::{LoadedFolder, load_folder};
pub use set::{Concept, ImageTextSet};
