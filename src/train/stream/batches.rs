//! Batches from a source of samples, decoded by many threads.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use burn::config::Config;
use rand::{RngExt, rngs::StdRng};

use super::{SampleError, SampleId, Samples, order::Order};
use crate::{
    clip::{
        preprocess::{ImagePreprocessor, RandomCropConfig, Square},
        tokenizer::ClipTokenizer,
    },
    support::error::ConfigError,
    train::{
        data::{Batch, DataError, Pixels, check_tokens},
        random::rng,
    },
};

/// How batches are drawn from a source.
#[derive(Config, Debug, PartialEq)]
pub struct StreamConfig {
    /// Pairs in a batch, of all ranks together.
    pub batch_size: usize,
    /// Size of the shuffle window: each sample is drawn at random from the so many that come next in the shards. Only a [`TarStream`](super::TarStream) holds
    /// them in memory. Default: 16384
    #[config(default = 16384)]
    pub shuffle: usize,
    /// Most tokens of a caption. Default: 77
    #[config(default = 77)]
    pub context_length: usize,
    /// Ids of the tokenizer; see [`ClipTokenizer::with_vocab_size`]. Default: 49408, all
    #[config(default = 49408)]
    pub vocab_size: usize,
    /// The part of an image that is seen. `None`: what the model sees at inference. Default: open_clip's
    #[config(default = "Some(RandomCropConfig::new())")]
    pub crop: Option<RandomCropConfig>,
    /// Decides order, captions and parts of images. Default: 0
    #[config(default = 0)]
    pub seed: u64,
}

impl StreamConfig {
    /// Refuses settings out of range.
    ///
    /// # Errors
    /// The first one, with its value.
    pub fn validate(&self) -> Result<(), DataError> {
        ConfigError::non_zero("batch_size", self.batch_size)?;
        ConfigError::non_zero("shuffle", self.shuffle)?;
        check_tokens(self.vocab_size, self.context_length)?;
        self.crop.map_or(Ok(()), |crop| crop.validate().map_err(DataError::Config))
    }
}

/// A source of samples, and how they are prepared.
#[derive(Clone)]
pub struct Stream {
    samples: Arc<dyn Samples>,
    preprocessor: ImagePreprocessor,
    tokenizer: Arc<ClipTokenizer>,
    config: StreamConfig,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { samples, preprocessor, config, .. } = self;
        let samples = samples.fingerprint();
        f.debug_struct("Stream").field("samples", &samples).field("preprocessor", preprocessor).field("config", config).finish()
    }
}

/// The pairs of a batch that are this rank's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub ranks: usize,
}

impl Part {
    /// All of a batch.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// This rank's places in a batch.
    pub fn of(&self, batch_size: usize) -> Range<usize> {
        self.rank * batch_size / self.ranks..(self.rank + 1) * batch_size / self.ranks
    }

    /// Refuses a batch of which some rank has no pair.
    pub(in crate::train) fn check(&self, batch_size: usize) -> Result<(), DataError> {
        if batch_size >= self.ranks {
            return Ok(());
        }
        let reason = "a batch needs a pair for each rank";
        Err(DataError::OutOfRange { field: "batch_size", value: batch_size as f64, reason })
    }
}

/// Samples that could not be used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// How many.
    pub count: usize,
    /// The first few.
    pub first: Vec<SampleError>,
}

/// Samples of which [`Skipped`] says why.
const NAMED: usize = 10;

