//! One feed-forward layer.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor};

use super::{
    DenseFeedForward, DenseWeights, ProbeTokens, UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, UpcycleStrategy,
    Upcycled, UpcycledLayer, on_device, only_valid,
    report::deviation,
    strategy::{Stacked, make, repeat_columns},
    valid_rows,
};
use crate::{
    layer::{
        experts::{Activation, ExpertMlp, FeedForwardForm},
        moe::MoeFeedForward,
        soft_moe::SoftMoeFeedForward,
    },
    routing::MoeInput,
    support::param::{frozen, replaced_in, with_value},
};

impl<Dense: DenseFeedForward> UpcycleFromDense<Dense> for MoeFeedForward {
    fn upcycle_from_dense(self, dense: &Dense, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        // Frozen: compared as at inference, where nothing is dropped by default.
        let activation = self.experts.activation;
        upcycle_layer(self, activation, dense, options, copy, |model, input| frozen(model).forward(input).output)
    }
}

/// A soft layer mixes tokens, so even copies do not compute what the dense network computes: training has to bring that back.
impl<Dense: DenseFeedForward> UpcycleFromDense<Dense> for SoftMoeFeedForward {
    fn upcycle_from_dense(self, dense: &Dense, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let activation = self.experts.activation;
        upcycle_layer(
            self,
            activation,
            dense,
            options,
            |soft, weights, strategy, _| copy_soft(soft, weights, strategy),
            |model, input| model.forward(input).output,
        )
    }
}

fn upcycle_layer<M: Module>(
    sparse: M,
    activation: Activation,
    dense: &impl DenseFeedForward,
    options: &UpcycleOptions,
    copy: impl FnOnce(M, &DenseWeights, UpcycleStrategy, Option<Tensor<2>>) -> Result<(M, UpcycledLayer), UpcycleError>,
    run: impl FnOnce(&M, MoeInput<3>) -> Tensor<3>,
) -> Result<Upcycled<M>, UpcycleError> {
    let weights = DenseWeights::of(dense).map_err(|error| error.for_experts(activation))?;
    let d_model = weights.w_in.dims()[0];
    let probe = options.probe.as_ref().map(|probe| probe.tokens(d_model)).transpose()?;
    let calibration = options.calibration_batch()?.map(|batch| batch.tokens(d_model)).transpose()?;
    let calibration = calibration.map(|(tokens, valid)| valid_rows(&tokens, valid.as_ref()));
    let device = sparse.devices().first().expect("a layer has parameters").clone();
    let (model, layer) = copy(sparse, &weights, options.strategy, calibration)?;
    let max_deviation = probe.map(|probe| compare(&weights, &probe, &device, |input| run(&model, input))).transpose()?;
    let report = UpcycleReport::with_counts(weights.num_params(), model.num_params(), vec![layer], max_deviation);
    Ok(Upcycled { model, report })
}

/// The layer with experts made from `weights`; `calibration` `[T, D]` for a strategy that needs it.
pub(super) fn copy(
    mut moe: MoeFeedForward,
    weights: &DenseWeights,
    strategy: UpcycleStrategy,
    calibration: Option<Tensor<2>>,
) -> Result<(MoeFeedForward, UpcycledLayer), UpcycleError> {
    refuse_shared_expert(&moe)?;
    let [num_experts, _, _] = moe.experts.dims();
    let active_experts = moe.assignment.active_experts(num_experts);
    let router = fill(&mut moe.experts, active_experts, weights, strategy, calibration)?;
    if let UpcycleStrategy::Granular { shards } = strategy {
        moe.router.weight = with_value(moe.router.weight, |weight| repeat_columns(weight, shards));
        let repeated = |bias: Tensor<1>| repeat_columns(bias.unsqueeze_dim::<2>(0), shards).squeeze_dim(0);
        moe.router.bias = moe.router.bias.map(|bias| with_value(bias, repeated));
    }
    if let Some(router) = router {
        moe.router.weight = replace(moe.router.weight, router);
    }
    let layer = layer_of(&moe.experts, active_experts);
    Ok((moe, layer))
}

