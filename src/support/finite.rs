//! Finding the first value that is NaN or infinite.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;

/// A tensor holds a value that is not finite.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{tensor}` holds {count} values that are not finite, of {total}")]
pub struct NonFiniteError {
    /// Name of the tensor; for a parameter, its path in the module.
    pub tensor: String,
    /// How many values are NaN or infinite.
    pub count: usize,
    /// How many values there are.
    pub total: usize,
}

/// Checks one tensor of any shape.
///
/// # Errors
/// Names the tensor as given and counts the values that are NaN or infinite.
pub fn check_finite<const D: usize>(name: &str, tensor: &Tensor<D>) -> Result<(), NonFiniteError> {
    let values = tensor.clone().detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32");
    match values.iter().filter(|v| !v.is_finite()).count() {
        0 => Ok(()),
        count => Err(NonFiniteError { tensor: name.to_string(), count, total: values.len() }),
    }
}

/// Checks every parameter of a module.
///
/// # Errors
/// Names the first parameter that holds a NaN or an infinity, by its path.
pub fn check_finite_module<M: Module>(module: &M) -> Result<(), NonFiniteError> {
    let mut visitor = Finite { path: Vec::new(), first: Ok(()) };
    module.visit(&mut visitor);
    visitor.first
}

struct Finite {
    path: Vec<String>,
    first: Result<(), NonFiniteError>,
}

impl ModuleVisitor for Finite {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.first.is_ok() {
            self.first = check_finite(&self.path.join("."), &param.transform_for_save().val());
        }
    }
}
