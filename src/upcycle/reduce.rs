//! The way back: fewer experts, or one.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Tensor, TensorData};

use super::{DenseWeights, UpcycleError};
use crate::{
    layer::{
        experts::{ExpertMlp, FeedForwardForm},
        moe::MoeFeedForward,
    },
    routing::{
        MoeInput,
        assignment::{AssignmentConfig, GateNormalization},
        router::{Router, RouterScore},
    },
    support::param::{frozen, with_value},
    transformer::{Encoder, FeedForward, Mlp},
};

/// How the experts of a layer become fewer. Groups of experts ([`ExpertGroups`](crate::ExpertGroups)) are cut anew of those that are left, whose number they
/// must divide: without the old groups, tokens may choose otherwise.
#[derive(Clone, Debug, PartialEq)]
pub enum Reduction {
    /// One expert: the mean of all, weighted by the share of rows that each computed.
    Average,
    /// The `count` experts that computed most.
    Prune {
        /// Experts that stay, `E'`.
        count: usize,
    },
    /// `count` experts: the two most similar ones, by the cosine of their weights, are averaged by load until no more are left.
    Merge {
        /// Experts that stay, `E'`.
        count: usize,
    },
}

/// A layer with fewer experts, and what that cost.
#[derive(Clone, Debug)]
pub struct Reduced {
    /// The layer. Its router scores the experts that are left.
    pub model: MoeFeedForward,
    /// What was done.
    pub report: ReductionReport,
}

/// What a reduction did.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ReductionReport {
    /// The experts that each new one was made from.
    pub made_from: Vec<Vec<usize>>,
    /// Parameters before.
    pub params_before: usize,
    /// Parameters after.
    pub params_after: usize,
    /// `‖after − before‖ / ‖before‖` of the outputs on the calibration tokens; `None` without any.
    pub relative_deviation: Option<f64>,
}

impl MoeFeedForward {
    /// The layer with fewer experts. `load` is the share of rows that each expert computed, as in
    /// [`RoutingStats::load`](crate::stats::RoutingStats::load); `calibration` tokens `[T, D]` tell what the reduction costs.
    ///
    /// `Average` leaves a layer of one expert and `top_k` 1; [`dense`](Self::dense) makes a network without a router of it. Otherwise
    /// `top_k` stays.
    ///
    /// # Errors
    /// When `load` does not have one share per expert or no share above zero, or fewer experts than `top_k` would be left, or more than
    /// there are; for `Average` of a single expert also when its gate depends on the token (sigmoid scores that are not normalised).
    pub fn reduce(&self, reduction: &Reduction, load: &[f64], calibration: Option<Tensor<2>>) -> Result<Reduced, UpcycleError> {
        let [num_experts, _, _] = self.experts.dims();
        let refused = |reason: String| UpcycleError::Reduction { reduction: format!("{reduction:?}"), reason };
        if load.len() != num_experts || !load.iter().all(|load| load.is_finite() && *load >= 0.0) || load.iter().sum::<f64>() <= 0.0
        {
            return Err(refused(format!("{load:?} is no load of {num_experts} experts")));
        }
        let least = self.assignment.least_experts();
        if let Reduction::Prune { count } | Reduction::Merge { count } = reduction
            && !(least..=num_experts).contains(count)
        {
            return Err(refused(format!("between {least} and {num_experts} experts can be left")));
        }
        if let Reduction::Prune { count } | Reduction::Merge { count } = reduction {
            self.assignment.validate(*count).map_err(|error| refused(error.to_string()))?;
        }
        // The mean of several is an approximation; a network in place of one must compute the same.
        if *reduction == Reduction::Average && num_experts == 1 {
            self.refuse_varying_gate()?;
        }
        let made_from = match reduction {
            Reduction::Average => vec![(0..num_experts).collect()],
            Reduction::Prune { count } => busiest(load, *count),
            Reduction::Merge { count } => most_similar(&self.experts, load, *count),
        };
        let mut model = recombine(self, &made_from, load);
        if *reduction == Reduction::Average {
            model.assignment = model.assignment.with_one_expert();
            // One expert has the gate 1, whatever the scores of many were.
            model.router = Router {
                score: RouterScore::Softmax,
                noise: 0.0,
                bias: None,
                balancing_bias: None,
                balancing_momentum: None,
                balancing_warmup: None,
                balancing: None,
                ..model.router
            };
        }
        let relative_deviation = calibration.map(|tokens| {
            let run = |layer: &Self| frozen(layer).forward(MoeInput::new(tokens.clone())).output.detach();
            let (before, after) = (run(self), run(&model));
            let norm = |x: Tensor<2>| f64::from(x.square().sum().sqrt().into_scalar::<f32>());
            norm(after - before.clone()) / norm(before).max(f64::MIN_POSITIVE)
        });
        let (params_before, params_after) = (self.num_params(), model.num_params());
        Ok(Reduced { model, report: ReductionReport { made_from, params_before, params_after, relative_deviation } })
    }