/// Refuses weights that the layer's experts cannot be copies of.
pub(super) fn check_copies(moe: &MoeFeedForward, weights: &DenseWeights) -> Result<(), UpcycleError> {
    refuse_shared_expert(moe)?;
    let [num_experts, _, _] = moe.experts.dims();
    check(&moe.experts, moe.assignment.active_experts(num_experts), weights, UpcycleStrategy::Copy, None)
}

fn refuse_shared_expert(moe: &MoeFeedForward) -> Result<(), UpcycleError> {
    if moe.shared_expert.is_some() {
        return Err(UpcycleError::Setting { at: String::new(), what: "shared_expert", dense: "none".into(), sparse: "one".into() });
    }
    Ok(())
}

/// The soft layer with experts made from `weights`.
pub(super) fn copy_soft(
    mut soft: SoftMoeFeedForward,
    weights: &DenseWeights,
    strategy: UpcycleStrategy,
) -> Result<(SoftMoeFeedForward, UpcycledLayer), UpcycleError> {
    if let UpcycleStrategy::Granular { .. } | UpcycleStrategy::ClusterAware { .. } = strategy {
        let reason = "a soft layer chooses no experts".into();
        return Err(UpcycleError::Strategy { strategy: strategy.to_string(), reason });
    }
    let [num_experts, _, _] = soft.experts.dims();
    fill(&mut soft.experts, num_experts, weights, strategy, None)?;
    let layer = layer_of(&soft.experts, num_experts);
    Ok((soft, layer))
}

pub(super) fn layer_of(experts: &ExpertMlp, active_experts: usize) -> UpcycledLayer {
    let [num_experts, _, _] = experts.dims();
    let params_per_expert = experts.num_params() / num_experts;
    UpcycledLayer { path: String::new(), num_experts, active_experts, params_per_expert }
}

/// Makes the experts from `weights`; returns columns for the router if the strategy has some.
fn fill(
    experts: &mut ExpertMlp,
    active_experts: usize,
    weights: &DenseWeights,
    strategy: UpcycleStrategy,
    calibration: Option<Tensor<2>>,
) -> Result<Option<Tensor<2>>, UpcycleError> {
    check(experts, active_experts, weights, strategy, calibration.as_ref())?;
    // Outside of any graph, and where the sparse module lives.
    let device = experts.w_in.val().device().inner();
    let calibration = calibration.map(|tokens| Tensor::from_data(tokens.into_data(), &device));
    let made = make(experts, &weights.moved(&device), strategy, calibration)?;
    put(experts, made.stacked, weights.w_in.dtype());
    Ok(made.router)
}

/// Gives the experts their weights: made in the device's own number type, kept in that of the dense network.
pub(super) fn put(experts: &mut ExpertMlp, made: Stacked, dtype: DType) {
    experts.w_in = replace(experts.w_in.clone(), made.w_in.cast(dtype));
    experts.w_out = replace(experts.w_out.clone(), made.w_out.cast(dtype));
    experts.w_gate = experts.w_gate.take().zip(made.w_gate).map(|(param, made)| replace(param, made.cast(dtype)));
    for (bias, made) in [(&mut experts.b_in, made.b_in), (&mut experts.b_gate, made.b_gate), (&mut experts.b_out, made.b_out)] {
        *bias = bias.take().zip(made).map(|(param, made)| replace(param, made.cast(dtype)));
    }
}

