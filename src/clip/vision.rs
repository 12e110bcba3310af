//! The vision tower.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor};

use super::{AttentionPooling, ImagePreprocessing, Pooling};
use crate::{
    layer::packed::linear,
    routing::Routing,
    support::{
        cost::Cost,
        error::{ConfigError, expect_valid},
    },
    transformer::{BlockRouter, Encoder, EncoderConfig, EncoderOutput, FeedForwardInputs, TokenGrid, TokenMarks},
};

/// Configuration of a [`VisionTower`].
#[derive(Config, Debug)]
pub struct VisionConfig {
    /// The transformer.
    pub encoder: EncoderConfig,
    /// Side of the square image, in pixels.
    pub image_size: usize,
    /// Side of a square patch, in pixels; must divide `image_size`.
    pub patch_size: usize,
    /// Colour channels. Default: 3
    #[config(default = 3)]
    pub channels: usize,
    /// How images are prepared. Default: CLIP's own way
    #[config(default = "ImagePreprocessing::new()")]
    pub preprocessing: ImagePreprocessing,
    /// Whether a learned class token stands before the patches. Default: true
    #[config(default = true)]
    pub class_token: bool,
    /// Whether each token gets a learned position. A tower without this, and without
    /// [rotary positions](crate::transformer::RotaryPositions), does not know where a patch is. Default: true
    #[config(default = true)]
    pub position_table: bool,
    /// Whether there is a norm before the blocks. Default: true
    #[config(default = true)]
    pub norm_pre: bool,
    /// Whether there is a norm behind the blocks. Default: true
    #[config(default = true)]
    pub norm_post: bool,
    /// What becomes the embedding. Default: `ClassToken`
    #[config(default = "Pooling::ClassToken")]
    pub pooling: Pooling,
}

/// A vision transformer ([arXiv 2010.11929](https://arxiv.org/abs/2010.11929)), by default with CLIP's norm before the blocks and the class
/// token's output as the embedding. Where there is no class token, no token is protected from being dropped by sparse blocks.
#[derive(Module, Debug)]
pub struct VisionTower {
    /// Pixels of a patch (channel, row, column) to a token, `[channels · patch², D]`; no bias.
    pub patch_embedding: Linear,
    /// `[D]`, if there is a class token.
    pub class_embedding: Option<Param<Tensor<1>>>,
    /// One row per token, class token first, `[N, D]`, if positions are learned.
    pub position_embedding: Option<Param<Tensor<2>>>,
    /// Before the blocks.
    pub norm_pre: Option<LayerNorm>,
    /// The blocks.
    pub encoder: Encoder,
    /// On what is pooled, behind the blocks.
    pub norm_post: Option<LayerNorm>,
    /// What becomes the embedding; `None`: the class token.
    pub pooling: Option<AttentionPooling>,
    /// To the shared embedding space, `[D, P]`; no bias.
    pub projection: Linear,
    /// How its images must be prepared.
    #[module(skip)]
    pub preprocessing: ImagePreprocessing,
    image_size: usize,
    patch_size: usize,
}

/// What a [`VisionTower`] returns (`B` images, `N` tokens).
#[derive(Debug, Clone)]
pub struct VisionOutput {
    /// Embedding, not normalised, `[B, P]`.
    pub embedding: Tensor<2>,
    /// Tokens behind the last block, before the final norm, `[B, N, D]`.
    pub hidden: Tensor<3>,
    /// One per routed block.
    pub routings: Vec<Routing>,
}

