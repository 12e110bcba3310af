//! Experts from the weights of a dense network.

use burn::tensor::{Bool, Device, Distribution, Tensor, TensorData};

use super::{
    DenseWeights, UpcycleError, UpcycleStrategy,
    cluster::{ClusterExperts, experts_of_clusters},
};
use crate::layer::experts::ExpertMlp;

/// What a strategy makes of a dense network.
pub(super) struct Made {
    pub stacked: Stacked,
    /// Columns for the router, `[D, E]`, if the strategy has some.
    pub router: Option<Tensor<2>>,
}

/// Stacked weights of all experts.
pub(super) struct Stacked {
    pub w_in: Tensor<3>,
    pub b_in: Option<Tensor<2>>,
    pub w_gate: Option<Tensor<3>>,
    pub b_gate: Option<Tensor<2>>,
    pub w_out: Tensor<3>,
    pub b_out: Option<Tensor<2>>,
}

impl Stacked {
    /// All experts of several stacks, one stack after the other.
    pub(super) fn cat(stacks: Vec<Self>) -> Self {
        fn cat<const D: usize>(stacks: &[Stacked], of: impl Fn(&Stacked) -> &Tensor<D>) -> Tensor<D> {
            Tensor::cat(stacks.iter().map(|stack| of(stack).clone()).collect(), 0)
        }
        fn cat_some<const D: usize>(stacks: &[Stacked], of: impl Fn(&Stacked) -> &Option<Tensor<D>>) -> Option<Tensor<D>> {
            let parts: Option<Vec<Tensor<D>>> = stacks.iter().map(|stack| of(stack).clone()).collect();
            parts.map(|parts| Tensor::cat(parts, 0))
        }
        Self {
            w_in: cat(&stacks, |stack| &stack.w_in),
            b_in: cat_some(&stacks, |stack| &stack.b_in),
            w_gate: cat_some(&stacks, |stack| &stack.w_gate),
            b_gate: cat_some(&stacks, |stack| &stack.b_gate),
            w_out: cat(&stacks, |stack| &stack.w_out),
            b_out: cat_some(&stacks, |stack| &stack.b_out),
        }
    }
}

/// Experts of the sizes of `experts`, made from `weights`, which fit them and live on their device, outside of any graph.
/// `calibration` `[T, D]` is there if the strategy needs it.
pub(super) fn make(
    experts: &ExpertMlp,
    weights: &DenseWeights,
    strategy: UpcycleStrategy,
    calibration: Option<Tensor<2>>,
) -> Result<Made, UpcycleError> {
    if let (UpcycleStrategy::ClusterAware { energy }, Some(tokens)) = (strategy, calibration) {
        let [num_experts, _, _] = experts.dims();
        let ClusterExperts { w_in, w_out, router } = experts_of_clusters(weights, tokens, num_experts, energy)?;
        return Ok(Made { stacked: Stacked { w_in, w_out, ..copies(weights, num_experts) }, router: Some(router) });
    }
    Ok(Made { stacked: make_stacked(experts, weights, strategy), router: None })
}

pub(super) fn copies(weights: &DenseWeights, num_experts: usize) -> Stacked {
    Stacked {
        w_in: stack(&weights.w_in, num_experts),
        b_in: weights.b_in.as_ref().map(|bias| stack(bias, num_experts)),
        w_gate: weights.w_gate.as_ref().map(|weight| stack(weight, num_experts)),
        b_gate: weights.b_gate.as_ref().map(|bias| stack(bias, num_experts)),
        w_out: stack(&weights.w_out, num_experts),
        b_out: weights.b_out.as_ref().map(|bias| stack(bias, num_experts)),
    }
}

