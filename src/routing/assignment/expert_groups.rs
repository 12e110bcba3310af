//! Groups of experts, of which a token chooses some first.

use burn::config::Config;
use burn::tensor::{Int, Tensor};

use crate::support::error::ConfigError;

/// What stands in place of the score of an expert that a token may not choose: a finite number, as one that is not says that the token cannot be
/// routed.
const NOT_CHOSEN: f32 = f32::MIN;

/// Limits the choices of each token to some groups of experts (DeepSeek-V3, [arXiv 2412.19437](https://arxiv.org/abs/2412.19437), section 2.1.2, where a
/// group lives on a node; `n_group` and `topk_group` of its configuration).
///
/// Group `g` of `G` has the experts `g · E / G` to `(g + 1) · E / G − 1`. Its score is the sum of the two highest scores in it, with the balancing bias;
/// a token chooses among the experts of the `per_token` groups of highest score. Ties go to the lower group.
#[derive(Config, Debug, PartialEq)]
pub struct ExpertGroups {
    /// Number of groups, `G`.
    pub count: usize,
    /// Groups that a token may use.
    pub per_token: usize,
}

impl ExpertGroups {
    /// Refuses groups that `num_experts` experts do not make, or whose experts are fewer than `top_k`.
    pub(super) fn validate(&self, num_experts: usize, top_k: usize) -> Result<(), ConfigError> {
        let Self { count, per_token } = *self;
        ConfigError::non_zero("expert_groups.count", count)?;
        ConfigError::non_zero("expert_groups.per_token", per_token)?;
        if !num_experts.is_multiple_of(count) {
            return Err(ConfigError::NotDivisible {
                field: "num_experts",
                value: num_experts,
                divisor: "expert_groups.count",
                divisor_value: count,
            });
        }
        let refused = |field, value: usize, reason| Err(ConfigError::OutOfRange { field, value: value as f64, reason });
        let size = num_experts / count;
        if size < 2 {
            return refused("expert_groups.count", count, "a group is judged by its two best experts and must have as many");
        }
        if per_token > count {
            return refused("expert_groups.per_token", per_token, "there are not so many groups");
        }
        if per_token * size < top_k {
            return refused(
                "expert_groups.per_token",
                per_token,
                "these groups have fewer experts than each token chooses, `top_k`",
            );
        }
        Ok(())
    }

    /// Lowers the scores of experts outside of each token's groups, `[T · E]`; what is not finite stays.
    pub(super) fn limit(&self, scores: &mut [f32], num_experts: usize) {
        let size = num_experts / self.count;
        for scores in scores.chunks_exact_mut(num_experts) {
            let of_groups: Vec<f32> = scores.chunks_exact(size).map(two_highest).collect();
            for (group, experts) in scores.chunks_exact_mut(size).enumerate() {
                if self.is_beaten(&of_groups, group) {
                    experts.iter_mut().filter(|score| score.is_finite()).for_each(|score| *score = NOT_CHOSEN);
                }
            }
        }
    }

    /// Whether enough other groups are better, or as good and lower.
    fn is_beaten(&self, of_groups: &[f32], group: usize) -> bool {
        let own = of_groups[group];
        let beats = |(other, score): (usize, &f32)| *score > own || (*score == own && other < group);
        of_groups.iter().enumerate().filter(|group| beats(*group)).count() >= self.per_token
    }

    /// [`limit`](Self::limit) of scores `[T, E]` on their device.
    pub(super) fn limited(&self, scores: Tensor<2>) -> Tensor<2> {
        let ([num_tokens, num_experts], device) = (scores.dims(), scores.device());
        let (count, size) = (self.count, num_experts / self.count);
        let grouped = scores.reshape([num_tokens, count, size]);
        let first = grouped.clone().argmax(2);
        let places = Tensor::<1, Int>::arange(0..size as i64, &device).unsqueeze::<3>().expand([num_tokens, count, size]);
        let others = grouped.clone().mask_fill(places.equal(first.expand([num_tokens, count, size])), NOT_CHOSEN);
        let of_groups = grouped.clone().max_dim(2) + others.max_dim(2); // [T, G, 1]
        let shape = [num_tokens, count, count];
        let own = of_groups.clone().expand(shape);
        let other = of_groups.swap_dims(1, 2).expand(shape);
        let groups = Tensor::<1, Int>::arange(0..count as i64, &device);
        let is_lower =
            groups.clone().unsqueeze_dims::<3>(&[0, 1]).expand(shape).lower(groups.unsqueeze_dims::<3>(&[0, 2]).expand(shape));
        let beats = other.clone().greater(own.clone()).bool_or(other.equal(own).bool_and(is_lower));
        let is_beaten = beats.int().sum_dim(2).greater_equal_elem(self.per_token as i64);
        let lowered = is_beaten.expand([num_tokens, count, size]).bool_and(grouped.clone().is_finite());
        grouped.mask_fill(lowered, NOT_CHOSEN).reshape([num_tokens, num_experts])
    }
}

