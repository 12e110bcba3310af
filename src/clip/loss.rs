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
