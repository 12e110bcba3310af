//! Batches in an order that only the seed decides.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ops::Range,
    sync::mpsc,
    thread,
};

use burn::config::Config;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rand::{RngExt, rngs::StdRng, seq::SliceRandom};

use super::{AugmentConfig, Caption, DataError, ImageTextSet};
use crate::clip::{
    ImagePreprocessing,
    tokenizer::{ClipTokenizer, TokenizedTexts, first_of_equal},
};
use crate::train::random::rng;

/// How batches are drawn.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct BatchConfig {
    /// Pairs in a batch; neither a concept nor a caption stands in it twice, as far as a caption fits the context. Default: 256
    #[config(default = 256)]
    pub batch_size: usize,
    /// Most tokens of a caption. Default: 24
    #[config(default = 24)]
    pub context_length: usize,
    /// Ids of the tokenizer; see [`ClipTokenizer::with_vocab_size`]. Default: 49408, all
    #[config(default = 49408)]
    pub vocab_size: usize,
    /// How often tags are added to a caption that has some. Default: 0.5
    #[config(default = 0.5)]
    pub tag_probability: f64,
    /// Most tags that are added. Default: 3
    #[config(default = 3)]
    pub max_tags: usize,
    /// Changes to images. Default: [`AugmentConfig::new`]
    #[config(default = "AugmentConfig::new()")]
    pub augment: AugmentConfig,
}

impl BatchConfig {
    /// Refuses settings out of range.
    ///
    /// # Errors
    /// The first one, with its value.
    pub fn validate(&self) -> Result<(), DataError> {
        self.augment.validate()?;
        if !(0.0..=1.0).contains(&self.tag_probability) {
            let (value, reason) = (self.tag_probability, "a probability lies between 0 and 1");
            return Err(DataError::OutOfRange { field: "tag_probability", value, reason });
        }
        check_tokens(self.vocab_size, self.context_length)
    }

    /// The largest batch that a set allows: concepts that have captions in common, directly or through others, count as one.
    pub fn largest_batch(&self, set: &ImageTextSet) -> usize {
        Drawer::new(set, *self, 0).groups()
    }
}

/// Refuses what no caption can be tokenized with.
pub(in crate::train) fn check_tokens(vocab_size: usize, context_length: usize) -> Result<(), DataError> {
    let refuse = |field, value: usize, reason| Err(DataError::OutOfRange { field, value: value as f64, reason });
    if !(ClipTokenizer::SMALLEST_VOCAB_SIZE..=ClipTokenizer::VOCAB_SIZE).contains(&vocab_size) {
        return refuse("vocab_size", vocab_size, "CLIP's tokenizer has 514 to 49408 ids");
    }
    if context_length < 3 {
        return refuse("context_length", context_length, "a caption needs a start token, a word and an end token");
    }
    Ok(())
}

/// The images of a batch.
#[derive(Debug, Clone, PartialEq)]
pub enum Pixels {
    /// `[B, 3, image_size, image_size]`
    Normalized(Vec<f32>),
    /// `[B, image_size, image_size, 3]`, to be normalised on the device: a quarter of the memory.
    Bytes {
        /// RGB, row by row.
        values: Vec<u8>,
        /// Mean and standard deviation of the channels.
        preprocessing: ImagePreprocessing,
    },
}

/// One batch, or a piece of one, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The images.
    pub pixels: Pixels,
    /// Side of the images.
    pub image_size: usize,
    /// `[B, N]`
    pub texts: TokenizedTexts,
    /// The concept of each pair.
    pub concepts: Vec<usize>,
}

impl Batch {
    /// Pairs, `B`.
    pub fn len(&self) -> usize {
        self.concepts.len()
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.concepts.is_empty()
    }

