//! How weights move.

use burn::config::Config;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamGroup, ParamId};
use burn::optim::{
    AdamW, AdamWConfig, DynOptimizer, DynState, LearningRate, ModuleOptimizer, StateSink, StateSource,
    lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrScheduler},
};
use burn::tensor::{Device, Tensor, kind::BridgeTensor};
use std::collections::HashMap;

use super::WarmupCosine;
use crate::support::error::ConfigError;

/// Of a layer, beside its router.
const SHARED_EXPERT_GATE: &str = "shared_expert_gate";

/// Parameters that are not decayed, by parts of their paths.
const UNDECAYED: [&str; 13] = [
    ".bias",
    ".gamma",
    ".beta",
    ".b_in",
    ".b_gate",
    ".b_out",
    ".router.",
    SHARED_EXPERT_GATE,
    "logit_scale",
    "class_embedding",
    "position_embedding",
    "pooling.probe",
    "token_embedding",
];

/// AdamW and its learning rate. Biases, norms, embeddings, the logit scale, routers and the gates of shared experts are not decayed.
#[derive(Config, Debug, PartialEq)]
pub struct OptimizerConfig {
    /// The learning rate over the steps.
    pub schedule: WarmupCosine,
    /// Weight decay, times the learning rate at each step. Default: 0.1
    #[config(default = 0.1)]
    pub weight_decay: f32,
    /// Decay of the first moment. Default: 0.9
    #[config(default = 0.9)]
    pub beta_1: f32,
    /// Decay of the second moment. Default: 0.98
    #[config(default = 0.98)]
    pub beta_2: f32,
    /// Added to the root of the second moment. Default: 1e-8
    #[config(default = 1e-8)]
    pub epsilon: f32,
    /// The largest norm that the gradients of all parameters together may have; larger ones are scaled down. Default: no limit
    #[config(default = "None")]
    pub clip_norm: Option<f64>,
    /// Learning rates of parts of the model, over that of the schedule. Default: all the same
    #[config(default = "RateFactors::new()")]
    pub rates: RateFactors,
    /// How much of the averaged weights stays at each step, where an average is kept (Polyak): evaluations are then of the average. In the first steps,
    /// from 0 on, it is `(1 + step) / (10 + step)` where that is less. Default: none is kept
    #[config(default = "None")]
    pub average: Option<f64>,
}

/// Learning rates of parts of a model, over that of the rest.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct RateFactors {
    /// The vision tower's. Default: 1
    #[config(default = 1.0)]
    pub vision: f64,
    /// The text tower's. Default: 1
    #[config(default = 1.0)]
    pub text: f64,
    /// The routers', in both towers, in place of their tower's. Default: that of the tower
    #[config(default = "None")]
    pub router: Option<f64>,
}

