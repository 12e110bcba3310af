//! Modules of one or more encoders: an encoder, a tower, a CLIP.

use std::fmt::Display;

use burn::module::Module;
use burn::tensor::Tensor;

#[cfg(feature = "clip")]
use super::clip::{clip, text, vision};
use super::{
    Probe, UpcycleError, UpcycleFromDense, UpcycleOptions, UpcycleReport, Upcycled, UpcycledLayer,
    many::OnlyModel,
    only_valid,
    report::deviation,
    source::ExpertSource,
    transformer::{encoder, marks, tokens_of},
};
#[cfg(feature = "clip")]
use crate::clip::{Clip, TextTower, VisionTower, normalize};
use crate::{
    support::param::{frozen, with_floats},
    transformer::{Encoder, FeedForwardInputs},
};

/// What a module computes from a probe, by its name.
type Outputs = Vec<(&'static str, Tensor<2>)>;

/// A module of one or more encoders, dense or sparse.
pub(super) trait Encoders: Module + Display {
    /// The encoders, always in this order.
    fn encoders(&self) -> Vec<&Encoder>;

    /// Takes everything over from `rest`, but the experts of each encoder from its source; returns the layers that became sparse.
    fn take_over(&mut self, rest: &Self, experts: &[ExpertSource]) -> Result<Vec<UpcycledLayer>, UpcycleError>;

    /// Refuses a probe that does not fit.
    fn check(&self, probe: &Probe) -> Result<(), UpcycleError>;

    /// What the feed-forward networks of each encoder read.
    fn inputs(&self, probe: &Probe) -> Result<Vec<FeedForwardInputs>, UpcycleError>;

    /// What is computed from a probe, as the routers decide or through the experts of one model only.
    fn outputs(&self, probe: &Probe, only: Option<OnlyModel>) -> Result<Outputs, UpcycleError>;

    /// How far the outputs of this sparse module are from those of a dense one, each computed on its own device.
    fn deviation(&self, dense: &Self, probe: &Probe, only: Option<OnlyModel>) -> Result<f64, UpcycleError> {
        let (expected, found) = (frozen(dense).outputs(probe, None)?, frozen(self).outputs(probe, only)?);
        let mut largest = 0f64;
        for ((name, expected), (_, found)) in expected.into_iter().zip(found) {
            largest = largest.max(deviation(&format!("{name} on the probe batch"), expected, found)?);
        }
        Ok(largest)
    }
}

/// A sparse module from a dense one of the same kind.
fn upcycle_one<M: Encoders>(mut sparse: M, dense: &M, options: &UpcycleOptions) -> Result<Upcycled<M>, UpcycleError> {
    let dense = &with_floats(dense);
    options.probe.as_ref().map(|probe| dense.check(probe)).transpose()?;
    let calibrations: Vec<Option<FeedForwardInputs>> = match options.calibration_batch()? {
        Some(batch) => dense.inputs(batch)?.into_iter().map(Some).collect(),
        None => dense.encoders().iter().map(|_| None).collect(),
    };
    let source = |calibration| ExpertSource::Dense { strategy: options.strategy, calibration };
    let layers = sparse.take_over(dense, &calibrations.into_iter().map(source).collect::<Vec<_>>())?;
    if layers.is_empty() {
        return Err(UpcycleError::NotSparse);
    }
    let max_deviation = options.probe.as_ref().map(|probe| sparse.deviation(dense, probe, None)).transpose()?;
    let report = UpcycleReport::new(dense, &sparse, layers, max_deviation);
    Ok(Upcycled { model: sparse, report })
}

impl Encoders for Encoder {
    fn encoders(&self) -> Vec<&Encoder> {
        vec![self]
    }

    fn take_over(&mut self, rest: &Self, experts: &[ExpertSource]) -> Result<Vec<UpcycledLayer>, UpcycleError> {
        let (model, layers) = encoder(self.clone(), rest, &experts[0])?;
        *self = model;
        Ok(layers)
    }

    fn check(&self, probe: &Probe) -> Result<(), UpcycleError> {
        tokens_of(probe, self.blocks.first()).map(|_| ())
    }

    fn inputs(&self, probe: &Probe) -> Result<Vec<FeedForwardInputs>, UpcycleError> {
        let (tokens, valid) = tokens_of(&probe.on(self), self.blocks.first())?;
        Ok(vec![self.feed_forward_inputs(tokens, marks(&valid), false)])
    }

    fn outputs(&self, probe: &Probe, only: Option<OnlyModel>) -> Result<Outputs, UpcycleError> {
        let (tokens, valid) = tokens_of(&probe.on(self), self.blocks.first())?;
        let output = match only {
            None => self.forward(tokens, marks(&valid), false),
            Some(only) => self.forward_with(tokens, marks(&valid), false, &mut only.router(self)),
        };
        Ok(vec![("the outputs", only_valid(output.hidden, &valid).flatten(0, 1))])
    }
}

#[cfg(feature = "clip")]
impl Encoders for VisionTower {
    fn encoders(&self) -> Vec<&Encoder> {
        vec![&self.encoder]
    }

    fn take_over(&mut self, rest: &Self, experts: &[ExpertSource]) -> Result<Vec<UpcycledLayer>, UpcycleError> {
        vision(self, rest, &experts[0])
    }

    fn check(&self, probe: &Probe) -> Result<(), UpcycleError> {
        probe.images(self).map(|_| ())
    }

    fn inputs(&self, probe: &Probe) -> Result<Vec<FeedForwardInputs>, UpcycleError> {
        let images = probe.on(self).images(self)?.cast(self.patch_embedding.weight.dtype());
        Ok(vec![self.feed_forward_inputs(images)])
    }

    fn outputs(&self, probe: &Probe, only: Option<OnlyModel>) -> Result<Outputs, UpcycleError> {
        let images = probe.on(self).images(self)?.cast(self.patch_embedding.weight.dtype());
        let output = match only {
            None => self.forward(images),
            Some(only) => self.forward_with(images, &mut only.router(&self.encoder)),
        };
        Ok(vec![("image embeddings", normalize(output.embedding))])
    }
}

#[cfg(feature = "clip")]
impl Encoders for TextTower {
    fn encoders(&self) -> Vec<&Encoder> {
        vec![&self.encoder]
    }

    fn take_over(&mut self, rest: &Self, experts: &[ExpertSource]) -> Result<Vec<UpcycledLayer>, UpcycleError> {
        text(self, rest, &experts[0])
    }

    fn check(&self, probe: &Probe) -> Result<(), UpcycleError> {
        probe.texts(self).map(|_| ())
    }

    fn inputs(&self, probe: &Probe) -> Result<Vec<FeedForwardInputs>, UpcycleError> {
        Ok(vec![self.feed_forward_inputs(probe.on(self).texts(self)?)])
    }

    fn outputs(&self, probe: &Probe, only: Option<OnlyModel>) -> Result<Outputs, UpcycleError> {
        let tokens = probe.on(self).texts(self)?;
        let output = match only {
            None => self.forward(tokens),
            Some(only) => self.forward_with(tokens, &mut only.router(&self.encoder)),
        };
        Ok(vec![("text embeddings", normalize(output.embedding))])
    }
}

#[cfg(feature = "clip")]
impl Encoders for Clip {
    fn encoders(&self) -> Vec<&Encoder> {
        vec![&self.vision.encoder, &self.text.encoder]
    }

    fn take_over(&mut self, rest: &Self, experts: &[ExpertSource]) -> Result<Vec<UpcycledLayer>, UpcycleError> {
        clip(self, rest, [&experts[0], &experts[1]])
    }

    fn check(&self, probe: &Probe) -> Result<(), UpcycleError> {
        match probe {
            Probe::ImagesAndTexts { .. } => self.vision.check(probe).and_then(|()| self.text.check(probe)),
            _ => Err(probe.is_not("images and texts")),
        }
    }

    fn inputs(&self, probe: &Probe) -> Result<Vec<FeedForwardInputs>, UpcycleError> {
        self.check(probe)?;
        Ok([self.vision.inputs(probe)?, self.text.inputs(probe)?].concat())
    }

    fn outputs(&self, probe: &Probe, only: Option<OnlyModel>) -> Result<Outputs, UpcycleError> {
        self.check(probe)?;
        Ok([self.vision.outputs(probe, only)?, self.text.outputs(probe, only)?].concat())
    }
}

impl UpcycleFromDense<Encoder> for Encoder {
    fn upcycle_from_dense(self, dense: &Encoder, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle_one(self, dense, options)
    }
}

/// Every second block of both towers becomes sparse with [`SparseClipConfig::clip_up`](crate::clip::SparseClipConfig::clip_up).
/// The report's deviation is that of the embeddings, normalised.
#[cfg(feature = "clip")]
impl UpcycleFromDense<Clip> for Clip {
    fn upcycle_from_dense(self, dense: &Clip, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle_one(self, dense, options)
    }
}

/// A vision tower alone; probe and calibration are [`Probe::Images`], or [`Probe::ImagesAndTexts`] of which the images are taken.
#[cfg(feature = "clip")]
impl UpcycleFromDense<VisionTower> for VisionTower {
    fn upcycle_from_dense(self, dense: &VisionTower, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle_one(self, dense, options)
    }
}

/// A text tower alone; probe and calibration are [`Probe::Texts`], or [`Probe::ImagesAndTexts`] of which the texts are taken.
#[cfg(feature = "clip")]
impl UpcycleFromDense<TextTower> for TextTower {
    fn upcycle_from_dense(self, dense: &TextTower, options: &UpcycleOptions) -> Result<Upcycled<Self>, UpcycleError> {
        upcycle_one(self, dense, options)
    }
}
