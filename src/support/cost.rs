//! What a layer costs, counted and not measured.

/// Floating-point operations and parameters of a part of a model. One multiply-add is two operations.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Operations of one forward pass.
    pub flops: u64,
    /// All parameters.
    pub params_total: u64,
    /// Parameters that one token passes through: of the experts, `K` out of `E`.
    pub params_active: u64,
}

impl Cost {
    /// A linear map over `tokens` rows.
    pub fn linear(tokens: usize, d_in: usize, d_out: usize, bias: bool) -> Self {
        let params = (d_in * d_out + if bias { d_out } else { 0 }) as u64;
        Self { flops: 2 * (tokens * d_in * d_out) as u64, params_total: params, params_active: params }
    }

    /// Parameters without matrix products: norms, embeddings.
    pub fn params(count: usize) -> Self {
        Self { flops: 0, params_total: count as u64, params_active: count as u64 }
    }

    /// A dense feed-forward network over `tokens` rows.
    pub fn feed_forward(tokens: usize, d_model: usize, d_ff: usize, bias: bool) -> Self {
        Self::linear(tokens, d_model, d_ff, bias) + Self::linear(tokens, d_ff, d_model, bias)
    }

    /// `E` experts of the cost `expert` each for all their rows together, of which a token passes `active`.
    pub(crate) fn experts(expert: Self, num_experts: usize, active: usize) -> Self {
        Self {
            flops: expert.flops,
            params_total: expert.params_total * num_experts as u64,
            params_active: expert.params_active * active as u64,
        }
    }

    /// Operations in units of 10⁹.
    pub fn gflops(&self) -> f64 {
        self.flops as f64 / 1e9
    }
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            params_total: self.params_total + other.params_total,
            params_active: self.params_active + other.params_active,
        }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), |a, b| a + b)
    }
}
