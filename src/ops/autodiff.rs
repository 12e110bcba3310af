//! Backward passes of the kernels, by hand: gathers and grouped products again, each gradient buffer written once.

use burn::backend::TensorMetadata;
use burn::backend::autodiff::{
    Autodiff,
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, IntTensor};

use super::{
    Activation, HostOffsets,
    extension::{MoeBackwardOps, MoeOps},
};
#[cfg(feature = "flex")]
use super::{
    AttentionShape,
    extension::{AttentionBackwardOps, AttentionOps},
};
#[cfg(feature = "_gpu")]
use super::{
    GateSum,
    extension::{RouterBackwardOps, RouterOps},
};

#[derive(Debug)]
struct ActivationStep;

impl<B: MoeBackwardOps> Backward<B, 1> for ActivationStep {
    type State = (FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([x_node], (x, activation)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::moe_activation_backward(x, grad, activation));
        }
    }
}

#[derive(Debug)]
struct DispatchStep;

impl<B: MoeBackwardOps> Backward<B, 1> for DispatchStep {
    type State = (IntTensor<B>, usize);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([x_node], (choice_row, num_tokens)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::moe_dispatch_backward(grad, choice_row, num_tokens));
        }
    }
}

#[derive(Debug)]
struct CombineStep;

impl<B: MoeBackwardOps> Backward<B, 2> for CombineStep {
    type State = (FloatTensor<B>, FloatTensor<B>, IntTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([rows_node, gates_node], (rows, gates, row_choice, choice_row)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = gates_node {
            grads.register::<B>(node.id, B::moe_combine_backward_gates(grad.clone(), rows, choice_row));
        }
        if let Some(node) = rows_node {
            grads.register::<B>(node.id, B::moe_combine_backward_rows(grad, gates, row_choice));
        }
    }
}

#[derive(Debug)]
struct GroupedLinearStep;

/// What [`GroupedLinearStep`] keeps; `pre` only where an activation follows.
#[derive(Debug, Clone)]
struct GroupedLinearState<B: MoeBackwardOps> {
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    offsets: IntTensor<B>,
    host_offsets: HostOffsets,
    activation: Option<(Activation, FloatTensor<B>)>,
}

impl<B: MoeBackwardOps> Backward<B, 3> for GroupedLinearStep {
    type State = GroupedLinearState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([x_node, weight_node, bias_node], state) = (ops.parents, ops.state);
        let mut grad = grads.consume::<B>(&ops.node);
        if let Some((activation, pre)) = state.activation {
            grad = B::moe_activation_backward(pre, grad, activation);
        }
        let (offsets, host_offsets) = (state.offsets, state.host_offsets);
        if let Some(node) = bias_node {
            let bias_grad = B::moe_grouped_linear_backward_bias(grad.clone(), offsets.clone(), host_offsets.clone());
            grads.register::<B>(node.id, bias_grad);
        }
        if let Some(node) = weight_node {
            let weight_grad = B::moe_grouped_linear_backward_weight(state.x, grad.clone(), offsets.clone(), host_offsets.clone());
            grads.register::<B>(node.id, weight_grad);
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::moe_grouped_linear_backward_x(grad, state.weight, offsets, host_offsets));
        }
    }
}

#[cfg(feature = "_gpu")]
#[derive(Debug)]
struct RouterStep;

#[cfg(feature = "_gpu")]
impl<B: RouterBackwardOps> Backward<B, 2> for RouterStep {
    type State = (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([x_node, weight_node], (x, weight, logits)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = weight_node {
            grads.register::<B>(node.id, B::moe_router_logits_backward_weight(grad.clone(), x.clone(), logits.clone()));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::moe_router_logits_backward_x(grad, weight, x, logits));
        }
    }
}

/// Keeps the scores, the choices and their rows.
#[cfg(feature = "_gpu")]
#[derive(Debug)]
struct GatesStep;

#[cfg(feature = "_gpu")]
impl<B: RouterBackwardOps> Backward<B, 1> for GatesStep {
    type State = (FloatTensor<B>, IntTensor<B>, IntTensor<B>, GateSum);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([node], (scores, chosen, choice_row, rule)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::moe_gates_backward(grad, scores, chosen, choice_row, rule));
        }
    }
}