impl Stream {
    /// Samples for a model whose images are prepared by `preprocessor`.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn new(samples: Arc<dyn Samples>, preprocessor: ImagePreprocessor, config: StreamConfig) -> Result<Self, DataError> {
        config.validate()?;
        let tokenizer = Arc::new(ClipTokenizer::with_vocab_size(config.vocab_size));
        Ok(Self { samples, preprocessor, tokenizer, config })
    }

    /// How batches are drawn.
    pub fn config(&self) -> &StreamConfig {
        &self.config
    }

    /// How images are prepared.
    pub fn preprocessor(&self) -> &ImagePreprocessor {
        &self.preprocessor
    }

    /// Which source it is.
    pub fn fingerprint(&self) -> String {
        self.samples.fingerprint()
    }

    /// This part of all batches from `first_step` on, in pieces of at most `piece` pairs, decoded by so many threads.
    ///
    /// # Errors
    /// When the source cannot be shared by ranks.
    pub fn batches(&self, part: Part, piece: usize, threads: usize, first_step: usize) -> Result<StreamBatches, DataError> {
        part.check(self.config.batch_size)?;
        if part.ranks > 1 && self.samples.is_for_one_rank() {
            return Err(DataError::NotShared { name: self.samples.fingerprint(), ranks: part.ranks });
        }
        Ok(StreamBatches::start(self, part, piece.max(1), threads.max(1), first_step))
    }
}

/// A sample that has to be read.
struct Task {
    /// Counts the samples of this rank.
    number: u64,
    epoch: u64,
    id: SampleId,
}

/// A sample that was read.
struct Prepared {
    image: Square,
    caption: Vec<i32>,
}

enum Outcome {
    Good(Prepared),
    Bad(SampleError),
    /// Nothing comes any more.
    End(DataError),
}

/// Batches piece by piece, read ahead by threads that end with it.
pub struct StreamBatches {
    outcomes: mpsc::Receiver<(u64, Outcome)>,
    /// One for each sample that may be read ahead.
    permits: mpsc::Receiver<()>,
    /// Those that came before their turn.
    early: HashMap<u64, Outcome>,
    number: u64,
    stream: Stream,
    /// Whether there are no other ranks, which may have good samples where this one has none.
    is_alone: bool,
    /// Pairs of this rank in a batch, and in a piece.
    own: usize,
    piece: usize,
    /// Pairs of the batch that are done, and good ones among them.
    done: usize,
    good: usize,
    skipped: Skipped,
}

