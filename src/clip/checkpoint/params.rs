//! A module's parameters by path, as plain numbers.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, TensorData};

use super::layout::Array;
use crate::param::with_value;

/// Every float parameter by its path (`vision.encoder.blocks.0.attention.query.weight`).
pub(super) fn read<M: Module>(module: &M) -> BTreeMap<String, Array> {
    let mut reader = Reader { path: Vec::new(), arrays: BTreeMap::new() };
    module.visit(&mut reader);
    reader.arrays
}

/// Replaces every float parameter by the array of its path.
///
/// # Panics
/// When a path or a shape does not fit: the layout table would be wrong, not the file.
pub(super) fn write<M: Module>(module: M, arrays: BTreeMap<String, Array>) -> M {
    let mut writer = Writer { path: Vec::new(), arrays };
    let module = module.map(&mut writer);
    assert!(writer.arrays.is_empty(), "no parameter for {:?}", writer.arrays.keys());
    module
}

struct Reader {
    path: Vec<String>,
    arrays: BTreeMap<String, Array>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val().detach();
        let shape = value.dims().to_vec();
        let values = value.try_into_vec_as::<f32>().expect("read as f32");
        self.arrays.insert(self.path.join("."), Array { shape, values });
    }
}

struct Writer {
    path: Vec<String>,
    arrays: BTreeMap<String, Array>,
}

impl ModuleMapper for Writer {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        let array = self.arrays.remove(&path).unwrap_or_else(|| panic!("no array for the parameter `{path}`"));
        with_value(param, |old| {
            assert!(old.dims()[..] == array.shape[..], "`{path}` is {:?}, its array {:?}", old.dims(), array.shape);
            Tensor::from_data(TensorData::new(array.values, array.shape), &old.device())
        })
    }
}