/// The sum of the two highest.
fn two_highest(scores: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &score in scores {
        if score > first {
            (first, second) = (score, first);
        } else if score > second {
            second = score;
        }
    }
    first + second
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, TensorData};

    fn limit(groups: &ExpertGroups, rows: &[[f32; 6]]) -> Vec<Vec<usize>> {
        let mut scores: Vec<f32> = rows.iter().flatten().copied().collect();
        let data = TensorData::new(scores.clone(), [rows.len(), 6]);
        let on_device = groups.limited(Tensor::from_data(data, &Device::default())).try_into_vec_as::<f32>().unwrap();
        groups.limit(&mut scores, 6);
        assert_eq!(scores, on_device);
        scores.chunks_exact(6).map(|row| (0..6).filter(|&expert| row[expert] > NOT_CHOSEN).collect()).collect()
    }

    #[test]
    fn a_group_is_as_good_as_its_two_best_experts() {
        // Sums of two: 0.9 and 0.0; 0.5 and 0.5 is more than 0.9 and 0.05 is not.
        let groups = ExpertGroups::new(3, 1);
        let rows = [[0.9, 0.0, 0.5, 0.5, 0.1, 0.1], [0.9, 0.2, 0.5, 0.5, 0.1, 0.1], [0.1, 0.2, 0.5, 0.5, 0.5, 0.5]];
        assert_eq!(limit(&groups, &rows), [[2, 3], [0, 1], [2, 3]]);
        let groups = ExpertGroups::new(2, 1);
        assert_eq!(limit(&groups, &[[0.5, 0.0, 0.4, 0.5, 0.3, 0.3], [0.5, 0.5, 0.4, 0.9, 0.2, 0.0]]), [[0, 1, 2], [3, 4, 5]]);
        let two = ExpertGroups::new(3, 2);
        assert_eq!(limit(&two, &[[0.5; 6], [-0.5, -0.4, -0.3, -0.2, -0.1, 0.0]]), [[0, 1, 2, 3], [2, 3, 4, 5]]);
    }

    #[test]
    fn host_and_device_agree_whatever_the_scores() {
        let device = Device::default();
        // Rounded, so that there are ties.
        let scores = (Tensor::<2>::random([200, 12], Distribution::Uniform(-1.0, 1.0), &device) * 4.0).round() / 4.0;
        for (count, per_token) in [(2, 1), (3, 2), (4, 1), (6, 3), (1, 1)] {
            let groups = ExpertGroups::new(count, per_token);
            let mut host: Vec<f32> = scores.clone().try_into_vec_as().unwrap();
            groups.limit(&mut host, 12);
            assert_eq!(host, groups.limited(scores.clone()).try_into_vec_as::<f32>().unwrap(), "{groups:?}");
            let left = host.iter().filter(|score| **score > NOT_CHOSEN).count();
            assert_eq!(left, 200 * per_token * 12 / count);
        }
    }

    #[test]
    fn a_token_that_is_not_finite_is_seen_to_be_so() {
        for row in [[f32::NAN; 4], [0.1, f32::NAN, 0.5, 0.6]] {
            let mut scores = row;
            ExpertGroups::new(2, 1).limit(&mut scores, 4);
            assert!(scores[1].is_nan());
            let on_device = ExpertGroups::new(2, 1).limited(Tensor::from_data([row], &Device::default()));
            assert!(on_device.try_into_vec_as::<f32>().unwrap()[1].is_nan());
        }
    }

    #[test]
    fn impossible_groups_are_refused_with_their_value() {
        let text = |groups: ExpertGroups, experts, top_k| groups.validate(experts, top_k).unwrap_err().to_string();
        assert!(text(ExpertGroups::new(3, 1), 8, 2).contains("`expert_groups.count` (3) must divide `num_experts` (8)"));
        assert!(text(ExpertGroups::new(8, 2), 8, 2).contains("its two best experts"));
        assert!(text(ExpertGroups::new(4, 5), 8, 2).contains("not so many groups"));
        assert!(text(ExpertGroups::new(4, 1), 8, 3).contains("fewer experts than each token chooses"));
        assert!(text(ExpertGroups::new(0, 1), 8, 3).contains("at least 1"));
        assert_eq!(ExpertGroups::new(4, 2).validate(8, 3), Ok(()));
    }
}
