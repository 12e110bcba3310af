//! Images with captions: the embedded emoji, a user's own folder, and the batches drawn from either.

mod augment;
mod batch;
mod emoji;
mod error;
mod list;
mod set;

pub use augment::AugmentConfig;
pub(super) use batch::check_tokens;
pub use batch::{Batch, BatchConfig, Batches, Pixels};
pub use emoji::{EmojiPack, EmojiVendor, Language};
pub use error::DataError;
pub use list::{LoadedImages, load_images};
pub use set::{Caption, Concept, ImageTextSet};
