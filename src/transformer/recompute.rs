//! Passes that keep what goes into each block, and compute the block again on the way back.

use burn::tensor::Tensor;

use super::{Encoder, TokenMarks, layout::Layout};
use crate::routing::Routing;

/// A pass through an encoder of which only what went into each block is left.
pub(crate) struct KeptInputs {
    layout: Layout,
    marks: TokenMarks,
    /// What went into each block, and what came out of the last one, `[R, D]`.
    rows: Vec<Tensor<2>>,
    /// One per routed block.
    pub(crate) routings: Vec<Routing>,
}

/// A part of a pass with a graph of its own.
pub(crate) struct Part<T> {
    /// Where its graph begins, `[R, D]`.
    pub(crate) leaf: Tensor<2>,
    pub(crate) output: T,
    pub(crate) routing: Option<Routing>,
}

impl Encoder {
    /// A pass without gradients; arguments as for [`forward`](Self::forward). `before` is called with the index of each block before it is computed.
    pub(crate) fn forward_keeping(&self, x: Tensor<3>, mut marks: TokenMarks, causal: bool, before: &dyn Fn(usize)) -> KeptInputs {
        let layout = self.lay_out(&x, &mut marks, causal, true);
        let mut rows = vec![layout.rows(x)];
        let mut routings = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            before(index);
            let (next, routing) = block.run(rows[index].clone(), &layout, &marks, None, None);
            rows.push(next);
            routings.extend(routing);
        }
        KeptInputs { layout, marks, rows, routings }
    }
}

impl KeptInputs {
    fn leaf(&self, index: usize) -> Tensor<2> {
        self.rows[index].clone().detach().require_grad()
    }

    /// What came out of the last block, `[B, N, D]`.
    pub(crate) fn hidden(&self) -> Part<Tensor<3>> {
        let leaf = self.leaf(self.rows.len() - 1);
        Part { output: self.layout.tokens(leaf.clone()), leaf, routing: None }
    }

    /// A block of `encoder` once more, `[R, D]`.
    pub(crate) fn block(&self, encoder: &Encoder, index: usize) -> Part<Tensor<2>> {
        let leaf = self.leaf(index);
        let (output, routing) = encoder.blocks[index].run(leaf.clone(), &self.layout, &self.marks, None, None);
        Part { leaf, output, routing }
    }

    /// What goes into the first block, `[B, N, D] -> [R, D]`.
    pub(crate) fn rows(&self, x: Tensor<3>) -> Tensor<2> {
        self.layout.rows(x)
    }
}
