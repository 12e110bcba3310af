//! Flags of tokens, on a device and on the host.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, Device, Shape, Tensor, read_sync};

/// A flag per token, on the mask's device; the host reads it once, when needed.
#[derive(Debug, Clone)]
pub struct TokenMask {
    flags: Tensor<1, Bool>,
    shape: Vec<usize>,
    host: Arc<OnceLock<Vec<bool>>>,
}

impl TokenMask {
    /// Flags of any shape, in the order of the tokens.
    pub fn new<const M: usize>(mask: Tensor<M, Bool>) -> Self {
        Self { shape: mask.dims().to_vec(), flags: mask.flatten(0, M as i32 - 1), host: Arc::default() }
    }

    /// The flags, `[T]`; waits for their device at the first call.
    ///
    /// # Panics
    /// On a device that the host cannot wait for, as in a browser, before [`read_async`](Self::read_async).
    pub fn as_slice(&self) -> &[bool] {
        self.host.get_or_init(|| read_sync(self.read()))
    }

    /// Reads the flags, so that [`as_slice`](Self::as_slice) need not wait: for a device that the host cannot wait for, as in a browser.
    pub async fn read_async(&self) {
        if self.host.get().is_none() {
            // What somebody else has read meanwhile is the same.
            let _ = self.host.set(self.read().await);
        }
    }

    async fn read(&self) -> Vec<bool> {
        let data = self.flags.clone().into_data_async().await.expect("the device can be read");
        data.iter::<bool>().collect()
    }

    /// How many flags there are, `T`.
    pub fn len(&self) -> usize {
        self.flags.dims()[0]
    }

    /// Whether there is no flag.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The flags on `device`, `[T]`.
    pub(crate) fn tensor(&self, device: &Device) -> Tensor<1, Bool> {
        self.flags.clone().to_device(device)
    }

    /// `[T, 1]`, true where the flag is not set.
    pub(crate) fn unset(&self, device: &Device) -> Tensor<2, Bool> {
        self.tensor(device).bool_not().unsqueeze_dim(1)
    }

    /// Refuses a mask that is not one of `num_tokens` tokens of `shape`.
    #[track_caller]
    pub(crate) fn expect_fits(&self, shape: &Shape, num_tokens: usize) {
        let leading = &shape[..shape.num_dims() - 1];
        assert!(
            self.shape == leading || self.shape == [num_tokens],
            "a mask of shape {:?} does not fit tokens of shape {:?}: expected {leading:?} or [{num_tokens}]",
            self.shape,
            shape.as_slice()
        );
    }
}