impl OptimizerConfig {
    /// Refuses numbers that no optimiser can work with.
    ///
    /// # Errors
    /// The first one, with its value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let positive = |field, value: f64| {
            let reason = "must be finite and above 0";
            if value.is_finite() && value > 0.0 { Ok(()) } else { Err(ConfigError::OutOfRange { field, value, reason }) }
        };
        let factor = |field, value: f64| {
            let reason = "must be finite and not negative";
            if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(ConfigError::OutOfRange { field, value, reason }) }
        };
        let share = |field, value: f64| {
            let reason = "must be at least 0 and below 1";
            if (0.0..1.0).contains(&value) { Ok(()) } else { Err(ConfigError::OutOfRange { field, value, reason }) }
        };
        factor("schedule.peak", self.schedule.peak)?;
        factor("schedule.final_fraction", self.schedule.final_fraction)?;
        factor("weight_decay", self.weight_decay.into())?;
        share("beta_1", self.beta_1.into())?;
        share("beta_2", self.beta_2.into())?;
        positive("epsilon", self.epsilon.into())?;
        self.clip_norm.map_or(Ok(()), |norm| positive("clip_norm", norm))?;
        factor("rates.vision", self.rates.vision)?;
        factor("rates.text", self.rates.text)?;
        self.rates.router.map_or(Ok(()), |rate| factor("rates.router", rate))?;
        self.average.map_or(Ok(()), |decay| share("average", decay))
    }

    /// An optimiser whose state is read onto `device`.
    pub(super) fn init(&self, device: &Device) -> ModuleOptimizer {
        let adamw = AdamWConfig::new().with_beta_1(self.beta_1).with_beta_2(self.beta_2).with_epsilon(self.epsilon);
        let on_device = |decay| OnDevice { adamw: adamw.clone().with_weight_decay(decay).build(), device: device.clone().inner() };
        // The last group that a parameter matches counts.
        adamw.init().with_group(ParamGroup::all(), on_device(self.weight_decay), None).with_group(
            ParamGroup::from_any_predicates(UNDECAYED.to_vec()),
            on_device(0.0),
            None,
        )
    }

    /// How much of the average stays at step `step` (from 0): less in the first steps, `(1 + step) / (10 + step)`, so that where the run started is
    /// forgotten in short runs too.
    pub(super) fn average_at(&self, step: usize) -> Option<f64> {
        self.average.map(|decay| decay.min((1.0 + step as f64) / (10.0 + step as f64)))
    }

    /// The learning rates of step `step` (from 0) of `total`.
    pub(super) fn rates_at(&self, step: usize, total: usize) -> ModuleLearningRate {
        let rate = self.schedule.at(step, total);
        let RateFactors { vision, text, router } = self.rates;
        let group = |scheduler: ModuleLrScheduler, path: &str, factor: f64| match factor {
            1.0 => scheduler,
            factor => scheduler.with_group(ParamGroup::from_predicate(path), rate * factor),
        };
        let scheduler = group(ModuleLrScheduler::new(rate), "vision.", vision);
        let scheduler = group(scheduler, "text.", text);
        match router {
            None => scheduler,
            Some(factor) => [".router.", SHARED_EXPERT_GATE]
                .into_iter()
                .fold(scheduler, |scheduler, path| scheduler.with_group(ParamGroup::from_predicate(path), rate * factor)),
        }
        .step()
    }
}

/// burn reads an optimiser's state onto the default device, which need not be the one that is trained on, nor be there at all: a program that was
/// built for a GPU has that one as its default. This reads it onto its own device.
struct OnDevice {
    adamw: AdamW,
    device: Device,
}

impl DynOptimizer for OnDevice {
    fn step_dyn(
        &self,
        rank: usize,
        rate: LearningRate,
        tensor: BridgeTensor,
        gradient: BridgeTensor,
        state: Option<DynState>,
    ) -> (BridgeTensor, Option<DynState>) {
        self.adamw.step_dyn(rank, rate, tensor, gradient, state)
    }

    fn to_device_dyn(&self, state: DynState, device: &Device) -> DynState {
        self.adamw.to_device_dyn(state, device)
    }

    fn state_flatten(&self, prefix: &str, state: &DynState, out: &mut StateSink) {
        self.adamw.state_flatten(prefix, state, out);
    }

    fn state_unflatten(&self, rank: usize, prefix: &str, source: &mut StateSource, _: &Device) -> Option<DynState> {
        self.adamw.state_unflatten(rank, prefix, source, &self.device)
    }
}