impl VisionConfig {
    /// Refuses what no tower can be built from.
    ///
    /// # Errors
    /// The first field that cannot be used, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [("image_size", self.image_size), ("patch_size", self.patch_size), ("channels", self.channels)] {
            ConfigError::non_zero(field, value)?;
        }
        if !self.image_size.is_multiple_of(self.patch_size) {
            return Err(ConfigError::NotDivisible {
                field: "image_size",
                value: self.image_size,
                divisor: "patch_size",
                divisor_value: self.patch_size,
            });
        }
        if self.pooling == Pooling::ClassToken && !self.class_token {
            let reason = "without a class token, the embedding needs another source: set `pooling` to `Attention`";
            return Err(ConfigError::Refused { field: "class_token", reason });
        }
        self.preprocessing.validate(self.image_size)?;
        self.encoder.validate()?;
        self.pooling.validate(self.encoder.d_model)
    }

    /// Tokens of one image, with the class token if there is one, `N`.
    pub fn num_tokens(&self) -> usize {
        (self.image_size / self.patch_size).pow(2) + usize::from(self.class_token)
    }

    /// Cost of one image.
    pub fn cost(&self, embed_dim: usize) -> Cost {
        let (d, tokens) = (self.encoder.d_model, self.num_tokens());
        let class = usize::from(self.class_token);
        let patch = Cost::linear(tokens - class, self.channels * self.patch_size.pow(2), d, false);
        let positions = if self.position_table { tokens * d } else { 0 };
        let norms = 2 * d * (usize::from(self.norm_pre) + usize::from(self.norm_post));
        let embeddings = Cost::params(class * d + positions + norms);
        let pooling = self.pooling.cost(tokens, d);
        patch + embeddings + self.encoder.cost(tokens) + pooling + Cost::linear(1, d, embed_dim, false)
    }

    /// A new tower with embeddings of width `embed_dim`.
    ///
    /// # Panics
    /// With the text of [`validate`](Self::validate).
    pub fn init(&self, embed_dim: usize, device: &Device) -> VisionTower {
        expect_valid(self.validate());
        let d_model = self.encoder.d_model;
        let normal = Initializer::Normal { mean: 0.0, std: (d_model as f64).powf(-0.5) };
        let norm = || LayerNormConfig::new(d_model).with_epsilon(self.encoder.norm_epsilon).init(device);
        VisionTower {
            patch_embedding: LinearConfig::new(self.channels * self.patch_size.pow(2), d_model).with_bias(false).init(device),
            class_embedding: self.class_token.then(|| normal.init([d_model], device)),
            position_embedding: self.position_table.then(|| normal.init([self.num_tokens(), d_model], device)),
            norm_pre: self.norm_pre.then(norm),
            encoder: self.encoder.init(device),
            norm_post: self.norm_post.then(norm),
            pooling: self.pooling.init(d_model, self.encoder.norm_epsilon, device),
            projection: LinearConfig::new(d_model, embed_dim).with_bias(false).with_initializer(normal.clone()).init(device),
            preprocessing: self.preprocessing,
            image_size: self.image_size,
            patch_size: self.patch_size,
        }
    }
}

impl VisionTower {
    /// Embeds images.
    ///
    /// # Shapes
    /// - images: `[B, channels, image_size, image_size]`, normalised
    ///
    /// # Panics
    /// When the images do not have the size the tower was made for.
    pub fn forward(&self, images: Tensor<4>) -> VisionOutput {
        let (tokens, marks) = self.embed(images, None);
        self.project(self.encoder.forward(tokens, marks, false))
    }

    /// The embeddings of images alone: those of [`forward`](Self::forward) to rounding, with the last block computed for the class token only, if that is
    /// the embedding (on an autodiff device, in whole).
    ///
    /// # Shapes
    /// - images: `[B, channels, image_size, image_size]`, normalised
    /// - output: `[B, P]`, not normalised
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn embedding(&self, images: Tensor<4>) -> Tensor<2> {
        let (tokens, marks) = self.embed(images, None);
        if self.pooling.is_some() {
            return self.project(self.encoder.forward(tokens, marks, false)).embedding;
        }
        let class = Tensor::zeros([tokens.dims()[0], 1], &tokens.device());
        let class = self.encoder.forward_at(tokens, marks, false, class);
        self.projection.forward(normed(&self.norm_post, class))
    }

    /// Embeds images of which only some patches are looked at, beside the class token if there is one: for training with patch dropout (FLIP,
    /// [arXiv 2212.00794](https://arxiv.org/abs/2212.00794)). Each keeps its own position, learned or rotary.
    ///
    /// # Shapes
    /// - images: `[B, channels, image_size, image_size]`, normalised
    /// - patches: `[B, M]`, places of patches of each image, row by row from 0; their order does not matter
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and when there are not as many rows of patches as images.
    pub fn forward_patches(&self, images: Tensor<4>, patches: Tensor<2, Int>) -> VisionOutput {
        let (tokens, marks) = self.embed(images, Some(patches));
        self.project(self.encoder.forward(tokens, marks, false))
    }

    /// The same as [`forward`](Self::forward) with a router of your own for the routed blocks; see [`Encoder::forward_with`].
    ///
    /// # Panics
    /// As [`forward`](Self::forward), and when a plan does not fit its block.
    pub fn forward_with(&self, images: Tensor<4>, router: &mut dyn BlockRouter) -> VisionOutput {
        let (tokens, marks) = self.embed(images, None);
        self.project(self.encoder.forward_with(tokens, marks, false, router))
    }

    /// Sizes of one image, `[channels, image_size, image_size]`.
    pub(crate) fn image_dims(&self) -> [usize; 3] {
        let [patch_pixels, _] = self.patch_embedding.weight.lazy_shape().dims();
        [patch_pixels / self.patch_size.pow(2), self.image_size, self.image_size]
    }

