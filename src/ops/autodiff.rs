//! Backward passes of the kernels, by hand: gathers and grouped products again, each gradient buffer written once.
//!
//! Inputs that a backward pass needs are asked for by their nodes: on a device with gradient checkpointing, those that are cheap to compute are
//! not kept but computed again. Moving rows, adding them up and activations are cheap; products and attention are not.

use std::{fmt, marker::PhantomData};

use burn::backend::autodiff::{
    Autodiff, NodeId,
    checkpoint::{base::Checkpointer, retro_forward::RetroForward, state::BackwardStates, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};

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

/// Computes the output of a cheap operation again from those of other nodes.
struct Recompute<B, F, const N: usize> {
    inputs: [NodeId; N],
    compute: F,
    backend: PhantomData<fn() -> B>,
}

impl<B: Backend, F: Fn([FloatTensor<B>; N]) -> FloatTensor<B>, const N: usize> Recompute<B, F, N> {
    fn new(inputs: [NodeId; N], compute: F) -> Self {
        Self { inputs, compute, backend: PhantomData }
    }
}

impl<B, F, const N: usize> fmt::Debug for Recompute<B, F, N> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Recompute").field("inputs", &self.inputs).finish_non_exhaustive()
    }
}

impl<B, F, const N: usize> RetroForward for Recompute<B, F, N>
where
    B: Backend,
    F: Fn([FloatTensor<B>; N]) -> FloatTensor<B> + Send + 'static,
{
    fn forward(&self, states: &mut BackwardStates, out_node: NodeId) {
        let inputs = self.inputs.map(|input| states.get_state::<FloatTensor<B>>(&input));
        states.save(out_node, (self.compute)(inputs));
    }
}

#[derive(Debug)]
struct ActivationStep;

impl<B: MoeBackwardOps> Backward<B, 1> for ActivationStep {
    type State = (NodeId, Activation);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([x_node], (x, activation)) = (ops.parents, ops.state);
        let x = checkpointer.retrieve_node_output(x);
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

/// Keeps the rows if gates have a gradient, and the gates if rows have one.
#[derive(Debug)]
struct CombineStep;

impl<B: MoeBackwardOps> Backward<B, 2> for CombineStep {
    type State = (Option<NodeId>, Option<NodeId>, IntTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([rows_node, gates_node], (rows, gates, row_choice, choice_row)) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        if let (Some(node), Some(rows)) = (gates_node, rows) {
            let rows = checkpointer.retrieve_node_output(rows);
            grads.register::<B>(node.id, B::moe_combine_backward_gates(grad.clone(), rows, choice_row));
        }
        if let (Some(node), Some(gates)) = (rows_node, gates) {
            let gates = checkpointer.retrieve_node_output(gates);
            grads.register::<B>(node.id, B::moe_combine_backward_rows(grad, gates, row_choice));
        }
    }
}

#[derive(Debug)]
struct GroupedLinearStep;

/// What [`GroupedLinearStep`] keeps: `x` if the weight has a gradient, and the weight if `x` has one.
#[derive(Debug, Clone)]
struct GroupedLinearState<B: MoeBackwardOps> {
    x: Option<NodeId>,
    weight: Option<NodeId>,
    offsets: IntTensor<B>,
    host_offsets: HostOffsets,
}

impl<B: MoeBackwardOps> Backward<B, 3> for GroupedLinearStep {
    type State = GroupedLinearState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([x_node, weight_node, bias_node], state) = (ops.parents, ops.state);
        let grad = grads.consume::<B>(&ops.node);
        let (offsets, host_offsets) = (state.offsets, state.host_offsets);
        if let Some(node) = bias_node {
            let bias_grad = B::moe_grouped_linear_backward_bias(grad.clone(), offsets.clone(), host_offsets.clone());
            grads.register::<B>(node.id, bias_grad);
        }
        if let (Some(node), Some(x)) = (weight_node, state.x) {
            let x = checkpointer.retrieve_node_output(x);
            let weight_grad = B::moe_grouped_linear_backward_weight(x, grad.clone(), offsets.clone(), host_offsets.clone());
            grads.register::<B>(node.id, weight_grad);
        }
        if let (Some(node), Some(weight)) = (x_node, state.weight) {
            let weight = checkpointer.retrieve_node_output(weight);
            grads.register::<B>(node.id, B::moe_grouped_linear_backward_x(grad, weight, offsets, host_offsets));
        }
    }
}

#[cfg(feature = "_gpu")]
#[derive(Debug)]
struct RouterStep;

#[cfg(feature = "_gpu")]
impl<B: RouterBackwardOps> Backward<B, 2> for RouterStep {
    type State = (NodeId, NodeId, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([x_node, weight_node], (x, weight, logits)) = (ops.parents, ops.state);
        let x: FloatTensor<B> = checkpointer.retrieve_node_output(x);
        let weight = checkpointer.retrieve_node_output(weight);
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
    type State = (NodeId, IntTensor<B>, IntTensor<B>, GateSum);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let ([node], (scores, chosen, choice_row, rule)) = (ops.parents, ops.state);
        let scores = checkpointer.retrieve_node_output(scores);
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, B::moe_gates_backward(grad, scores, chosen, choice_row, rule));
        }
    }
}

