//! The mean of several modules.

use std::fmt::Display;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};

use crate::{support::param::replaced_in, upcycle::UpcycleError};

/// The first module with the mean of all in each parameter.
pub(super) fn average<M: Module + Display>(modules: &[&M]) -> Result<M, UpcycleError> {
    for (index, module) in modules.iter().enumerate() {
        same_structure(modules[0], module, index)?;
    }
    let mut sums = Sums { values: Vec::new(), next: 0 };
    for module in modules {
        sums.next = 0;
        module.visit(&mut sums);
    }
    let mut means = Means { sums: sums.values.into_iter(), count: modules.len() as f32 };
    Ok(modules[0].clone().map(&mut means))
}

/// Compares what burn shows of the modules: all sizes and settings, of which some, like a norm's epsilon, cannot be read in another way.
fn same_structure<M: Display>(first: &M, other: &M, index: usize) -> Result<(), UpcycleError> {
    let (first, other) = (first.to_string(), other.to_string());
    if first == other {
        return Ok(());
    }
    let differing = first.lines().zip(other.lines()).find(|(first, other)| first != other);
    let (first, other) = differing.unwrap_or((&first, &other));
    let reason = format!("no mean of model 0, which has `{}`, and model {index}, which has `{}`", first.trim(), other.trim());
    Err(UpcycleError::models(reason))
}

/// The sum of each parameter over modules of one structure, which visit their parameters in the same order.
struct Sums {
    values: Vec<Vec<f32>>,
    next: usize,
}

impl ModuleVisitor for Sums {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // What a record would hold: of a packed weight, the weight.
        let values: Vec<f32> = param.transform_for_save().val().detach().try_into_vec_as().expect("a float tensor reads as f32");
        match self.values.get_mut(self.next) {
            None => self.values.push(values),
            Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
        }
        self.next += 1;
    }
}

/// Puts the means where the sums came from.
struct Means {
    sums: std::vec::IntoIter<Vec<f32>>,
    count: f32,
}

impl ModuleMapper for Means {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let sum = self.sums.next().expect("every parameter was visited");
        let mean: Vec<f32> = sum.into_iter().map(|sum| sum / self.count).collect();
        let (device, dtype) = (param.lazy_device(), param.val().dtype());
        let data = TensorData::new(mean, param.shape());
        replaced_in(param, data, (&device, dtype))
    }
}