    /// Patches of one image.
    #[cfg(feature = "train")]
    pub(crate) fn num_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// From what comes out of the blocks.
    pub(crate) fn project(&self, encoded: EncoderOutput) -> VisionOutput {
        let hidden = encoded.hidden.clone();
        let pooled = match &self.pooling {
            None => normed(&self.norm_post, hidden.narrow(1, 0, 1).squeeze_dim(1)),
            Some(pooling) => pooling.forward(normed(&self.norm_post, hidden)),
        };
        let embedding = self.projection.forward::<2>(pooled);
        VisionOutput { embedding, hidden: encoded.hidden, routings: encoded.routings }
    }

    /// What the feed-forward network of each block reads for these images.
    ///
    /// # Panics
    /// As [`forward`](Self::forward).
    pub fn feed_forward_inputs(&self, images: Tensor<4>) -> FeedForwardInputs {
        let (tokens, marks) = self.embed(images, None);
        self.encoder.feed_forward_inputs(tokens, marks, false)
    }

    /// What goes into the blocks, `[B, N, D]`, of all patches or those that are named.
    pub(crate) fn embed(&self, images: Tensor<4>, kept: Option<Tensor<2, Int>>) -> (Tensor<3>, TokenMarks) {
        let [batch, channels, height, width] = images.dims();
        let expected = self.image_dims();
        assert!(
            [channels, height, width] == expected,
            "images of shape {:?} do not fit: expected [B, {}, {}, {}]",
            images.dims(),
            expected[0],
            expected[1],
            expected[2]
        );
        let patch = self.patch_size;
        let (rows, columns) = (height / patch, width / patch);
        let patches = images.reshape([batch, channels, rows, patch, columns, patch]).permute([0, 2, 4, 1, 3, 5]).reshape([
            batch,
            rows * columns,
            channels * patch * patch,
        ]);
        let patches = match &kept {
            None => patches,
            Some(kept) => {
                let [images, count] = kept.dims();
                assert!(images == batch, "patches of {images} images do not fit {batch} images");
                let pixels = channels * patch * patch;
                let first =
                    Tensor::<1, Int>::arange(0..batch as i64, &kept.device()).unsqueeze_dim::<2>(1) * (rows * columns) as i64;
                let chosen = patches.reshape([-1, pixels as i64]).select(0, (kept.clone() + first).flatten::<1>(0, 1));
                chosen.reshape([batch, count, pixels])
            }
        };
        let [_, num_patches, _] = patches.dims();
        let tokens = linear(patches.flatten::<2>(0, 1), &self.patch_embedding, None);
        let [_, d_model] = tokens.dims();
        let mut tokens = tokens.reshape([batch, num_patches, d_model]);
        if let Some(class) = &self.class_embedding {
            let class = class.val().reshape([1, 1, d_model]).expand([batch, 1, d_model]);
            tokens = Tensor::cat(vec![class, tokens], 1);
        }
        if let Some(positions) = &self.position_embedding {
            tokens = tokens + self.positions(positions.val().dequantize(), kept.clone());
        }
        let ([_, num_tokens, _], device) = (tokens.dims(), tokens.device());
        let class = |_| {
            let is_class = Tensor::<1, Int>::arange(0..num_tokens as i64, &device).equal_elem(0);
            is_class.unsqueeze::<2>().expand([batch, num_tokens])
        };
        let grid = TokenGrid::new(rows, columns);
        let grid = match kept {
            None => grid,
            Some(kept) => grid.with_kept(kept),
        };
        let marks = TokenMarks { valid: None, protected: self.class_embedding.as_ref().map(class), grid: Some(grid) };
        (normed(&self.norm_pre, tokens), marks)
    }

    /// The rows of the table `[N, D]` that belong to the tokens: `[1, N, D]`, or with the patches that are kept `[B, M, D]`, the class token's first.
    fn positions(&self, table: Tensor<2>, kept: Option<Tensor<2, Int>>) -> Tensor<3> {
        let Some(kept) = kept else { return table.unsqueeze() };
        let ([batch, count], [_, d_model]) = (kept.dims(), table.dims());
        let ahead = usize::from(self.class_embedding.is_some());
        let own = table.clone().select(0, (kept + ahead as i64).flatten::<1>(0, 1)).reshape([batch, count, d_model]);
        if ahead == 0 {
            return own;
        }
        let of_class = table.narrow(0, 0, 1).reshape([1, 1, d_model]).expand([batch, 1, d_model]);
        Tensor::cat(vec![of_class, own], 1)
    }
}

/// Behind the norm, if there is one.
pub(super) fn normed<const R: usize>(norm: &Option<LayerNorm>, x: Tensor<R>) -> Tensor<R> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}
