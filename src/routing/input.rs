//! What goes into a layer and what comes out.

use burn::tensor::{Bool, Shape, Tensor};

use super::Routing;
use crate::routing::mask::TokenMask;

/// Tokens with what is known about them.
///
/// ```
/// # use burn::tensor::{Bool, Device, Tensor};
/// # use burn_moe::{MoeFeedForwardConfig, MoeInput};
/// # let device = Device::default();
/// # let moe = MoeFeedForwardConfig::new(8, 16, 4).init(&device);
/// # let x = Tensor::<3>::ones([2, 5, 8], &device);
/// # let not_padding = Tensor::<2, Bool>::from_data([[true, true, true, false, false]; 2], &device);
/// let output = moe.forward(MoeInput::new(x).valid(not_padding)).output;
/// ```
#[derive(Debug, Clone)]
pub struct MoeInput<const R: usize> {
    x: Tensor<R>,
    valid: Option<TokenMask>,
    protected: Option<TokenMask>,
}

/// What a sparse layer returns.
#[derive(Debug, Clone)]
pub struct MoeOutput<const R: usize> {
    /// Same shape as the input.
    pub output: Tensor<R>,
    /// The router's output and the plan.
    pub routing: Routing,
}

impl<const R: usize> MoeInput<R> {
    /// Tokens `[.., D]`, all valid.
    pub fn new(x: Tensor<R>) -> Self {
        Self { x, valid: None, protected: None }
    }

    /// True means a token that is not padding; burn's own padding masks mean the opposite, and go to [`mask_pad`](Self::mask_pad). The shape is
    /// that of the input without its last axis, or `[T]`. Padding gets no slot, comes out as
    /// exactly 0, and counts in no loss and no statistic.
    pub fn valid<const M: usize>(mut self, mask: Tensor<M, Bool>) -> Self {
        self.valid = Some(TokenMask::new(mask));
        self
    }

    /// Which tokens are padding, as burn's `MhaInput::mask_pad` takes it: the opposite of [`valid`](Self::valid), which replaces it and which
    /// it replaces.
    pub fn mask_pad<const M: usize>(self, mask: Tensor<M, Bool>) -> Self {
        self.valid(mask.bool_not())
    }

    /// True for tokens that get their slots before all others; the shape as for [`valid`](Self::valid). A protected choice is dropped only if its
    /// expert has more protected choices than slots. Only token choice has protected tokens.
    pub fn protected<const M: usize>(mut self, mask: Tensor<M, Bool>) -> Self {
        self.protected = Some(TokenMask::new(mask));
        self
    }
}

/// An input as a layer works on it.
pub(crate) struct FlatTokens {
    /// `[T, D]`; padding is zero.
    pub x: Tensor<2>,
    /// The shape it came in.
    pub shape: Shape,
    /// Tokens of one index of the first axis; all of them for `[T, D]`.
    pub per_sample: usize,
    pub valid: Option<TokenMask>,
    pub protected: Option<TokenMask>,
}

impl<const R: usize> MoeInput<R> {
    /// Checks shapes and masks, and zeroes padding.
    #[track_caller]
    pub(crate) fn into_tokens(self, d_model: usize) -> FlatTokens {
        let shape = self.x.shape();
        assert!(
            R >= 2 && shape[R - 1] == d_model,
            "tokens of shape {:?} do not fit a layer of width {d_model}: expected [.., {d_model}]",
            shape.as_slice()
        );
        let num_tokens = shape[..R - 1].iter().product();
        let (valid, protected) = (self.valid, self.protected);
        for mask in [&valid, &protected].into_iter().flatten() {
            mask.expect_fits(&shape, num_tokens);
        }
        let x = if num_tokens == 0 {
            // burn reads a size of 0 in a new shape as "keep".
            Tensor::zeros([0, d_model], (&self.x.device(), self.x.dtype()))
        } else {
            self.x.reshape([num_tokens, d_model])
        };
        let x = match &valid {
            // Whatever padding holds, NaN included, stops here.
            Some(valid) if num_tokens > 0 => x.clone().mask_fill(valid.unset(&x.device()), 0.0),
            _ => x,
        };
        let per_sample = if R == 2 { num_tokens } else { num_tokens / shape[0].max(1) };
        FlatTokens { x, shape, per_sample, valid, protected }
    }
}

/// Rows `[T, D]` in the shape that they came in.
pub(crate) fn shaped<const R: usize>(x: Tensor<2>, shape: Shape) -> Tensor<R> {
    if shape.num_elements() == 0 {
        return Tensor::zeros(shape, (&x.device(), x.dtype()));
    }
    x.reshape(shape)
}

impl<const R: usize> From<Tensor<R>> for MoeInput<R> {
    fn from(x: Tensor<R>) -> Self {
        Self::new(x)
    }
}
