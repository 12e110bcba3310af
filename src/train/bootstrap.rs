//! Paired bootstrap intervals of a difference between two models.

use std::collections::BTreeMap;

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

/// Resamples clusters of queries with replacement 10,000 times, keeping each query's two results together (percentile interval).
/// `cluster_of` has a number for each query, equal for queries that depend on each other, such as all captions of one image: they are drawn
/// together.
///
/// # Panics
/// When the three do not have the same length, or are empty.
pub fn paired_bootstrap(first: &[f64], second: &[f64], cluster_of: &[usize], seed: u64) -> PairedBootstrap {
    const RESAMPLES: usize = 10_000;
    let n = first.len();
    assert!(n == second.len() && n > 0, "paired results needed, got {n} and {}", second.len());
    assert!(n == cluster_of.len(), "a cluster for each of {n} results needed, got {}", cluster_of.len());
    let differences = first.iter().zip(second).map(|(a, b)| b - a);
    // Sum and number of each cluster's differences.
    let mut clusters: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
    for (difference, cluster) in differences.zip(cluster_of) {
        let (sum, count) = clusters.entry(*cluster).or_default();
        (*sum, *count) = (*sum + difference, *count + 1.0);
    }
    let clusters: Vec<(f64, f64)> = clusters.into_values().collect();
    let mean = |chosen: &mut dyn Iterator<Item = (f64, f64)>| {
        let (sum, count) = chosen.fold((0.0, 0.0), |(sum, count), (s, c)| (sum + s, count + c));
        sum / count
    };
    let mut rng = StdRng::seed_from_u64(seed);
    let mut means: Vec<f64> =
        (0..RESAMPLES).map(|_| mean(&mut (0..clusters.len()).map(|_| clusters[rng.random_range(0..clusters.len())]))).collect();
    means.sort_by(f64::total_cmp);
    PairedBootstrap {
        difference: mean(&mut clusters.iter().copied()),
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
        let each: Vec<usize> = (0..400).collect();
        let interval = paired_bootstrap(&first, &vec![0.25; 50], &each[..50], 0);
        assert_eq!(interval, PairedBootstrap { difference: 0.25, low: 0.25, high: 0.25 });
        // 400 differences of ±1: the mean has standard deviation 1 / 20, so the interval is about ±0.098.
        let second: Vec<f64> = (0..400).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let interval = paired_bootstrap(&vec![0.0; 400], &second, &each, 1);
        assert!((interval.low + 0.098).abs() < 0.015 && (interval.high - 0.098).abs() < 0.015, "{interval:?}");
    }

    #[test]
    fn queries_of_one_cluster_are_drawn_together() {
        // Four equal results in each of 100 clusters are worth no more than 100 results.
        let second: Vec<f64> = (0..400).map(|i| if i / 4 % 2 == 0 { 1.0 } else { -1.0 }).collect();
        let clusters: Vec<usize> = (0..400).map(|i| i / 4).collect();
        let interval = paired_bootstrap(&vec![0.0; 400], &second, &clusters, 1);
        assert!((interval.low + 0.196).abs() < 0.03 && (interval.high - 0.196).abs() < 0.03, "{interval:?}");
        // A cluster counts by its queries: here the mean is 3 / 4 whatever is drawn, or not far from it.
        let interval = paired_bootstrap(&[0.0; 4], &[1.0, 1.0, 1.0, 0.0], &[7, 7, 7, 2], 1);
        assert_eq!((interval.difference, interval.low, interval.high), (0.75, 0.0, 1.0));
    }
}