fn make_stacked(experts: &ExpertMlp, weights: &DenseWeights, strategy: UpcycleStrategy) -> Stacked {
    let [num_experts, d_model, d_ff] = experts.dims();
    let DenseWeights { w_in, b_in, w_gate, b_gate, w_out, b_out, .. } = weights.clone();
    let device = w_in.device();
    if let UpcycleStrategy::Granular { shards } = strategy {
        let copies_of_each = num_experts / shards;
        let of_shards = |weight: Tensor<2>| weight.reshape([d_model, shards, d_ff]).swap_dims(0, 1).repeat_dim(0, copies_of_each);
        let bias_of_shards = |bias: Tensor<1>| bias.reshape([shards, d_ff]).repeat_dim(0, copies_of_each);
        return Stacked {
            w_in: of_shards(w_in),
            b_in: b_in.map(bias_of_shards),
            w_gate: w_gate.map(of_shards),
            b_gate: b_gate.map(bias_of_shards),
            w_out: w_out.reshape([shards, d_ff, d_model]).repeat_dim(0, copies_of_each) * shards as f64,
            b_out: b_out.map(|bias| stack(&bias, num_experts)),
        };
    }
    let copies = copies(weights, num_experts);
    match strategy {
        UpcycleStrategy::Copy | UpcycleStrategy::Granular { .. } | UpcycleStrategy::ClusterAware { .. } => copies,
        UpcycleStrategy::CopyWithNoise { relative_std } => {
            let noise = |stacked: &Tensor<3>, std: f64| stacked.random_like(Distribution::Normal(0.0, relative_std * std));
            let (std_in, std_out) = (moments(&w_in).1, moments(&w_out).1);
            Stacked {
                w_in: copies.w_in.clone() + noise(&copies.w_in, std_in),
                w_gate: copies.w_gate.zip(w_gate).map(|(stacked, dense)| stacked.clone() + noise(&stacked, moments(&dense).1)),
                w_out: copies.w_out.clone() + noise(&copies.w_out, std_out),
                ..copies
            }
        }
        UpcycleStrategy::Drop { ratio } => {
            let dropped = draw_units(num_experts, d_ff, (ratio * d_ff as f64).round() as usize, &device);
            let anew = |stacked: Tensor<3>, (mean, std): (f64, f64), mask: Tensor<3, Bool>| {
                let fresh = stacked.random_like(Distribution::Normal(mean, std));
                stacked.mask_where(mask, fresh)
            };
            let columns = || dropped.clone().unsqueeze_dim::<3>(1).expand([num_experts, d_model, d_ff]);
            let anew_bias = |(stacked, dense): (Tensor<2>, Tensor<1>)| {
                let (mean, std) = moments(&dense);
                stacked.clone().mask_where(dropped.clone(), stacked.random_like(Distribution::Normal(mean, std)))
            };
            Stacked {
                w_in: anew(copies.w_in, moments(&w_in), columns()),
                b_in: copies.b_in.zip(b_in).map(anew_bias),
                w_gate: copies.w_gate.zip(w_gate).map(|(stacked, dense)| anew(stacked, moments(&dense), columns())),
                b_gate: copies.b_gate.zip(b_gate).map(anew_bias),
                w_out: anew(
                    copies.w_out,
                    moments(&w_out),
                    dropped.clone().unsqueeze_dim::<3>(2).expand([num_experts, d_ff, d_model]),
                ),
                b_out: copies.b_out,
            }
        }
    }
}

/// Mean and standard deviation of all values.
fn moments<const D: usize>(tensor: &Tensor<D>) -> (f64, f64) {
    let values: Vec<f32> = tensor.clone().try_into_vec_as().expect("weights are floats");
    let count = values.len().max(1) as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
    let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

/// `count` hidden units of each expert, `[E, F]`.
fn draw_units(num_experts: usize, d_ff: usize, count: usize, device: &Device) -> Tensor<2, Bool> {
    let draws = Tensor::<2>::random([num_experts, d_ff], Distribution::Uniform(0.0, 1.0), device);
    let draws: Vec<f32> = draws.try_into_vec_as().expect("draws are floats");
    let mut drawn = vec![false; draws.len()];
    for (expert, draws) in draws.chunks_exact(d_ff).enumerate() {
        let mut units: Vec<usize> = (0..d_ff).collect();
        units.sort_by(|&a, &b| draws[a].total_cmp(&draws[b]));
        units.truncate(count);
        units.into_iter().for_each(|unit| drawn[expert * d_ff + unit] = true);
    }
    Tensor::from_data(TensorData::new(drawn, [num_experts, d_ff]), device)
}

/// Every `times`-th column, `times` times over: `[D, E] -> [D, E]`.
pub(super) fn repeat_columns(weight: Tensor<2>, times: usize) -> Tensor<2> {
    let [d_model, num_experts] = weight.dims();
    let groups = num_experts / times;
    let first = weight.reshape([d_model, groups, times]).narrow(2, 0, 1);
    first.expand([d_model, groups, times]).reshape([d_model, num_experts])
}

fn stack<const D: usize, const E: usize>(tensor: &Tensor<D>, num_experts: usize) -> Tensor<E> {
    Tensor::stack(vec![tensor.clone().detach(); num_experts], 0)
}
