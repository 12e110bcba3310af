//! Gating logit normalisation.

use burn::tensor::Tensor;

/// Added to the variance, squared: logits that are closer to each other than this are not driven apart.
const LEAST_STD: f64 = 1e-4;

/// `scale · (z − mean(z)) / √(var(z) + 1e-8)` for each row `z` of `logits` `[T, E]`; a row that is not finite becomes NaN.
pub(super) fn normalized(logits: Tensor<2>, scale: f64) -> Tensor<2> {
    // The result does not depend on the unit. In this one, sums and squares of the largest logits are finite.
    let unit = logits.clone().detach().abs().max_dim(1).clamp_min(1.0);
    let logits = logits / unit.clone();
    let centred = logits.clone() - logits.mean_dim(1);
    let least = unit.recip().mul_scalar(LEAST_STD).square().clamp_min(f64::from(f32::MIN_POSITIVE));
    let std = (centred.clone().square().mean_dim(1) + least).sqrt();
    centred / std * scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, activation::softmax};

    fn values(x: &Tensor<2>) -> Vec<f32> {
        x.clone().detach().try_into_vec_as().unwrap()
    }

    /// In f64, by the formula.
    fn by_hand(logits: [f64; 4], scale: f64) -> [f64; 4] {
        let mean = logits.iter().sum::<f64>() / 4.0;
        let variance = logits.iter().map(|z| (z - mean).powi(2)).sum::<f64>() / 4.0;
        logits.map(|z| scale * (z - mean) / (variance + 1e-8).sqrt())
    }

    /// `Σ_e weight_e · softmax(z~)_e`
    fn loss_by_hand(logits: [f64; 4], scale: f64, weights: [f64; 4]) -> f64 {
        let exp = by_hand(logits, scale).map(f64::exp);
        exp.iter().zip(weights).map(|(exp, weight)| exp * weight).sum::<f64>() / exp.iter().sum::<f64>()
    }

    const ROWS: [[f32; 4]; 4] =
        [[0.3, -1.2, 2.5, 0.7], [1e-3, 2e-3, -1e-3, 0.0], [40.0, 41.0, 39.0, 44.0], [-7.0, 120.0, 3.0, -60.0]];

    #[test]
    fn rows_have_mean_0_and_the_scale_as_their_standard_deviation() {
        for scale in [1.0, 2.5] {
            let found = values(&normalized(Tensor::from_floats(ROWS, &Device::default()), scale));
            for (found, row) in found.chunks(4).zip(ROWS) {
                let expected = by_hand(row.map(f64::from), scale);
                let close = found.iter().zip(expected).all(|(found, expected)| (f64::from(*found) - expected).abs() < 3e-5);
                assert!(close, "{found:?} {expected:?}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_finite_differences() {
        let device = Device::default().autodiff();
        let (scale, weights) = (1.5, [0.2, -1.0, 0.7, 2.0]);
        let logits = Tensor::<2>::from_floats(ROWS, &device).require_grad();
        let loss = softmax(normalized(logits.clone(), scale), 1) * Tensor::<1>::from_floats(weights, &device).unsqueeze();
        let found = values(&logits.grad(&loss.sum().backward()).unwrap());
        for (found, row) in found.chunks(4).zip(ROWS) {
            let row = row.map(f64::from);
            let spread = row.iter().fold(0f64, |most, z| most.max((z - row[0]).abs()));
            let step = 1e-5 * spread;
            let slope = |expert: usize| {
                let moved = |by: f64| {
                    let mut moved = row;
                    moved[expert] += by;
                    loss_by_hand(moved, scale, weights)
                };
                (moved(step) - moved(-step)) / (2.0 * step)
            };
            let expected: Vec<f64> = (0..4).map(slope).collect();
            let largest = expected.iter().fold(0f64, |most, slope| most.max(slope.abs()));
            let close = found.iter().zip(&expected).all(|(found, expected)| (f64::from(*found) - expected).abs() < 1e-4 * largest);
            assert!(close && largest > 0.0, "{found:?} {expected:?}");
        }
    }

    #[test]
    fn equal_and_very_large_logits_have_finite_values_and_gradients() {
        let device = Device::default().autodiff();
        let rows = [[0.0; 4], [5.3; 4], [-3e38; 4], [3e38, -3e38, 0.0, 1.5e38], [1e30, 2e30, 3e30, 4e30]];
        let logits = Tensor::<2>::from_floats(rows, &device).require_grad();
        let probs = softmax(normalized(logits.clone(), 1.0), 1);
        let found = values(&probs);
        assert!(found[..12].iter().all(|prob| (prob - 0.25).abs() < 1e-6), "{found:?}");
        let gradient = logits.grad(&probs.square().sum().backward()).unwrap();
        assert!(values(&gradient).iter().all(|slope| slope.is_finite()), "{gradient}");
        // However large: as 1, 2, 3, 4 and as 2, −2, 0, 1.
        for (found, row) in [(&found[12..16], [2.0, -2.0, 0.0, 1.0]), (&found[16..], [1.0, 2.0, 3.0, 4.0])] {
            let exp = by_hand(row, 1.0).map(f64::exp);
            let expected = exp.map(|e| e / exp.iter().sum::<f64>());
            assert!(found.iter().zip(expected).all(|(found, expected)| (f64::from(*found) - expected).abs() < 1e-5), "{found:?}");
        }
    }
}