    /// Some of the pairs.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let of = |size: usize| range.start * size..range.end * size;
        let texts = TokenizedTexts { ids: self.texts.ids[of(self.texts.len)].to_vec(), len: self.texts.len, truncated: 0 };
        let values = of(3 * self.image_size * self.image_size);
        let pixels = match &self.pixels {
            Pixels::Normalized(pixels) => Pixels::Normalized(pixels[values].to_vec()),
            Pixels::Bytes { values: bytes, preprocessing } => {
                Pixels::Bytes { values: bytes[values].to_vec(), preprocessing: *preprocessing }
            }
        };
        Self { pixels, image_size: self.image_size, texts, concepts: self.concepts[range].to_vec() }
    }

    /// `[B, 3, image_size, image_size]`
    pub fn images(&self, device: &Device) -> Tensor<4> {
        let (pairs, side) = (self.len(), self.image_size);
        match &self.pixels {
            Pixels::Normalized(pixels) => Tensor::from_data(TensorData::new(pixels.clone(), [pairs, 3, side, side]), device),
            Pixels::Bytes { values, preprocessing: ImagePreprocessing { mean, std, .. } } => {
                let bytes = TensorData::new(values.clone(), [pairs, side, side, 3]);
                let bytes = Tensor::<4, Int>::from_data(bytes, (device, DType::U8)).permute([0, 3, 1, 2]);
                let by_channel = |values: [f32; 3]| Tensor::<1>::from_floats(values, device).reshape([1, 3, 1, 1]);
                let offset = by_channel(std::array::from_fn(|channel| mean[channel] / std[channel]));
                bytes.float() * by_channel(std.map(|std| 1.0 / (255.0 * std))) - offset
            }
        }
    }

    /// `[B, N]`
    pub fn tokens(&self, device: &Device) -> Tensor<2, Int> {
        self.texts.tensor(device)
    }
}

/// An endless row of batches, made ahead on another thread.
#[derive(Debug)]
pub struct Batches {
    receiver: mpsc::Receiver<Batch>,
}

impl Batches {
    /// Batches from `first_step` on; the batch of a step depends on the seed and the step alone.
    ///
    /// # Errors
    /// When the set has fewer concepts with images than a batch needs, or a setting is out of range.
    pub fn new(set: &ImageTextSet, config: BatchConfig, seed: u64, first_step: usize) -> Result<Self, DataError> {
        config.validate()?;
        let mut drawer = Drawer::new(set, config, seed);
        let concepts = drawer.groups();
        if config.batch_size == 0 || concepts < config.batch_size {
            return Err(DataError::TooFewConcepts { batch_size: config.batch_size, concepts });
        }
        let (sender, receiver) = mpsc::sync_channel(2);
        thread::spawn(move || {
            // Ends when the receiver is gone.
            (first_step..).map(move |step| drawer.draw(step)).try_for_each(|batch| sender.send(batch).ok())
        });
        Ok(Self { receiver })
    }
}

impl Iterator for Batches {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        self.receiver.recv().ok()
    }
}

struct EncodedCaption {
    text: Vec<i32>,
    tags: Vec<Vec<i32>>,
}

struct Drawer {
    set: ImageTextSet,
    config: BatchConfig,
    seed: u64,
    tokenizer: ClipTokenizer,
    comma: Vec<i32>,
    /// Those of each concept.
    captions: Vec<Vec<EncodedCaption>>,
    /// The images of each concept that has some.
    images_of_concept: Vec<Vec<usize>>,
    /// What each of these can say: numbers that are equal for equal captions.
    captions_of_concept: Vec<Vec<usize>>,
    /// The batches of the last round that was asked for, and which it was.
    round: (Option<u64>, Vec<Vec<usize>>),
}

impl Drawer {
    fn new(set: &ImageTextSet, config: BatchConfig, seed: u64) -> Self {
        let tokenizer = ClipTokenizer::with_vocab_size(config.vocab_size);
        let encode = |caption: &Caption| EncodedCaption {
            text: tokenizer.encode(&caption.text),
            tags: caption.tags.iter().map(|tag| tokenizer.encode(tag)).collect(),
        };
        let captions: Vec<Vec<EncodedCaption>> =
            set.concepts.iter().map(|concept| concept.captions.iter().map(encode).collect()).collect();
        let mut images_of_concept = vec![Vec::new(); set.concepts.len()];
        for (image, &concept) in set.concept_of_image.iter().enumerate() {
            images_of_concept[concept].push(image);
        }
        // What the model reads of a caption: start and end take two places.
        let room = config.context_length.saturating_sub(2);
        let read: Vec<&[i32]> = captions.iter().flatten().map(|caption| &caption.text[..caption.text.len().min(room)]).collect();
        let mut numbers = first_of_equal(&read).into_iter();
        let captions_of_concept: Vec<Vec<usize>> =
            captions.iter().map(|captions| numbers.by_ref().take(captions.len()).collect()).collect();
        let has_images = |concept: &usize| !images_of_concept[*concept].is_empty();
        let captions_of_concept =
            (0..captions.len()).filter(has_images).map(|concept| captions_of_concept[concept].clone()).collect();
        images_of_concept.retain(|images| !images.is_empty());
        Self {
            set: set.clone(),
            config,
            seed,
            comma: tokenizer.encode(","),
            captions,
            images_of_concept,
            captions_of_concept,
            round: (None, Vec::new()),
            tokenizer,
        }
    }

