//! Weights packed for inference.

#[cfg(feature = "flex")]
use std::sync::Arc;

use burn::module::Param;
#[cfg(feature = "flex")]
use burn::module::{Module, ModuleMapper, Reparameterization, Reparameterizer};
use burn::nn::Linear;
use burn::tensor::Tensor;
#[cfg(feature = "flex")]
use burn::tensor::{DType, Device, Slice, TensorData};

use crate::ops::{self, Activation, Offsets};
#[cfg(feature = "flex")]
use crate::ops::{PackedMaps, Precision};

/// The module with the weights of experts, of [`Mlp`](crate::transformer::Mlp), of a [`TransformerBlock`](crate::transformer::TransformerBlock)'s attention
/// (and an image pooling's) and of the embedding of patches packed for inference on burn's CPU backend: in the order in which products read them, in `precision`. Other parameters, routers among them, stay as they
/// are.
///
/// Products are then faster, most of all where experts have few rows, and with less than 32 bits the weights need less memory. The plain weights are not kept:
/// where something else reads them (another backend, [`Kernels::Reference`](crate::kernels::Kernels::Reference), a record), they are unpacked for it.
/// Packed weights are not trained: gradients pass them and are not taken. burn's [`materialize`](burn::module::Module::materialize) makes them plain again, with
/// what rounding has done to them: call it before burn's `apply_lora` or `quantize_weights`, of which the first would have no effect on them. Adapters are merged
/// first.
///
/// `F32` computes the same to rounding; `F16` and `BF16` round the weights and compute in f32. With `Int8`, each row of activations is rounded to 8 bits as well
/// (to 7 on processors with AVX2 and without AVX-512 VNNI), with a scale of its own, and products are of integers; patches and their embedding stay in 32 bits then. In every precision, the result of a row does not depend on
/// the rows beside it.
///
/// An [`Encoder`](crate::transformer::Encoder) with packed weights computes its pass on one of rayon's threads, not on the calling one.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use burn_moe::{MoeFeedForwardConfig, Precision, pack_weights};
///
/// let device = Device::flex();
/// let layer = MoeFeedForwardConfig::new(64, 256, 8).init(&device);
/// let packed = pack_weights(layer.clone(), Precision::Int8);
/// let x = Tensor::<2>::random([10, 64], Distribution::Normal(0.0, 1.0), &device);
/// let (exact, rounded) = (layer.forward(x.clone()).output, packed.forward(x).output);
/// let error = (exact.clone() - rounded).powi_scalar(2).sum() / exact.powi_scalar(2).sum();
/// assert!(error.into_scalar::<f32>() < 1e-3);
/// ```
///
/// # Panics
/// When such a weight is on another backend, is not finite or beyond the precision, or has more than 65,536 rows with `Int8`.
#[cfg(feature = "flex")]
#[track_caller]
pub fn pack_weights<M: Module>(module: M, precision: Precision) -> M {
    module.materialize().map(&mut Pack { precision, inside: Vec::new() })
}

/// A weight that was packed by [`pack_weights`], attached to a parameter that has a placeholder in its place.
#[cfg(feature = "flex")]
#[derive(Module, Debug)]
pub struct PackedWeight {
    #[module(skip)]
    maps: Arc<PackedMaps>,
}

#[cfg(feature = "flex")]
impl PackedWeight {
    /// How its numbers are stored.
    pub fn precision(&self) -> Precision {
        self.maps.precision()
    }

    fn unpacked<const D: usize>(&self, dims: [usize; D], device: &Device) -> Tensor<D> {
        Tensor::from_data(TensorData::new(self.maps.unpacked(), dims), device)
    }
}

#[cfg(feature = "flex")]
impl Reparameterization for PackedWeight {
    const NAME: &'static str = "packed";

    /// The weight, unpacked; `base`, if it was loaded since.
    ///
    /// # Panics
    /// When burn quantized what stands in the weight's place.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        if is_placeholder(&base) { self.unpacked(base.dims(), &base.device()) } else { base }
    }
}

/// Not a number, and none that an operation makes: a model that has diverged is not taken for one without weights. Its highest bits alone
/// say so, which 16 bits keep, too.
#[cfg(feature = "flex")]
const PLACEHOLDER: f32 = f32::from_bits(0x7FEA_0000);

