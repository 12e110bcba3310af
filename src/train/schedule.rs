//! The learning rate over the steps.

use burn::config::Config;

/// A linear rise, then half a cosine down to `final_fraction` of the peak.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct WarmupCosine {
    /// The highest learning rate.
    pub peak: f64,
    /// Steps of the rise. Default: 100
    #[config(default = 100)]
    pub warmup_steps: usize,
    /// Where the cosine ends, as a share of the peak. Default: 0
    #[config(default = 0.0)]
    pub final_fraction: f64,
}

impl WarmupCosine {
    /// The learning rate of step `step` (from 0) of `total`.
    pub fn at(&self, step: usize, total: usize) -> f64 {
        let warmup = self.warmup_steps.min(total);
        if step < warmup {
            return self.peak * (step + 1) as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / (total - warmup).max(1) as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.peak * (self.final_fraction + (1.0 - self.final_fraction) * cosine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_rises_to_the_peak_and_falls_to_the_end() {
        let schedule = WarmupCosine::new(2.0).with_warmup_steps(4).with_final_fraction(0.5);
        let rates: Vec<f64> = (0..12).map(|step| schedule.at(step, 12)).collect();
        assert_eq!(rates[..5], [0.5, 1.0, 1.5, 2.0, 2.0]);
        assert!((rates[8] - 1.5).abs() < 1e-12); // half-way between 2 and 1
        assert!(rates[4..].windows(2).all(|pair| pair[0] > pair[1]) && rates[11] > 1.0);
    }
}