    /// Refuses a single expert whose gate depends on the token: a softmax over one expert is 1, a sigmoid is not.
    fn refuse_varying_gate(&self) -> Result<(), UpcycleError> {
        let is_normalized = match &self.assignment {
            AssignmentConfig::TokenChoice(choice) => choice.gate_normalization != GateNormalization::None,
            AssignmentConfig::ExpertChoice(_) => false,
        };
        if self.router.score == RouterScore::Softmax || is_normalized {
            return Ok(());
        }
        let (dense, sparse) = ("the same for all tokens".into(), "the sigmoid of each token's logit".into());
        Err(UpcycleError::Setting { at: String::new(), what: "gate", dense, sparse })
    }

    /// The weights of the only expert of a layer, plain or gated, those of its output times the scale of gates.
    ///
    /// # Errors
    /// When there are more experts, or there is a shared one, or the gate depends on the token (sigmoid scores that are not normalised).
    pub fn dense(&self) -> Result<DenseWeights, UpcycleError> {
        let experts = &self.experts;
        let [num_experts, _, _] = experts.dims();
        UpcycleError::settings("num_experts", 1, num_experts)?;
        UpcycleError::settings("shared_expert", false, self.shared_expert.is_some())?;
        if let FeedForwardForm::ClampedGated { .. } = experts.form {
            UpcycleError::settings("form", FeedForwardForm::Gated, experts.form)?;
        }
        let bias = |bias: &Option<Param<Tensor<2>>>| bias.as_ref().map(|bias| bias.val().squeeze_dim(0));
        // A dense network has no gate that its output could be multiplied by.
        let scale = match &self.assignment {
            AssignmentConfig::TokenChoice(choice) => choice.gate_scale,
            AssignmentConfig::ExpertChoice(_) => 1.0,
        };
        self.refuse_varying_gate()?;
        Ok(DenseWeights {
            w_in: experts.w_in.val().squeeze_dim(0),
            b_in: bias(&experts.b_in),
            w_gate: experts.w_gate.as_ref().map(|weight| weight.val().squeeze_dim(0)),
            b_gate: bias(&experts.b_gate),
            w_out: experts.w_out.val().squeeze_dim(0) * scale,
            b_out: bias(&experts.b_out).map(|b_out: Tensor<1>| b_out * scale),
            activation: experts.activation,
        })
    }
}

impl Encoder {
    /// The encoder with a dense network in place of each sparse layer: the mean of its experts by load. `loads` are those of the routed
    /// blocks, in order.
    ///
    /// # Errors
    /// When there are not as many loads as routed blocks, a layer cannot be averaged (a soft one never can), or its experts are
    /// gated and the dense blocks are not, or the other way round.
    pub fn to_dense(mut self, loads: &[Vec<f64>]) -> Result<Self, UpcycleError> {
        let routed_blocks = self.routed_blocks().count();
        if loads.len() != routed_blocks {
            let reason = format!("there are loads of {} layers and {routed_blocks} routed blocks", loads.len());
            return Err(UpcycleError::Reduction { reduction: "Average".into(), reason });
        }
        let mut loads = loads.iter();
        let mut dense = self.blocks.iter().filter_map(|block| match &block.feed_forward {
            FeedForward::Dense(mlp) => Some(mlp.linear_gate.is_some()),
            _ => None,
        });
        let is_gated = dense.next();
        for block in &mut self.blocks {
            let moe = match &block.feed_forward {
                FeedForward::Dense(_) => continue,
                FeedForward::Moe(moe) => moe,
                FeedForward::SoftMoe(_) => {
                    let reason = "a soft layer has no loads to average its experts by".into();
                    return Err(UpcycleError::Reduction { reduction: "Average".into(), reason });
                }
            };
            let load = loads.next().expect("counted above");
            let weights = moe.reduce(&Reduction::Average, load, None)?.model.dense()?;
            UpcycleError::settings("gated", is_gated.unwrap_or(weights.w_gate.is_some()), weights.w_gate.is_some())?;
            block.feed_forward = FeedForward::Dense(mlp(weights));
        }
        Ok(self)
    }
}

/// The `count` experts of highest load, each by itself, in their old order.
fn busiest(load: &[f64], count: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..load.len()).collect();
    order.sort_by(|&a, &b| load[b].total_cmp(&load[a]));
    let mut kept = order[..count].to_vec();
    kept.sort_unstable();
    kept.into_iter().map(|expert| vec![expert]).collect()
}

/// Groups of experts, merged two by two until `count` are left.
fn most_similar(experts: &ExpertMlp, load: &[f64], count: usize) -> Vec<Vec<usize>> {
    let weights = flat_weights(experts);
    let mut groups: Vec<Vec<usize>> = (0..load.len()).map(|expert| vec![expert]).collect();
    let mut means = weights.clone();
    while groups.len() > count {
        let pairs = (0..groups.len()).flat_map(|a| (a + 1..groups.len()).map(move |b| (a, b)));
        let (a, b) = pairs
            .max_by(|x, y| cosine(&means[x.0], &means[x.1]).total_cmp(&cosine(&means[y.0], &means[y.1])))
            .expect("two groups make a pair");
        let merged = groups.remove(b);
        means.remove(b);
        groups[a].extend(merged);
        let shares = shares_of(&groups[a], load);
        let mut mean = vec![0.0; means[a].len()];
        for (&expert, share) in groups[a].iter().zip(shares) {
            mean.iter_mut().zip(&weights[expert]).for_each(|(sum, weight)| *sum += share * weight);
        }
        means[a] = mean;
    }
    groups
}