/// [`PLACEHOLDER`] in the shape of a weight, in the memory of one value.
#[cfg(feature = "flex")]
fn placeholder<const D: usize>(dims: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::<D>::from_data(TensorData::new(vec![PLACEHOLDER], [1; D]), device).expand(dims)
}

#[cfg(feature = "flex")]
fn is_placeholder<const D: usize>(base: &Tensor<D>) -> bool {
    assert!(
        !matches!(base.dtype(), DType::QFloat(_)),
        "burn's `quantize_weights` cannot quantize packed weights: make them plain first, by `materialize`"
    );
    let first = base.clone().slice(std::array::from_fn::<_, D, _>(|_| Slice::from(0..1)));
    first.into_data().iter::<f32>().next().is_some_and(|value| value.abs().to_bits() == PLACEHOLDER.to_bits())
}

/// A parameter with packed weights, `[E, D, F]` or of one map `[1, D, F]`.
#[cfg(feature = "flex")]
pub(crate) fn with_packed<const R: usize>(
    param: Param<Tensor<R>>,
    weights: &[f32],
    dims: [usize; 3],
    precision: Precision,
) -> Param<Tensor<R>> {
    struct Attach(Option<PackedWeight>);
    impl Reparameterizer for Attach {
        type Reparam = PackedWeight;

        fn reparameterize<const D: usize>(&mut self, _: &str, param: Param<Tensor<D>>) -> (Param<Tensor<D>>, Option<PackedWeight>) {
            (param, self.0.take())
        }
    }
    let (id, shape, device) = (param.id, param.lazy_shape().dims(), param.lazy_device());
    assert!(ops::is_flex(&device), "packed weights are for burn's CPU backend, `Device::flex()`, not for {device:?}");
    let packed = PackedWeight { maps: Arc::new(PackedMaps::new(weights, dims, precision)) };
    // Without the maps, once the weight is plain again.
    let saved = Arc::downgrade(&packed.maps);
    let param = param.transform_for_load(placeholder(shape, &device), id);
    // Records hold plain weights.
    let save = move |base| match saved.upgrade() {
        Some(maps) => PackedWeight { maps }.apply(base),
        None => base,
    };
    param.save_mapper(save).apply_reparameterization(Attach(Some(packed)))
}

/// Finds the weights that are packed by the modules that they are in.
#[cfg(feature = "flex")]
struct Pack {
    precision: Precision,
    /// The names of fields and the types that they belong to, from the outermost.
    inside: Vec<(String, String)>,
}

/// What the embedding of patches is packed in: not in 8 bits, which files do not store it in either.
#[cfg(feature = "flex")]
pub(crate) fn precision_of_patches(precision: Precision) -> Precision {
    if precision == Precision::Int8 { Precision::F32 } else { precision }
}

#[cfg(feature = "flex")]
impl Pack {
    /// In which precision a parameter is packed, if it is.
    fn packed_in(&self, rank: usize) -> Option<Precision> {
        let is_in = |name: &str| self.inside.iter().any(|(_, module)| module.strip_prefix("Struct:") == Some(name));
        let (field, module) = self.inside.last()?;
        match rank {
            3 => (is_in("ExpertMlp") && ["w_in", "w_gate", "w_out"].contains(&&**field)).then_some(self.precision),
            2 if field != "weight" || module != "Struct:Linear" => None,
            2 if ["Mlp", "TransformerBlock", "AttentionPooling"].into_iter().any(is_in) => Some(self.precision),
            2 => {
                let embeds_patches =
                    self.inside.iter().any(|(field, module)| field == "patch_embedding" && module == "Struct:VisionTower");
                embeds_patches.then(|| precision_of_patches(self.precision))
            }
            _ => None,
        }
    }
}