/// Refuses what does not fit.
fn check(
    experts: &ExpertMlp,
    top_k: usize,
    weights: &DenseWeights,
    strategy: UpcycleStrategy,
    calibration: Option<&Tensor<2>>,
) -> Result<(), UpcycleError> {
    let [num_experts, d_model, d_ff] = experts.dims();
    let refused = |reason: String| Err(UpcycleError::Strategy { strategy: strategy.to_string(), reason });
    let shards = match strategy {
        UpcycleStrategy::Granular { shards } => {
            if shards == 0 || !num_experts.is_multiple_of(shards) || !top_k.is_multiple_of(shards) {
                return refused(format!("it must divide the {num_experts} experts and the {top_k} choices of each token"));
            }
            shards
        }
        _ => 1,
    };
    let in_range = match strategy {
        UpcycleStrategy::CopyWithNoise { relative_std } => relative_std.is_finite() && relative_std >= 0.0,
        UpcycleStrategy::Drop { ratio } => (0.0..=1.0).contains(&ratio),
        UpcycleStrategy::ClusterAware { energy } => energy > 0.0 && energy <= 1.0,
        UpcycleStrategy::Copy | UpcycleStrategy::Granular { .. } => true,
    };
    if !in_range {
        return refused("the number is out of range".into());
    }
    if let Some(tokens) = calibration {
        let [count, width] = tokens.dims();
        UpcycleError::shapes("calibration tokens", &[d_model], &[width])?;
        if count < num_experts {
            return refused(format!("{count} calibration tokens make no {num_experts} clusters"));
        }
    }
    UpcycleError::shapes("w_in", &weights.w_in.dims(), &[d_model, d_ff * shards])?;
    UpcycleError::shapes("w_out", &weights.w_out.dims(), &[d_ff * shards, d_model])?;
    let form = if weights.w_gate.is_some() { FeedForwardForm::Gated } else { FeedForwardForm::Plain };
    UpcycleError::settings("form", form, experts.form)?;
    if let Some(w_gate) = &weights.w_gate {
        if let UpcycleStrategy::ClusterAware { .. } = strategy {
            return refused("it is for plain networks, not for gated ones".into());
        }
        UpcycleError::shapes("w_gate", &w_gate.dims(), &[d_model, d_ff * shards])?;
        crate::support::finite::check_finite("w_gate", w_gate)?;
    }
    if weights.activation != experts.activation {
        let dense = format!("{:?}", weights.activation);
        return Err(UpcycleError::Activation { at: String::new(), dense, sparse: Some(experts.activation) });
    }
    for (what, dense, sparse, width) in [
        ("b_in", &weights.b_in, &experts.b_in, d_ff * shards),
        ("b_gate", &weights.b_gate, &experts.b_gate, d_ff * shards),
        ("b_out", &weights.b_out, &experts.b_out, d_model),
    ] {
        if dense.is_some() != sparse.is_some() {
            return Err(UpcycleError::Bias { at: String::new(), what, dense: dense.is_some() });
        }
        if let Some(dense) = dense {
            UpcycleError::shapes(what, &dense.dims(), &[width])?;
            crate::support::finite::check_finite(what, dense)?;
        }
    }
    crate::support::finite::check_finite("w_in", &weights.w_in)?;
    crate::support::finite::check_finite("w_out", &weights.w_out)?;
    Ok(())
}

/// The parameter with a value, number type included, from another model, which may live on another device.
pub(super) fn replace<const D: usize>(param: Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    let (device, dtype) = (param.lazy_device(), value.dtype());
    replaced_in(param, value.into_data(), (&device, dtype))
}

/// Largest difference of what `run` makes of the tokens on `device` from what the dense network does, over valid ones.
pub(super) fn compare(
    dense: &DenseWeights,
    (tokens, valid): &ProbeTokens,
    device: &Device,
    run: impl FnOnce(MoeInput<3>) -> Tensor<3>,
) -> Result<f64, UpcycleError> {
    let probe = (tokens.clone().cast(dense.w_in.dtype()), valid.clone());
    let (tokens, valid) = on_device(&probe, &dense.w_in.device());
    let [batch, len, d_model] = tokens.dims();
    let expected = dense.forward(tokens.reshape([batch * len, d_model])).reshape([batch, len, d_model]);
    let expected = only_valid(expected, &valid);
    let (tokens, valid) = on_device(&probe, device);
    let input = MoeInput::new(tokens);
    let input = match valid {
        None => input,
        Some(valid) => input.valid(valid),
    };
    deviation("the outputs on the probe batch", expected, run(input))
}
