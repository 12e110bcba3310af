//! The contrastive loss.

use burn::tensor::{Int, Tensor, activation::log_softmax};

/// Symmetric cross-entropy over a batch of pairs: row `i` and column `i` belong together (CLIP,
/// [arXiv 2103.00020](https://arxiv.org/abs/2103.00020), figure 3; Sohn 2016).
///
/// # Shapes
/// - logits_per_image: `[B, B]`, scaled cosine similarities
/// - output: `[1]`; `ln B` for equal logits
///
/// # Panics
/// When the matrix is not square.
pub fn contrastive_loss(logits_per_image: Tensor<2>) -> Tensor<1> {
    let [images, texts] = logits_per_image.dims();
    assert!(images == texts, "a contrastive loss needs as many images as texts, got {images} and {texts}");
    let diagonal = Tensor::<1, Int>::arange(0..images as i64, &logits_per_image.device()).unsqueeze_dim::<2>(1);
    let towards = |logits: Tensor<2>| log_softmax(logits, 1).gather(1, diagonal.clone()).mean().neg();
    (towards(logits_per_image.clone()) + towards(logits_per_image.transpose())) / 2.0
}

/// The part of a batch's [`contrastive_loss`] that belongs to some of its rows: summed over all rows, it is the loss. Each row is compared with
/// the whole batch, so that the matrix of logits need not be there at once.
///
/// # Shapes
/// - image_logits, text_logits: `[N, B]`, of images `first` to `first + N` with all texts, and of the texts there with all images
/// - output: `[1]`
///
/// # Panics
/// When the shapes differ, or rows are outside of the batch.
pub fn contrastive_loss_of_rows(image_logits: Tensor<2>, text_logits: Tensor<2>, first: usize) -> Tensor<1> {
    let [rows, batch] = image_logits.dims();
    assert_eq!(image_logits.dims(), text_logits.dims(), "the logits of images and of texts are of other shapes");
    assert!(first + rows <= batch, "rows {first} to {} are outside of a batch of {batch}", first + rows);
    let right = Tensor::<1, Int>::arange(first as i64..(first + rows) as i64, &image_logits.device()).unsqueeze_dim::<2>(1);
    let towards = |logits: Tensor<2>| log_softmax(logits, 1).gather(1, right.clone()).sum().neg();
    (towards(image_logits) + towards(text_logits)) / (2 * batch) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn equal_logits_cost_the_logarithm_of_the_batch() {
        let loss = contrastive_loss(Tensor::ones([5, 5], &Device::default())).into_scalar::<f32>();
        assert!((loss - 5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn rows_sum_to_the_loss_of_the_batch() {
        let device = Device::default();
        let logits = Tensor::<2>::from_data([[3.0, 1.0, -1.0], [2.0, 0.0, 0.5], [0.1, 4.0, 1.0]], &device);
        let whole = contrastive_loss(logits.clone()).into_scalar::<f32>();
        let rows = |tensor: &Tensor<2>, first: usize, end: usize| tensor.clone().narrow(0, first, end - first);
        let texts = logits.clone().transpose();
        let parts = [(0, 2), (2, 3)].map(|(first, end)| {
            contrastive_loss_of_rows(rows(&logits, first, end), rows(&texts, first, end), first).into_scalar::<f32>()
        });
        assert!((parts.iter().sum::<f32>() - whole).abs() < 1e-6);
    }

    #[test]
    fn both_directions_count_the_same() {
        let device = Device::default();
        let logits = Tensor::<2>::from_data([[3.0, 1.0], [2.0, 0.0]], &device);
        // Rows: ln(1 + e^-2), ln(1 + e^2); columns: ln(1 + e^-1), ln(1 + e^1).
        let want = ((-2f32).exp().ln_1p() + 2f32.exp().ln_1p() + (-1f32).exp().ln_1p() + 1f32.exp().ln_1p()) / 4.0;
        let got = contrastive_loss(logits.clone()).into_scalar::<f32>();
        assert!((got - want).abs() < 1e-6, "{got} is not {want}");
        assert_eq!(contrastive_loss(logits.transpose()).into_scalar::<f32>(), got);
    }
}
