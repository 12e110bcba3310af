//! What every launch needs: an output, a grid, and how wide a unit may read.

use burn::backend::cubecl::dtype_to_storage_type;
use burn_cubecl::{ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, ir::ElemType, prelude::*};

/// A new tensor, not written yet, with the numbers and on the device of `like`.
pub(super) fn empty<const R: usize>(like: &CubeTensor, shape: [usize; R]) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape.into(), like.dtype)
}

pub(super) fn elem(x: &CubeTensor) -> ElemType {
    dtype_to_storage_type(x.dtype)
}

/// Of values and of indices.
pub(super) fn elem_pair(x: &CubeTensor, index: &CubeTensor) -> [ElemType; 2] {
    [elem(x), elem(index)]
}

/// The most values that a unit can read at once from rows of this width.
pub(super) fn vector_size(x: &CubeTensor, width: usize) -> usize {
    let sizes = x.client.io_optimized_vector_sizes(x.dtype.size());
    sizes.into_iter().filter(|size| width.is_multiple_of(*size)).max().unwrap_or(1)
}

/// A unit for each of `total` vectors.
pub(super) struct Elementwise {
    pub(super) count: CubeCount,
    pub(super) dim: CubeDim,
    pub(super) total: usize,
}

impl Elementwise {
    pub(super) fn new(x: &CubeTensor, total: usize) -> Self {
        let dim = CubeDim::new(&x.client, total);
        Self { count: calculate_cube_count_elemwise(&x.client, total, dim), dim, total }
    }
}

/// At least `total` cubes of these many units: more than fit on one axis are spread over several.
pub(super) fn cubes(x: &CubeTensor, total: usize, dim: CubeDim) -> CubeCount {
    calculate_cube_count_elemwise(&x.client, total * dim.num_elems() as usize, dim)
}