#[cfg(feature = "_gpu")]
impl<B: RouterOps + RouterBackwardOps, C: CheckpointStrategy> RouterOps for Autodiff<B, C> {
    fn moe_router_logits(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let step = RouterStep.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful();
        let (x, weight) = (x.into_primitive(), weight.into_primitive());
        let out = B::moe_router_logits(x.clone(), weight.clone());
        match step {
            OpsKind::Tracked(prep) => prep.finish((x, weight, out.clone()), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn moe_gates(
        scores: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        choice_row: IntTensor<Self>,
        rule: GateSum,
    ) -> FloatTensor<Self> {
        let step = GatesStep.prepare::<C>([scores.node()]).compute_bound().stateful();
        let scores = scores.into_primitive();
        let out = B::moe_gates(scores.clone(), chosen.clone(), choice_row.clone(), rule);
        match step {
            OpsKind::Tracked(prep) => prep.finish((scores, chosen, choice_row, rule), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

impl<B: MoeOps + MoeBackwardOps, C: CheckpointStrategy> MoeOps for Autodiff<B, C> {
    fn moe_activation(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        match ActivationStep.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let x = x.into_primitive();
                let out = B::moe_activation(x.clone(), activation);
                prep.finish((x, activation), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::moe_activation(x.into_primitive(), activation)),
        }
    }

    fn moe_dispatch(x: FloatTensor<Self>, row_choice: IntTensor<Self>, choice_row: IntTensor<Self>) -> FloatTensor<Self> {
        let num_tokens = x.shape()[0];
        match DispatchStep.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let out = B::moe_dispatch(x.into_primitive(), row_choice, choice_row.clone());
                prep.finish((choice_row, num_tokens), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::moe_dispatch(x.into_primitive(), row_choice, choice_row)),
        }
    }

    fn moe_combine(
        rows: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let step = CombineStep.prepare::<C>([rows.node(), gates.node()]).compute_bound().stateful();
        let (rows, gates) = (rows.into_primitive(), gates.into_primitive());
        let out = B::moe_combine(rows.clone(), gates.clone(), row_choice.clone(), choice_row.clone());
        match step {
            OpsKind::Tracked(prep) => prep.finish((rows, gates, row_choice, choice_row), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn moe_grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Option<Activation>,
    ) -> FloatTensor<Self> {
        let step = GroupedLinearStep.prepare::<C>([x.node(), weight.node(), bias.node()]).compute_bound().stateful();
        let (x, weight, bias) = (x.into_primitive(), weight.into_primitive(), bias.into_primitive());
        let prep = match step {
            OpsKind::Tracked(prep) => prep,
            OpsKind::UnTracked(prep) => {
                return prep.finish(B::moe_grouped_linear(x, weight, bias, offsets, host_offsets, activation));
            }
        };
        let inputs = (x.clone(), weight.clone(), offsets.clone(), host_offsets.clone());
        let (out, activation) = match activation {
            None => (B::moe_grouped_linear(inputs.0, inputs.1, bias, inputs.2, inputs.3, None), None),
            Some(activation) => {
                let (out, pre) = B::moe_grouped_linear_keeping(inputs.0, inputs.1, bias, inputs.2, inputs.3, activation);
                (out, Some((activation, pre)))
            }
        };
        prep.finish(GroupedLinearState { x, weight, offsets, host_offsets, activation }, out)
    }
}

#[cfg(feature = "flex")]
#[derive(Debug)]
struct AttentionStep;

#[cfg(feature = "flex")]
impl<B: AttentionBackwardOps> Backward<B, 3> for AttentionStep {
    type State = ([FloatTensor<B>; 3], AttentionShape);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (nodes, ([query, key, value], shape)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        let (query, key, value) = B::moe_attention_backward(query, key, value, grad, shape);
        for (node, gradient) in nodes.into_iter().zip([query, key, value]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

#[cfg(feature = "flex")]
impl<B: AttentionOps + AttentionBackwardOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn moe_attention(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        shape: AttentionShape,
    ) -> FloatTensor<Self> {
        let step = AttentionStep.prepare::<C>([query.node(), key.node(), value.node()]).compute_bound().stateful();
        let [query, key, value] = [query, key, value].map(|x| x.into_primitive());
        let out = B::moe_attention(query.clone(), key.clone(), value.clone(), shape.clone());
        match step {
            OpsKind::Tracked(prep) => prep.finish(([query, key, value], shape), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}