    /// Concepts of which a batch may hold one each, whatever else it holds: those that share captions with each other, directly or through
    /// others, count as one.
    fn groups(&self) -> usize {
        // The first concept of each caption, and where each concept's group begins.
        let mut first = HashMap::new();
        let mut group: Vec<usize> = (0..self.captions_of_concept.len()).collect();
        let root = |group: &[usize], mut concept: usize| {
            while group[concept] != concept {
                concept = group[concept];
            }
            concept
        };
        for (concept, captions) in self.captions_of_concept.iter().enumerate() {
            for caption in captions {
                let [a, b] = [*first.entry(caption).or_insert(concept), concept].map(|concept| root(&group, concept));
                group[a.max(b)] = a.min(b);
                group[concept] = a.min(b);
            }
        }
        group.iter().enumerate().filter(|(concept, group)| concept == *group).count()
    }

    /// The concepts of each batch of a round, in which each stands once where that is possible. A concept that shares a caption with one of the
    /// batch waits for the next; where too few are left at the end of a round, some stand a second time.
    fn batches_of_round(&self, round: u64) -> Vec<Vec<usize>> {
        let size = self.config.batch_size;
        let mut order: Vec<usize> = (0..self.images_of_concept.len()).collect();
        order.shuffle(&mut rng(self.seed, 0, [round, 0]));
        let mut next = order.iter().copied();
        let mut waiting = VecDeque::new();
        let mut batches = Vec::new();
        for _ in 0..order.len() / size {
            let (mut batch, mut said) = (Vec::with_capacity(size), HashSet::<usize>::new());
            let mut take = |concept: usize, batch: &mut Vec<usize>| {
                let captions = &self.captions_of_concept[concept];
                let fits = captions.iter().all(|caption| !said.contains(caption));
                if fits {
                    said.extend(captions);
                    batch.push(concept);
                }
                fits
            };
            for _ in 0..waiting.len() {
                let concept = waiting.pop_front().expect("as many as there were");
                if batch.len() == size || !take(concept, &mut batch) {
                    waiting.push_back(concept);
                }
            }
            while batch.len() < size
                && let Some(concept) = next.next()
            {
                if !take(concept, &mut batch) {
                    waiting.push_back(concept);
                }
            }
            order.iter().for_each(|concept| {
                if batch.len() < size {
                    take(*concept, &mut batch);
                }
            });
            batches.push(batch);
        }
        batches
    }

    /// The batch of a step: for each of its concepts a random image and caption.
    fn draw(&mut self, step: usize) -> Batch {
        let (size, side) = (self.config.batch_size, self.set.image_size);
        let per_round = self.images_of_concept.len() / size;
        let round = (step / per_round) as u64;
        if self.round.0 != Some(round) {
            self.round = (Some(round), self.batches_of_round(round));
        }
        let chosen = &self.round.1[step % per_round];

        let mut rng = rng(self.seed, 1, [step as u64, 0]);
        let len = 3 * side * side;
        let mut pixels = vec![0.0; size * len];
        let mut texts = Vec::with_capacity(size);
        let mut concepts = Vec::with_capacity(size);
        for (&index, out) in chosen.iter().zip(pixels.chunks_exact_mut(len)) {
            let images = &self.images_of_concept[index];
            let image = images[rng.random_range(0..images.len())];
            let concept = self.set.concept_of_image[image];
            self.config.augment.apply(self.set.image(image), side, &self.set.preprocessing, out, &mut rng);
            texts.push(self.caption(concept, &mut rng));
            concepts.push(concept);
        }
        let texts = self.tokenizer.pack(&texts, self.config.context_length);
        Batch { pixels: Pixels::Normalized(pixels), image_size: side, texts, concepts }
    }

    /// A caption of the concept, sometimes with a few of its tags behind it.
    fn caption(&self, concept: usize, rng: &mut StdRng) -> Vec<i32> {
        let captions = &self.captions[concept];
        let EncodedCaption { text, tags } = &captions[rng.random_range(0..captions.len())];
        let mut caption = text.clone();
        let most = self.config.max_tags.min(tags.len());
        if most > 0 && rng.random_bool(self.config.tag_probability) {
            let count = rng.random_range(1..=most);
            let mut order: Vec<usize> = (0..tags.len()).collect();
            for &tag in order.partial_shuffle(rng, count).0.iter() {
                caption.extend_from_slice(&self.comma);
                caption.extend_from_slice(&tags[tag]);
            }
        }
        caption
    }
}
