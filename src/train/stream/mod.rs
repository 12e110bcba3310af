//! Pairs of images and captions that do not fit in memory: tar shards, lists and folders, read and decoded while a model trains.
//!
//! The order of the pairs depends on the seed alone: neither on the number of threads that decode, nor on the number of ranks that share a
//! batch. Every sample stands in each epoch exactly once. One that cannot be read is left out of its batch, and counted.

mod batches;
mod listed;
mod open;
mod order;
mod samples;
mod shards;
mod tar;

pub use batches::{Part, Skipped, Stream, StreamBatches, StreamConfig};
pub use listed::ListedImages;
pub use open::{is_tar, open_samples};
pub use samples::{Sample, SampleError, SampleId, Samples, load_samples};
pub use shards::expand_braces;
pub use tar::{TarShards, TarStream};
