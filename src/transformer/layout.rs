//! How the tokens of a batch lie in rows, and what they look at.

use std::{cell::OnceCell, sync::Arc};

use burn::nn::attention::generate_autoregressive_mask;
use burn::tensor::{Bool, Device, Int, Tensor};

use super::{TokenMarks, TransformerBlock, rotary::Rotation};
use crate::ops::{has_attention, int_tensor};

/// The tokens of a batch as rows `[R, D]`: all of them, or those that are not padding.
pub(super) struct Layout {
    batch: usize,
    num_tokens: usize,
    pub(super) looks: Looks,
    /// First row of each sample and the end, `[B + 1]`.
    pub(super) samples: Arc<[usize]>,
    packed: Option<Packed>,
    /// What turns queries and keys, of a layout that is not packed.
    pub(super) rotation: Option<Rotation>,
    /// See [`mask`](Self::mask).
    causal_mask: OnceCell<Tensor<3, Bool>>,
}

/// What a token looks at in its sample.
#[allow(clippy::large_enum_variant)] // one for each pass through an encoder
pub(super) enum Looks {
    /// Everything.
    AtAll,
    /// Itself, and what is before it.
    Back,
    /// What this mask, `[B, N, N]`, does not forbid.
    Mask(Tensor<3, Bool>),
}

/// Where the rows come from and go to.
struct Packed {
    /// Token of each row, `[R]`.
    token_of_row: Tensor<1, Int>,
    /// Row of each token, `[B · N]`; `R` for padding.
    row_of_token: Tensor<1, Int>,
}

impl Layout {
    /// A row for every token.
    pub(super) fn whole([batch, num_tokens]: [usize; 2], looks: Looks) -> Self {
        let samples = (0..=batch).map(|sample| sample * num_tokens).collect();
        Self { batch, num_tokens, looks, samples, packed: None, rotation: None, causal_mask: OnceCell::new() }
    }

    /// The layout for a block that turns queries and keys, with a row for every token.
    ///
    /// # Panics
    /// When nothing says where the tokens are.
    pub(super) fn turned(self, block: &TransformerBlock, marks: &TokenMarks, device: &Device) -> Self {
        let Some(rotary) = &block.rotary else { return self };
        let grid = marks.grid.as_ref().expect("rotary positions need to know where tokens are: set `TokenMarks::grid`");
        let rotation = Rotation::new(rotary, grid, self.dims(), block.attention.d_k, device);
        Self { rotation: Some(rotation), ..self }
    }

    /// A row for every token that is not padding, if that changes nothing for the others: where padding is behind them, and they look back.
    pub(super) fn packed(x: &Tensor<3>, marks: &TokenMarks) -> Self {
        let [batch, num_tokens, _] = x.dims();
        let mut layout = Self::whole([batch, num_tokens], Looks::Back);
        let device = &x.device();
        let Some(valid) = marks.valid.as_ref().filter(|_| has_attention(device, x.dtype())) else { return layout };
        let valid: Vec<bool> = valid.clone().into_data().iter::<bool>().collect();
        let (mut samples, mut token_of_row, mut row_of_token) = (vec![0], Vec::new(), Vec::new());
        for (sample, valid) in valid.chunks(num_tokens.max(1)).enumerate() {
            let count = valid.iter().take_while(|valid| **valid).count();
            if valid[count..].contains(&true) {
                return layout;
            }
            let start = token_of_row.len();
            token_of_row.extend((0..count).map(|token| (sample * num_tokens + token) as i32));
            row_of_token.extend((0..num_tokens).map(|token| if token < count { (start + token) as i32 } else { -1 }));
            samples.push(token_of_row.len());
        }
        let rows = token_of_row.len() as i32;
        if row_of_token.len() == token_of_row.len() || rows == 0 {
            return layout;
        }
        row_of_token.iter_mut().filter(|row| **row < 0).for_each(|row| *row = rows);
        layout.samples = samples.into();
        layout.packed =
            Some(Packed { token_of_row: int_tensor(token_of_row, device), row_of_token: int_tensor(row_of_token, device) });
        layout
    }

    /// The rows of one token of each sample, which is not padding: `[B, 1] -> [B]`.
    ///
    /// # Panics
    /// When it is padding, which has no row in a packed layout.
    pub(super) fn rows_at(&self, at: &Tensor<2, Int>) -> Tensor<1, Int> {
        if self.is_packed() {
            let at: Vec<i64> = at.clone().into_data().iter::<i64>().collect();
            for (sample, (at, bounds)) in at.iter().zip(self.samples.windows(2)).enumerate() {
                let rows = bounds[1] - bounds[0];
                assert!((0..rows as i64).contains(at), "token {at} of sample {sample} is padding: {rows} of its tokens are not");
            }
        }
        let first = self.samples[..self.batch].iter().map(|&row| row as i32).collect();
        int_tensor(first, &at.device()) + at.clone().reshape([self.batch])
    }

    /// Whether padding has no rows.
    pub(super) fn is_packed(&self) -> bool {
        self.packed.is_some()
    }

    /// Samples, and tokens of each with padding.
    pub(super) fn dims(&self) -> [usize; 2] {
        [self.batch, self.num_tokens]
    }

    /// Rows of the longest sample.
    pub(super) fn longest(&self) -> usize {
        self.samples.windows(2).map(|sample| sample[1] - sample[0]).max().unwrap_or(0)
    }

    /// `[B, N, D] -> [R, D]`
    pub(super) fn rows(&self, x: Tensor<3>) -> Tensor<2> {
        let [batch, num_tokens, d_model] = x.dims();
        let rows = x.reshape([batch * num_tokens, d_model]);
        match &self.packed {
            Some(packed) => rows.select(0, packed.token_of_row.clone()),
            None => rows,
        }
    }

    /// `[R, D] -> [B, N, D]`, zeros where there is no row.
    pub(super) fn tokens(&self, rows: Tensor<2>) -> Tensor<3> {
        let [_, d_model] = rows.dims();
        let rows = match &self.packed {
            Some(packed) => {
                let nothing = Tensor::zeros([1, d_model], (&rows.device(), rows.dtype()));
                Tensor::cat(vec![rows, nothing], 0).select(0, packed.row_of_token.clone())
            }
            None => rows,
        };
        rows.reshape([self.batch, self.num_tokens, d_model])
    }

    /// `[B, N, N]`, true where a token must not look; for rows of all tokens.
    pub(super) fn mask(&self, device: &Device) -> Option<Tensor<3, Bool>> {
        match &self.looks {
            Looks::AtAll => None,
            Looks::Back => {
                let mask = || generate_autoregressive_mask(self.batch, self.num_tokens, device);
                Some(self.causal_mask.get_or_init(mask).clone())
            }
            Looks::Mask(mask) => Some(mask.clone()),
        }
    }
}