#[cfg(feature = "_gpu")]
impl<B: RouterOps + RouterBackwardOps, C: CheckpointStrategy> RouterOps for Autodiff<B, C> {
    fn moe_router_logits(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let out = B::moe_router_logits(x.primitive().clone(), weight.primitive().clone());
        match RouterStep.prepare::<C>([x.node(), weight.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&x), prep.checkpoint(&weight), out.clone());
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn moe_gates(
        scores: FloatTensor<Self>,
        chosen: IntTensor<Self>,
        choice_row: IntTensor<Self>,
        rule: GateSum,
    ) -> FloatTensor<Self> {
        let out = B::moe_gates(scores.primitive().clone(), chosen.clone(), choice_row.clone(), rule);
        match GatesStep.prepare::<C>([scores.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = (prep.checkpoint(&scores), chosen, choice_row, rule);
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

/// `out`, which is `act(x)`.
fn activated<B: MoeOps + MoeBackwardOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    out: FloatTensor<B>,
    activation: Activation,
) -> FloatTensor<Autodiff<B, C>> {
    let again = Recompute::<B, _, 1>::new([x.id()], move |[x]| B::moe_activation(x, activation));
    match ActivationStep.prepare::<C>([x.node()]).memory_bound().retro_forward(again).parents([&x]).stateful() {
        OpsKind::Tracked(mut prep) => {
            let state = (prep.checkpoint(&x), activation);
            prep.finish(state, out)
        }
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}

impl<B: MoeOps + MoeBackwardOps, C: CheckpointStrategy> MoeOps for Autodiff<B, C> {
    fn moe_activation(x: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let out = B::moe_activation(x.primitive().clone(), activation);
        activated::<B, C>(x, out, activation)
    }

    fn moe_dispatch(x: FloatTensor<Self>, row_choice: IntTensor<Self>, choice_row: IntTensor<Self>) -> FloatTensor<Self> {
        let num_tokens = x.shape()[0];
        let out = B::moe_dispatch(x.primitive().clone(), row_choice.clone(), choice_row.clone());
        let again = {
            let choice_row = choice_row.clone();
            Recompute::<B, _, 1>::new([x.id()], move |[x]| B::moe_dispatch(x, row_choice.clone(), choice_row.clone()))
        };
        match DispatchStep.prepare::<C>([x.node()]).memory_bound().retro_forward(again).parents([&x]).stateful() {
            OpsKind::Tracked(prep) => prep.finish((choice_row, num_tokens), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn moe_combine(
        rows: FloatTensor<Self>,
        gates: FloatTensor<Self>,
        row_choice: IntTensor<Self>,
        choice_row: IntTensor<Self>,
    ) -> FloatTensor<Self> {
        let out = B::moe_combine(rows.primitive().clone(), gates.primitive().clone(), row_choice.clone(), choice_row.clone());
        let again = {
            let (row_choice, choice_row) = (row_choice.clone(), choice_row.clone());
            Recompute::<B, _, 2>::new([rows.id(), gates.id()], move |[rows, gates]| {
                B::moe_combine(rows, gates, row_choice.clone(), choice_row.clone())
            })
        };
        let step = CombineStep.prepare::<C>([rows.node(), gates.node()]).memory_bound();
        match step.retro_forward(again).parents([&rows, &gates]).stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept_rows = gates.is_tracked().then(|| prep.checkpoint(&rows));
                let kept_gates = rows.is_tracked().then(|| prep.checkpoint(&gates));
                prep.finish((kept_rows, kept_gates, row_choice, choice_row), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    /// A product with its bias, and then, if there is one, the activation as a node of its own: what it was applied to is kept, and what came out
    /// of it is computed again by a strategy that does so.
    fn moe_grouped_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        bias: FloatTensor<Self>,
        offsets: IntTensor<Self>,
        host_offsets: HostOffsets,
        activation: Option<Activation>,
    ) -> FloatTensor<Self> {
        let step = GroupedLinearStep.prepare::<C>([x.node(), weight.node(), bias.node()]).compute_bound().stateful();
        let mut prep = match step {
            OpsKind::Tracked(prep) => prep,
            OpsKind::UnTracked(prep) => {
                let (x, weight, bias) = (x.into_primitive(), weight.into_primitive(), bias.into_primitive());
                return prep.finish(B::moe_grouped_linear(x, weight, bias, offsets, host_offsets, activation));
            }
        };
        let state = GroupedLinearState {
            x: weight.is_tracked().then(|| prep.checkpoint(&x)),
            weight: x.is_tracked().then(|| prep.checkpoint(&weight)),
            offsets: offsets.clone(),
            host_offsets: host_offsets.clone(),
        };
        let (x, weight, bias) = (x.into_primitive(), weight.into_primitive(), bias.into_primitive());
        match activation {
            None => prep.finish(state, B::moe_grouped_linear(x, weight, bias, offsets, host_offsets, None)),
            Some(activation) => {
                let (out, pre) = B::moe_grouped_linear_keeping(x, weight, bias, offsets, host_offsets, activation);
                activated::<B, C>(prep.finish(state, pre), out, activation)
            }
        }
    }
}

#[cfg(feature = "flex")]
#[derive(Debug)]
struct AttentionStep;

#[cfg(feature = "flex")]
impl<B: AttentionBackwardOps> Backward<B, 3> for AttentionStep {
    type State = ([NodeId; 3], AttentionShape);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let (nodes, (inputs, shape)) = (ops.parents, ops.state);
        let [query, key, value] = inputs.map(|input| checkpointer.retrieve_node_output(input));
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
        let inputs = [query, key, value];
        let [query, key, value] = inputs.each_ref().map(|x| x.primitive().clone());
        let out = B::moe_attention(query, key, value, shape.clone());
        match AttentionStep.prepare::<C>(inputs.each_ref().map(|x| x.node())).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let inputs = inputs.each_ref().map(|x| prep.checkpoint(x));
                prep.finish((inputs, shape), out)
            }
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}
