//! What a batch routes.

use burn::optim::GradientsParams;

use super::StepGradients;
use crate::{
    clip::Clip,
    routing::{BatchTotals, Routing},
    train::ranks::{RankError, Ranks},
};

/// What was routed so far.
#[derive(Default)]
pub(super) struct Routed {
    pub(super) totals: [BatchTotals; 2],
    pub(super) kept: [Vec<usize>; 2],
}

impl Routed {
    pub(super) fn add(&mut self, image_routings: &[Routing], text_routings: &[Routing]) {
        for ((totals, kept), routings) in self.totals.iter_mut().zip(&mut self.kept).zip([image_routings, text_routings]) {
            totals.add(routings);
            kept.resize(routings.len(), 0);
            kept.iter_mut().zip(routings).for_each(|(kept, routing)| *kept += routing.plan.num_rows());
        }
    }

    /// What all ranks routed.
    pub(super) fn sum_over(&mut self, ranks: &dyn Ranks, model: &Clip) -> Result<(), RankError> {
        if !ranks.has_others() {
            return Ok(());
        }
        let encoders = [&model.vision.encoder, &model.text.encoder];
        for ((totals, kept), encoder) in self.totals.iter_mut().zip(&mut self.kept).zip(encoders) {
            // A rank without a pair has counted nothing.
            if totals.requested.is_empty() {
                totals.requested = encoder.experts_of_routed_blocks().map(|experts| vec![0; experts]).collect();
                totals.tokens = vec![0; totals.requested.len()];
                *kept = totals.tokens.clone();
            }
            for requested in &mut totals.requested {
                ranks.sum_counts(requested)?;
            }
            ranks.sum_counts(&mut totals.tokens)?;
            ranks.sum_counts(kept)?;
        }
        Ok(())
    }

    pub(super) fn with(self, [contrastive, auxiliary]: [f64; 2], pairs: usize, gradients: GradientsParams) -> StepGradients {
        StepGradients { contrastive, auxiliary, pairs, gradients, totals: self.totals, kept: self.kept }
    }
}