#[cfg(feature = "flex")]
impl ModuleMapper for Pack {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.inside.push((name.to_string(), container_type.to_string()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.inside.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(precision) = self.packed_in(D) else {
            // Drawn now if it is a random one, so that no pass waits while another draws it; see `run_pass`.
            let _ = param.val();
            return param;
        };
        let shape = param.lazy_shape();
        let dims = match D {
            2 => [1, shape[0], shape[1]],
            _ => [shape[0], shape[1], shape[2]],
        };
        let name = || self.inside.iter().map(|(field, _)| &**field).collect::<Vec<_>>().join(".");
        let values: Vec<f32> = param.val().detach().dequantize().try_into_vec_as().expect("weights are floats");
        let bad = values.iter().filter(|value| !precision.holds(**value)).count();
        assert!(
            bad == 0,
            "{bad} of {} values of the weight `{}` are not finite, or too large for {}",
            values.len(),
            name(),
            precision
        );
        with_packed(param, &values, dims, precision)
    }
}

/// `act(rows[r] · weight[e(r)] + bias[e(r)])` by packed weights, if they are packed and may be used.
#[cfg(feature = "flex")]
pub(crate) fn packed_product<const D: usize>(
    rows: &Tensor<2>,
    weight: &Param<Tensor<D>>,
    bias: &Option<Tensor<2>>,
    activation: Option<Activation>,
    offsets: &Offsets,
) -> Option<Tensor<2>> {
    let packed = weight.reparameterization::<PackedWeight>()?;
    if !ops::has_packed(&rows.device(), rows.dtype()) || !is_placeholder(&weight.base()) {
        return None;
    }
    Some(ops::packed_linear(rows.clone(), &packed.maps, bias.clone(), activation, offsets.host().clone()))
}

#[cfg(not(feature = "flex"))]
pub(crate) fn packed_product<const D: usize>(
    _: &Tensor<2>,
    _: &Param<Tensor<D>>,
    _: &Option<Tensor<2>>,
    _: Option<Activation>,
    _: &Offsets,
) -> Option<Tensor<2>> {
    None
}

/// Calls `f`, a pass through a model, on one of rayon's threads if this map of it is packed: a caller outside of the pool would sleep through every
/// product, and be woken up after it, a tenth of the time that a short text takes.
///
/// Such a thread may take up other work while it waits for the last piece of a product, another pass for example. So nothing in `f` may hold a lock
/// while a product is made, and what the calling thread chose goes with it.
pub(crate) fn run_pass<T: Send>(linear: Option<&Linear>, f: impl FnOnce() -> T + Send) -> T {
    #[cfg(feature = "flex")]
    if linear.is_some_and(|linear| linear.weight.reparameterization::<PackedWeight>().is_some()) && rayon::current_num_threads() > 1
    {
        let kernels = ops::chosen_kernels();
        return rayon::join(|| ops::with_kernels(kernels, f), || ()).0;
    }
    let _ = linear;
    f()
}

/// burn's linear map and an activation: `[R, D] -> [R, F]`.
pub(crate) fn linear(x: Tensor<2>, linear: &Linear, activation: Option<Activation>) -> Tensor<2> {
    let bias = linear.bias.as_ref().map(|bias| bias.val());
    #[cfg(feature = "flex")]
    if linear.weight.reparameterization::<PackedWeight>().is_some() {
        let offsets = Offsets::new([0, x.dims()[0]], &x.device());
        let bias = bias.clone().map(|bias| bias.dequantize().unsqueeze_dim(0));
        if let Some(out) = packed_product(&x, &linear.weight, &bias, activation, &offsets) {
            return out;
        }
    }
    ops::linear(x, linear.weight.val(), bias, activation)
}

/// Maps of the same rows, `[R, D] -> [R, F]` each; packed ones side by side, so that threads wait for each other once and not after each. Not with autodiff,
/// whose graph, and so the order in which gradients are added, would depend on the threads.
pub(crate) fn linear_each(x: &Tensor<2>, maps: [&Linear; 3]) -> [Tensor<2>; 3] {
    #[cfg(feature = "flex")]
    if maps[0].weight.reparameterization::<PackedWeight>().is_some()
        && !x.device().is_autodiff()
        && rayon::current_num_threads() > 1
    {
        let kernels = ops::chosen_kernels();
        let map = |map| ops::with_kernels(kernels, || linear(x.clone(), map, None));
        let [first, second, third] = maps;
        let (first, (second, third)) = rayon::join(|| map(first), || rayon::join(|| map(second), || map(third)));
        return [first, second, third];
    }
    maps.map(|map| linear(x.clone(), map, None))
}