/// `average · decay + model · (1 − decay)` for every parameter.
pub(super) fn average<M: Module>(average: M, model: &M, decay: f64) -> M {
    struct Weights(HashMap<ParamId, Box<dyn std::any::Any>>);
    impl ModuleVisitor for Weights {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.insert(param.id, Box::new(param.val().detach().without_autodiff()));
        }
    }
    struct Average(Weights, f64);
    impl ModuleMapper for Average {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Self(weights, decay) = self;
            let weight = weights.0.remove(&param.id).expect("the average is of this model");
            let weight = *weight.downcast::<Tensor<D>>().expect("a parameter keeps its rank");
            param.map(|average| average.clone() + (weight - average) * (1.0 - *decay))
        }
    }
    let mut weights = Weights(HashMap::new());
    model.visit(&mut weights);
    average.map(&mut Average(weights, decay))
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::GradientsParams;
    use burn::tensor::{Device, TensorData};
    use serde::Deserialize;

    use crate::train::recipe::gradients::{global_norm, scale_to};

    #[derive(Deserialize)]
    struct Reference {
        optimizer: Case,
    }

    #[derive(Deserialize)]
    struct Case {
        start: Weights,
        most: f64,
        decay: f64,
        steps: Vec<Step>,
    }

    #[derive(Deserialize)]
    struct Step {
        gradient: Weights,
        rate: f64,
        norm: f64,
        after: Weights,
        average: Weights,
    }

    /// Of a layer from 3 to 4.
    #[derive(Deserialize)]
    struct Weights {
        weight: Vec<Vec<f32>>,
        bias: Vec<f32>,
    }

    impl Weights {
        fn tensors(&self, device: &Device) -> (Tensor<2>, Tensor<1>) {
            let (rows, columns) = (self.weight.len(), self.weight[0].len());
            let weight = TensorData::new(self.weight.concat(), [rows, columns]);
            (Tensor::from_data(weight, device), Tensor::from_floats(&self.bias[..], device))
        }

        /// The largest distance to the layer.
        fn distance(&self, layer: &Linear) -> f32 {
            let (weight, bias) = self.tensors(&Device::flex());
            let largest = |tensor: Tensor<1>| tensor.abs().max().into_scalar::<f32>();
            let found = layer.clone();
            let of_weight = (found.weight.val().detach().without_autodiff() - weight).flatten::<1>(0, 1);
            let of_bias = found.bias.unwrap().val().detach().without_autodiff() - bias;
            largest(of_weight).max(largest(of_bias))
        }
    }

    #[test]
    fn an_average_forgets_where_a_short_run_started() {
        let config = OptimizerConfig::new(WarmupCosine::new(1.0)).with_average(Some(0.9));
        assert_eq!([0, 10, 1000].map(|step| config.average_at(step)), [Some(0.1), Some(0.55), Some(0.9)]);
        assert_eq!(config.with_average(None).average_at(3), None);
    }

    #[test]
    fn steps_limits_and_averages_are_those_of_pytorch() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/training/reference.json");
        let Reference { optimizer: case } = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let device = Device::flex();
        let (weight, bias) = case.start.tensors(&device);
        let mut layer = LinearConfig::new(3, 4).init(&device);
        layer.weight = layer.weight.map(|_| weight);
        layer.bias = layer.bias.map(|param| param.map(|_| bias));
        // In a model, so that paths are as there.
        let mut layers = vec![layer].train();
        let mut kept = layers.valid();
        let config = OptimizerConfig::new(WarmupCosine::new(1.0)).with_weight_decay(0.2);
        let mut adamw = config.init(&device);
        for Step { gradient, rate, norm, after, average: expected } in case.steps {
            let (of_weight, of_bias) = gradient.tensors(&device);
            let mut gradients = GradientsParams::new();
            gradients.register(layers[0].weight.id, of_weight);
            gradients.register(layers[0].bias.as_ref().unwrap().id, of_bias);
            let found = global_norm(&layers, &gradients);
            assert!((found / norm - 1.0).abs() < 1e-6, "{found} {norm}");
            scale_to(&layers, &mut gradients, found, case.most);
            layers = adamw.step(rate, layers, gradients);
            kept = average(kept, &layers.valid(), case.decay);
            assert!(after.distance(&layers[0]) < 1e-6, "{}", after.distance(&layers[0]));
            assert!(expected.distance(&kept[0]) < 1e-6, "{}", expected.distance(&kept[0]));
        }
    }
}
