//! The optimiser state of a dense model, for the sparse model made from it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::tensor::{Bytes, Tensor, TensorData};
use burn_pack::{Reader, Tensor as Entry, Writer};

use super::UpcycleError;
use crate::transformer::{Encoder, FeedForward, TransformerBlock};

/// A model made of this crate's transformer blocks.
pub trait HasBlocks {
    /// All blocks, in the same order for a dense model and the sparse one that is made from it.
    fn blocks(&self) -> Vec<&TransformerBlock>;
}

impl HasBlocks for TransformerBlock {
    fn blocks(&self) -> Vec<&TransformerBlock> {
        vec![self]
    }
}

impl HasBlocks for Encoder {
    fn blocks(&self) -> Vec<&TransformerBlock> {
        self.blocks.iter().collect()
    }
}

#[cfg(feature = "clip")]
impl HasBlocks for crate::clip::Clip {
    fn blocks(&self) -> Vec<&TransformerBlock> {
        self.vision.encoder.blocks.iter().chain(&self.text.encoder.blocks).collect()
    }
}

/// The state (moments and step counts) that `trained` holds for the parameters of `dense`, for the parameters of `sparse`: a parameter that
/// both have keeps its state, each expert gets that of the dense network, and routers start anew. A new optimiser has no moments, so its first
/// steps would be large.
///
/// For experts as wide as the dense network. Load it into a new optimiser of the same
/// kind: `config.init().load_record(record)`.
///
/// # Errors
/// When experts are not as wide as the dense network, or `trained` holds nothing of the parameters of `dense`: it must be the model that was
/// trained, not one read from its checkpoint, whose parameters are new ones.
pub fn upcycle_optimizer<M: Module + HasBlocks>(
    trained: &ModuleOptimizer,
    dense: &M,
    sparse: &M,
) -> Result<OptimizerRecord, UpcycleError> {
    let broken =
        |error: &dyn std::fmt::Display| UpcycleError::OptimizerState { parameter: String::new(), reason: error.to_string() };
    let state = Reader::from_bytes(trained.into_bytes().map_err(|e| broken(&e))?).map_err(|e| broken(&e))?;
    let scalars = state.scalars().clone();
    let mut of_dense: BTreeMap<u64, Vec<(String, TensorData)>> = BTreeMap::new();
    for tensor in state.into_tensors().map_err(|e| broken(&e))? {
        let (name, dtype, shape, id, bytes) = tensor.into_parts().map_err(|e| broken(&e))?;
        let id = id.expect("an optimiser's tensors name their parameter");
        of_dense.entry(id).or_default().push((field_of(&name), TensorData::from_bytes(bytes, shape, dtype)));
    }

    let source_of_experts = sources_of_experts(dense, sparse);
    let dense: BTreeMap<String, Parameter> = parameters(dense);
    let mut entries = Vec::new();
    let mut writer_scalars = Vec::new();
    let mut paths = Vec::new();
    for (path, target) in parameters(sparse) {
        let of_experts = source_of_experts.get(&target.id);
        let Some(source) = of_experts.copied().or_else(|| dense.get(&path).map(|source| source.id)) else { continue };
        let Some(fields) = of_dense.get(&source) else { continue };
        for (field, data) in fields {
            let (mut bytes, mut shape) = (data.as_bytes().to_vec(), data.shape().to_vec());
            if of_experts.is_some() {
                if shape != target.shape[1..] {
                    let reason = format!("`{field}` has the shape {shape:?}, but {:?} is needed", &target.shape[1..]);
                    return Err(UpcycleError::OptimizerState { parameter: path, reason });
                }
                bytes = bytes.repeat(target.shape[0]);
                shape = target.shape.clone();
            }
            let name = format!("{}.{field}", target.id);
            entries.push(Entry::new(name, data.dtype(), shape, Some(target.id), Bytes::from_bytes_vec(bytes)));
        }
        let prefix = format!("{source}.");
        for (name, value) in scalars.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(&prefix)) {
            let field = &name[prefix.len()..];
            // burn keeps the number of axes beside the state.
            let value = if field == "__rank" { burn_pack::Scalar::from(target.shape.len()) } else { *value };
            writer_scalars.push((format!("{}.{field}", target.id), value));
        }
        paths.push((target.id.to_string(), path));
    }
    if entries.is_empty() {
        return Err(UpcycleError::OptimizerState {
            parameter: String::new(),
            reason: "it holds nothing of the dense model's parameters; is this the model that was trained?".into(),
        });
    }
    let mut writer = Writer::new(entries);
    for (name, value) in writer_scalars {
        writer = writer.with_scalar(&name, value);
    }
    for (id, path) in paths {
        writer = writer.with_metadata(&id, &path);
    }
    OptimizerRecord::from_bytes(writer.into_bytes().map_err(|e| broken(&e))?).map_err(|e| broken(&e))
}

/// The parameter of the dense network that each parameter of the experts comes from.
fn sources_of_experts<M: HasBlocks>(dense: &M, sparse: &M) -> BTreeMap<u64, u64> {
    let mut sources = BTreeMap::new();
    for (dense, sparse) in dense.blocks().into_iter().zip(sparse.blocks()) {
        let FeedForward::Dense(mlp) = &dense.feed_forward else { continue };
        let experts = match &sparse.feed_forward {
            FeedForward::Dense(_) => continue,
            FeedForward::Moe(moe) => &moe.experts,
            FeedForward::SoftMoe(soft) => &soft.experts,
        };
        let gate = mlp.linear_gate.as_ref().zip(experts.w_gate.as_ref());
        let maps = [(&mlp.linear_in, &experts.w_in, &experts.b_in), (&mlp.linear_out, &experts.w_out, &experts.b_out)];
        for (linear, weight, bias) in maps.into_iter().chain(gate.map(|(linear, weight)| (linear, weight, &experts.b_gate))) {
            sources.insert(weight.id.val(), linear.weight.id.val());
            sources.extend(bias.as_ref().zip(linear.bias.as_ref()).map(|(bias, source)| (bias.id.val(), source.id.val())));
        }
    }
    sources
}

/// A state's name without its parameter.
fn field_of(name: &str) -> String {
    name.split_once('.').map_or(name, |(_, field)| field).to_string()
}

struct Parameter {
    id: u64,
    shape: Vec<usize>,
}

/// Every float parameter by its path.
fn parameters<M: Module>(module: &M) -> BTreeMap<String, Parameter> {
    struct Lister {
        path: Vec<String>,
        found: BTreeMap<String, Parameter>,
    }
    impl ModuleVisitor for Lister {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let parameter = Parameter { id: param.id.val(), shape: param.shape().to_vec() };
            self.found.insert(self.path.join("."), parameter);
        }
    }
    let mut lister = Lister { path: Vec::new(), found: BTreeMap::new() };
    module.visit(&mut lister);
    lister.found
}
