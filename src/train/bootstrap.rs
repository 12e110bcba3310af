//! Paired bootstrap intervals of a difference between two models.

use rand::{RngExt, SeedableRng, rngs::StdRng};

/// A difference of two means over the same queries, with its interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct PairedBootstrap {
    /// Mean of the second minus mean of the first.
    pub difference: f64,
    /// Lower end of the 95 % interval.
    pub low: f64,
    /// Upper end of the 95 % interval.
    pub high: f64,
}

/// Resamples queries with replacement 10,000 times, keeping each query's two results together (percentile interval).
///
/// # Panics
/// When the two do not have the same number of results, or none.
pub fn paired_bootstrap(first: &[f64], second: &[f64], seed: u64) -> PairedBootstrap {
    const RESAMPLES: usize = 10_000;
    let n = first.len();
    assert!(n == second.len() && n > 0, "paired results needed, got {n} and {}", second.len());
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| b - a).collect();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut means: Vec<f64> =
        (0..RESAMPLES).map(|_| (0..n).map(|_| differences[rng.random_range(0..n)]).sum::<f64>() / n as f64).collect();
    means.sort_by(f64::total_cmp);
    PairedBootstrap {
        difference: differences.iter().sum::<f64>() / n as f64,
        low: means[RESAMPLES * 25 / 1000],
        high: means[RESAMPLES * 975 / 1000],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constant_difference_has_no_spread_and_noise_has_the_normal_one() {
        let first = vec![0.0; 50];
        let interval = paired_bootstrap(&first, &vec![0.25; 50], 0);
        assert_eq!(interval, PairedBootstrap { difference: 0.25, low: 0.25, high: 0.25 });
        // 400 differences of ±1: the mean has standard deviation 1 / 20, so the interval is about ±0.098.
        let second: Vec<f64> = (0..400).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let interval = paired_bootstrap(&vec![0.0; 400], &second, 1);
        assert!((interval.low + 0.098).abs() < 0.015 && (interval.high - 0.098).abs() < 0.015, "{interval:?}");
    }
}
