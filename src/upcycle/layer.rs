//! One feed-forward layer.

use burn::module::{Module, Param};
use burn::tensor::{Bool, Tensor};

use super::{
    DenseFeedForward, DenseWeights, UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, UpcycleStrategy, Upcycled,
    UpcycledLayer,
    report::deviation,
    strategy::{make, repeat_columns},
};
use crate::{experts::FeedForwardForm, moe::MoeFeedForward, param::with_value, routing::MoeInput};

impl<Dense: DenseFeedForward> UpcycleFromDense<Dense> for MoeFeedForward {
    fn upcycle_from_dense(self, dense: &Dense, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        let probe = options.probe_tokens()?;
        let weights = dense.dense_weights()?;
        let (model, layer) = copy(self, &weights, options.strategy)?;
        let max_deviation = match probe {
            None => None,
            Some((tokens, valid)) => Some(compare(&weights, &model, tokens, valid)?),
        };
        let [d_model, d_ff] = weights.w_in.dims();
        let biases = [&weights.b_in, &weights.b_out].iter().filter_map(|b| b.as_ref().map(|b| b.dims()[0])).sum::<usize>();
        let params_dense = 2 * d_model * d_ff + biases;
        let report = UpcycleReport::with_counts(params_dense, model.num_params(), vec![layer], max_deviation);
        Ok(Upcycled { model, report })
    }
}

/// The layer with experts made from `weights`.
pub(super) fn copy(
    mut moe: MoeFeedForward,
    weights: &DenseWeights,
    strategy: UpcycleStrategy,
) -> Result<(MoeFeedForward, UpcycledLayer), UpcycleError> {
    let [num_experts, _, _] = moe.experts.dims();
    check(&moe, weights, strategy)?;
    if let UpcycleStrategy::Granular { shards } = strategy {
        moe.router.weight = with_value(moe.router.weight, |weight| repeat_columns(weight, shards));
    }
    let made = make(&moe, weights, strategy);
    let experts = &mut moe.experts;
    experts.w_in = replace(experts.w_in.clone(), made.w_in);
    experts.w_out = replace(experts.w_out.clone(), made.w_out);
    for (bias, made) in [(&mut experts.b_in, made.b_in), (&mut experts.b_out, made.b_out)] {
        *bias = bias.take().zip(made).map(|(param, made)| replace(param, made));
    }
    let layer = UpcycledLayer {
        path: String::new(),
        num_experts,
        active_experts: moe.assignment.active_experts(num_experts),
        params_per_expert: moe.experts.num_params() / num_experts,
    };
    Ok((moe, layer))
}

/// Refuses what does not fit.
fn check(moe: &MoeFeedForward, weights: &DenseWeights, strategy: UpcycleStrategy) -> Result<(), UpcycleError> {
    let [num_experts, d_model, d_ff] = moe.experts.dims();
    let shards = match strategy {
        UpcycleStrategy::Copy => 1,
        UpcycleStrategy::CopyWithNoise { relative_std: value } | UpcycleStrategy::Drop { ratio: value } => {
            let most = if matches!(strategy, UpcycleStrategy::Drop { .. }) { 1.0 } else { f64::MAX };
            if !(0.0..=most).contains(&value) {
                return Err(UpcycleError::Strategy {
                    strategy: format!("{strategy:?}"),
                    reason: "the number is out of range".into(),
                });
            }
            1
        }
        UpcycleStrategy::Granular { shards } => {
            let top_k = moe.assignment.active_experts(num_experts);
            if shards == 0 || !num_experts.is_multiple_of(shards) || !top_k.is_multiple_of(shards) {
                let reason = format!("it must divide the {num_experts} experts and the {top_k} choices of each token");
                return Err(UpcycleError::Strategy { strategy: format!("{strategy:?}"), reason });
            }
            shards
        }
    };
    UpcycleError::shapes("w_in", &weights.w_in.dims(), &[d_model, d_ff * shards])?;
    UpcycleError::shapes("w_out", &weights.w_out.dims(), &[d_ff * shards, d_model])?;
    let form = if moe.experts.w_gate.is_some() { FeedForwardForm::Gated } else { FeedForwardForm::Plain };
    UpcycleError::settings("form", FeedForwardForm::Plain, form)?;
    if moe.shared_expert.is_some() {
        return Err(UpcycleError::Setting { at: String::new(), what: "shared_expert", dense: "none".into(), sparse: "one".into() });
    }
    if weights.activation != moe.experts.activation {
        let dense = format!("{:?}", weights.activation);
        return Err(UpcycleError::Activation { at: String::new(), dense, sparse: moe.experts.activation });
    }
    for (what, dense, sparse, width) in
        [("b_in", &weights.b_in, &moe.experts.b_in, d_ff * shards), ("b_out", &weights.b_out, &moe.experts.b_out, d_model)]
    {
        if dense.is_some() != sparse.is_some() {
            return Err(UpcycleError::Bias { at: String::new(), what, dense: dense.is_some() });
        }
        if let Some(dense) = dense {
            UpcycleError::shapes(what, &dense.dims(), &[width])?;
            crate::check_finite(what, dense)?;
        }
    }
    crate::check_finite("w_in", &weights.w_in)?;
    crate::check_finite("w_out", &weights.w_out)?;
    Ok(())
}

/// The parameter with a value from another model, which may live on another device.
pub(super) fn replace<const D: usize>(param: Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    with_value(param, |old| Tensor::from_data(value.into_data(), &old.device()))
}

fn compare(
    dense: &DenseWeights,
    sparse: &MoeFeedForward,
    tokens: Tensor<3>,
    valid: Option<Tensor<2, Bool>>,
) -> Result<f64, UpcycleError> {
    let [batch, len, d_model] = tokens.dims();
    let expected = dense.forward(tokens.clone().reshape([batch * len, d_model])).reshape([batch, len, d_model]);
    let input = MoeInput::new(tokens);
    let (input, expected) = match valid {
        None => (input, expected),
        Some(valid) => {
            let invalid = valid.clone().bool_not().unsqueeze_dim::<3>(2);
            (input.valid(valid), expected.mask_fill(invalid, 0.0))
        }
    };
    // Frozen: compared as at inference, where nothing is dropped by default.
    let found = sparse.clone().freeze().forward(input).output;
    deviation("the outputs on the probe batch", expected.detach(), found.detach())
}