/// The cosine between the weights of every two experts, `[E][E]`, biases included: 1 for copies.
pub fn expert_similarity(experts: &ExpertMlp) -> Vec<Vec<f64>> {
    let weights = flat_weights(experts);
    weights.iter().map(|a| weights.iter().map(|b| cosine(a, b)).collect()).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

/// All parameters of each expert in one row.
fn flat_weights(experts: &ExpertMlp) -> Vec<Vec<f64>> {
    let [num_experts, _, _] = experts.dims();
    let mut rows = vec![Vec::new(); num_experts];
    let mut add = |values: Vec<f32>| {
        let width = values.len() / num_experts;
        rows.iter_mut().zip(values.chunks_exact(width)).for_each(|(row, values)| row.extend(values.iter().map(|&v| f64::from(v))));
    };
    let read3 = |weight: &Param<Tensor<3>>| weight.val().detach().try_into_vec_as::<f32>().expect("weights are floats");
    let read2 = |bias: &Param<Tensor<2>>| bias.val().detach().try_into_vec_as::<f32>().expect("weights are floats");
    [Some(&experts.w_in), experts.w_gate.as_ref(), Some(&experts.w_out)].into_iter().flatten().for_each(|w| add(read3(w)));
    [&experts.b_in, &experts.b_gate, &experts.b_out].into_iter().flatten().for_each(|b| add(read2(b)));
    rows
}

/// Each expert's share of the load of its group; equal shares in a group that computed nothing.
fn shares_of(group: &[usize], load: &[f64]) -> Vec<f64> {
    let total: f64 = group.iter().map(|&expert| load[expert]).sum();
    let share = |&expert: &usize| if total > 0.0 { load[expert] / total } else { 1.0 / group.len() as f64 };
    group.iter().map(share).collect()
}

/// Every new expert is the mean of its group by load; so is its column of the router.
fn recombine(moe: &MoeFeedForward, made_from: &[Vec<usize>], load: &[f64]) -> MoeFeedForward {
    let num_experts = load.len();
    let mut mixing = vec![0.0f32; made_from.len() * num_experts];
    for (row, group) in mixing.chunks_exact_mut(num_experts).zip(made_from) {
        group.iter().zip(shares_of(group, load)).for_each(|(&expert, share)| row[expert] = share as f32);
    }
    let mixing = TensorData::new(mixing, [made_from.len(), num_experts]);
    fn mix<const D: usize>(stacked: Tensor<D>, mixing: &TensorData) -> Tensor<D> {
        let mut shape: [usize; D] = stacked.dims();
        let mixing = Tensor::<2>::from_data(mixing.clone(), (&stacked.device(), stacked.dtype()));
        let width = shape[1..].iter().product();
        let mixed = mixing.matmul(stacked.reshape([shape[0], width]));
        shape[0] = mixed.dims()[0];
        mixed.reshape(shape)
    }
    let mut moe = moe.clone();
    let experts = &mut moe.experts;
    let weight = |w: Param<Tensor<3>>| with_value(w, |w| mix(w, &mixing));
    let bias = |b: Option<Param<Tensor<2>>>| b.map(|b| with_value(b, |b| mix(b, &mixing)));
    experts.w_in = weight(experts.w_in.clone());
    experts.w_gate = experts.w_gate.take().map(weight);
    experts.w_out = weight(experts.w_out.clone());
    experts.b_in = bias(experts.b_in.take());
    experts.b_gate = bias(experts.b_gate.take());
    experts.b_out = bias(experts.b_out.take());
    moe.router.weight = with_value(moe.router.weight, |w| mix(w.transpose(), &mixing).transpose());
    let per_expert = |param: Option<Param<Tensor<1>>>| {
        param.map(|param| with_value(param, |values| mix(values.unsqueeze_dim::<2>(1), &mixing).squeeze_dim(1)))
    };
    moe.router.bias = per_expert(moe.router.bias);
    moe.router.balancing_bias = per_expert(moe.router.balancing_bias);
    moe.router.balancing_momentum = per_expert(moe.router.balancing_momentum);
    moe
}

fn mlp(weights: DenseWeights) -> Mlp {
    // A dense network of an encoder has biases; experts need none.
    let linear = |weight: Tensor<2>, bias: Option<Tensor<1>>| {
        let [_, d_out] = weight.dims();
        let bias = bias.unwrap_or_else(|| Tensor::zeros([d_out], (&weight.device(), weight.dtype())));
        Linear { weight: Param::from_tensor(weight.detach()), bias: Some(Param::from_tensor(bias.detach())) }
    };
    Mlp {
        linear_in: linear(weights.w_in, weights.b_in),
        linear_gate: weights.w_gate.map(|weight| linear(weight, weights.b_gate)),
        linear_out: linear(weights.w_out, weights.b_out),
        activation: weights.activation,
    }
}