impl StreamBatches {
    fn start(stream: &Stream, part: Part, piece: usize, threads: usize, first_step: usize) -> Self {
        let config = &stream.config;
        let own = part.of(config.batch_size);
        // The next batch is read while the model computes with this one.
        let ahead = own.len() + piece.max(8 * threads);
        let (permit, permits) = mpsc::sync_channel(ahead);
        let (task, tasks) = mpsc::channel();
        let (outcome, outcomes) = mpsc::channel();
        let tasks = Arc::new(Mutex::new(tasks));
        for _ in 0..threads {
            let (stream, tasks, outcome) = (stream.clone(), tasks.clone(), outcome.clone());
            thread::spawn(move || {
                let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).recv();
                // Ends when all is given out.
                while let Ok(Task { number, epoch, id }) = next() {
                    let read = std::panic::AssertUnwindSafe(|| stream.read(epoch, id));
                    // Whoever waits for this sample must hear of it.
                    let read = std::panic::catch_unwind(read).unwrap_or_else(|_| {
                        let sample = format!("sample {} of shard {}", id.place, id.shard);
                        Err(SampleError { sample, reason: "reading it has panicked".into() })
                    });
                    let read = read.map_or_else(Outcome::Bad, Outcome::Good);
                    if outcome.send((number, read)).is_err() {
                        return;
                    }
                }
            });
        }
        let (stream_of_order, range) = (stream.clone(), own.clone());
        thread::spawn(move || {
            let mut number = 0;
            let Stream { samples, config, .. } = stream_of_order;
            let mut order = Order::new(samples.clone(), config.shuffle, config.seed);
            let mut give = || -> Result<(), DataError> {
                order.skip(config.batch_size as u64 * first_step as u64)?;
                loop {
                    for place in 0..config.batch_size {
                        let (epoch, id) = order.next()?;
                        if !range.contains(&place) {
                            samples.pass(id);
                            continue;
                        }
                        if permit.send(()).is_err() || task.send(Task { number, epoch, id }).is_err() {
                            return Ok(());
                        }
                        number += 1;
                    }
                }
            };
            if let Err(error) = give() {
                // Nobody listens any more: nothing is left to do.
                let _ = outcome.send((number, Outcome::End(error)));
            }
        });
        Self {
            outcomes,
            permits,
            early: HashMap::new(),
            number: 0,
            stream: stream.clone(),
            is_alone: part.ranks == 1,
            own: own.len(),
            piece,
            done: 0,
            good: 0,
            skipped: Skipped::default(),
        }
    }

    /// How many pieces a batch has.
    pub fn pieces(&self) -> usize {
        self.own.div_ceil(self.piece)
    }

    /// Samples that could not be used so far.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// The next piece; it may be empty. The last one of a batch may be smaller than others.
    ///
    /// # Errors
    /// When the source cannot be read, or, without other ranks, no sample of a batch can be used.
    pub fn next_piece(&mut self) -> Result<Batch, DataError> {
        let pairs = self.piece.min(self.own - self.done);
        let (mut pixels, mut captions, mut last) = (Vec::new(), Vec::with_capacity(pairs), None);
        for _ in 0..pairs {
            match self.next_outcome()? {
                Outcome::Good(Prepared { image, caption }) => {
                    pixels.extend_from_slice(&image);
                    captions.push(caption);
                }
                Outcome::Bad(error) => {
                    self.skipped.count += 1;
                    if self.skipped.first.len() < NAMED {
                        self.skipped.first.push(error.clone());
                    }
                    last = Some(error);
                }
                Outcome::End(error) => return Err(error),
            }
        }
        self.good += captions.len();
        self.done += pairs;
        if self.done == self.own {
            let good = self.good;
            (self.done, self.good) = (0, 0);
            if let Some(last) = last.filter(|_| good == 0 && self.is_alone) {
                return Err(DataError::NoGoodSample { samples: self.own, last });
            }
        }
        let Stream { preprocessor, tokenizer, config, .. } = &self.stream;
        let texts = tokenizer.pack(&captions, config.context_length);
        let concepts = (0..captions.len()).collect();
        let pixels = Pixels::Bytes { values: pixels, preprocessing: preprocessor.preprocessing };
        Ok(Batch { pixels, image_size: preprocessor.image_size, texts, concepts })
    }

    fn next_outcome(&mut self) -> Result<Outcome, DataError> {
        let outcome = loop {
            if let Some(outcome) = self.early.remove(&self.number) {
                break outcome;
            }
            let stopped = |_| DataError::Stopped { reason: "its threads are gone".into() };
            let (number, outcome) = self.outcomes.recv().map_err(stopped)?;
            self.early.insert(number, outcome);
        };
        self.number += 1;
        // The end took none.
        let _ = self.permits.try_recv();
        Ok(outcome)
    }
}

impl Stream {
    /// Reads and prepares a sample. What is random depends on the seed, the epoch and the sample.
    fn read(&self, epoch: u64, id: SampleId) -> Result<Prepared, SampleError> {
        let sample = self.samples.read(id)?;
        if sample.captions.is_empty() {
            return Err(SampleError { sample: sample.name, reason: "it has no caption".into() });
        }
        let place = ((id.shard as u64) << 32) | id.place as u64;
        let mut rng: StdRng = rng(self.config.seed, 1, [epoch, place]);
        let caption = &sample.captions[rng.random_range(0..sample.captions.len())];
        let caption = self.tokenizer.encode(caption);
        let image = match &self.config.crop {
            None => self.preprocessor.decode(&sample.image),
            Some(crop) => {
                self.preprocessor.decode_cropped(&sample.image, |width, height| crop.draw(width, height, || rng.random::<f32>()))
            }
        };
        let named =
            |error: crate::clip::preprocess::ImageError| SampleError { sample: sample.name.clone(), reason: error.to_string() };
        Ok(Prepared { image: image.map_err(named)?, caption })
    }
}
