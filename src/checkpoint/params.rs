//! A module's parameters by path, read and replaced one at a time.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};

use crate::support::param::replaced;

/// A parameter whose numbers are copied to the host when they are asked for.
pub(crate) struct Source(Box<dyn Fn() -> Vec<f32>>);

impl Source {
    pub(crate) fn values(&self) -> Vec<f32> {
        (self.0)()
    }
}

/// Every float parameter by its path (`vision.encoder.blocks.0.attention.query.weight`).
pub(crate) fn sources<M: Module>(module: &M) -> BTreeMap<String, Source> {
    let mut reader = Reader { path: Vec::new(), sources: BTreeMap::new() };
    module.visit(&mut reader);
    reader.sources
}

/// The numbers of a parameter.
pub(crate) enum Loaded {
    Plain(Vec<f32>),
    /// Weights `[E, D, F]` to be packed.
    #[cfg(feature = "flex")]
    Packed(Vec<f32>, [usize; 3], crate::Precision),
}

/// Replaces every float parameter by what `values` says for its path.
///
/// # Errors
/// The first of `values`.
///
/// # Panics
/// When a shape does not fit: the format table would be wrong, not the file.
pub(crate) fn replace<M: Module, E>(module: M, values: impl FnMut(&str) -> Result<Loaded, E>) -> Result<M, E> {
    let mut writer = Writer { path: Vec::new(), values, error: None };
    let module = module.map(&mut writer);
    writer.error.map_or(Ok(module), Err)
}

struct Reader {
    path: Vec<String>,
    sources: BTreeMap<String, Source>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // What a record would hold: of a packed weight, the weight and not what stands in its place.
        let param = param.clone();
        let values = move || param.transform_for_save().val().detach().try_into_vec_as::<f32>().expect("read as f32");
        self.sources.insert(self.path.join("."), Source(Box::new(values)));
    }
}

struct Writer<F, E> {
    path: Vec<String>,
    values: F,
    error: Option<E>,
}

impl<F: FnMut(&str) -> Result<Loaded, E>, E> ModuleMapper for Writer<F, E> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        match (self.values)(&self.path.join(".")) {
            Ok(Loaded::Plain(values)) => {
                let shape = param.lazy_shape();
                replaced(param, TensorData::new(values, shape))
            }
            #[cfg(feature = "flex")]
            Ok(Loaded::Packed(values, dims, precision)) => crate::layer::packed::with_packed(param, &values, dims, precision),
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}
