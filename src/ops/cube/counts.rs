//! From counts of choices to places: how many choices of an expert come before those of a block.

use burn_cubecl::{ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::prelude::*;

use super::launch::{Elementwise, elem};

/// Units that share the counts of an expert; a power of two.
const SUM_UNITS: usize = 256;

/// In place of each count, the sum of those before it, and in `requested [groups, E]` the sum of all; `offsets [E + 1]` are those of full slots. A unit
/// for each expert of each group.
#[cube(launch)]
fn sum_kernel<I: Int>(
    counts: &mut Tensor<I>,
    requested: &mut Tensor<I>,
    offsets: &mut Tensor<I>,
    num_experts: usize,
    counts_each: usize,
    slots_each: usize,
    total: usize,
    #[define(I)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= total {
        terminate!();
    }
    if ABSOLUTE_POS < num_experts {
        offsets[ABSOLUTE_POS] = I::cast_from(ABSOLUTE_POS * slots_each);
        if ABSOLUTE_POS == num_experts - 1 {
            offsets[num_experts] = I::cast_from(num_experts * slots_each);
        }
    }
    let first = ABSOLUTE_POS / num_experts * counts_each * num_experts + ABSOLUTE_POS % num_experts;
    let mut sum = i32::new(0);
    for i in 0..counts_each {
        let at = first + i * num_experts;
        let count = i32::cast_from(counts[at]);
        counts[at] = I::cast_from(sum);
        sum += count;
    }
    requested[ABSOLUTE_POS] = I::cast_from(sum);
}

/// Without a limit on slots: in place of each of the `num_counts` counts of an expert, the row of the first choice that it counts, and where each
/// expert's rows begin, `offsets [E + 1]`. One cube, whose units share the counts of an expert.
#[cube(launch)]
fn first_rows_kernel<I: Int>(
    counts: &mut Tensor<I>,
    offsets: &mut Tensor<I>,
    num_experts: usize,
    num_counts: usize,
    #[define(I)] _dtype: ElemType,
) {
    let mut sums = Shared::<[u32]>::new_slice(SUM_UNITS);
    let unit = UNIT_POS as usize;
    let each = num_counts.div_ceil(SUM_UNITS);
    let first = (unit * each).min(num_counts);
    let end = (first + each).min(num_counts);
    let mut expert_row = 0u32;
    for e in 0..num_experts {
        let mut own = 0u32;
        for i in first..end {
            own += u32::cast_from(counts[i * num_experts + e]);
        }
        sums[unit] = own;
        sync_cube();
        // After each step, a unit has the sum of itself and those before it over twice as many.
        #[unroll]
        for step in 0..comptime!(SUM_UNITS.ilog2() as usize) {
            let distance = comptime!(1 << step);
            let mut before = 0u32;
            if unit >= distance {
                before = sums[unit - distance];
            }
            sync_cube();
            sums[unit] += before;
            sync_cube();
        }
        let mut row = expert_row + sums[unit] - own;
        for i in first..end {
            let count = u32::cast_from(counts[i * num_experts + e]);
            counts[i * num_experts + e] = I::cast_from(row);
            row += count;
        }
        if unit == 0 {
            offsets[e] = I::cast_from(expert_row);
        }
        expert_row += sums[SUM_UNITS - 1];
        sync_cube();
    }
    if unit == 0 {
        offsets[num_experts] = I::cast_from(expert_row);
    }
}

/// Within each group: `counts [groups, counts, E]` are replaced, `offsets [E + 1]` are those of experts of `slots_each` slots; what was requested,
/// `[groups, E]`.
pub(super) fn slots_before(counts: &CubeTensor, offsets: &CubeTensor, groups: usize, slots_each: usize) -> CubeTensor {
    let num_experts = offsets.meta.num_elements() - 1;
    let total = groups * num_experts;
    let requested = empty_device_contiguous_dtype(counts.client.clone(), counts.device.clone(), [total].into(), counts.dtype);
    let grid = Elementwise::new(&requested, total);
    sum_kernel::launch(
        &counts.client,
        grid.count,
        grid.dim,
        counts.clone().into_tensor_arg(),
        requested.clone().into_tensor_arg(),
        offsets.clone().into_tensor_arg(),
        num_experts,
        counts.meta.num_elements() / total,
        slots_each,
        grid.total,
        elem(counts),
    );
    requested
}

/// Without a limit: `counts [counts, E]` are replaced by rows, and `offsets [E + 1]` written; they come back.
pub(super) fn rows_before(counts: &CubeTensor, offsets: &CubeTensor) -> CubeTensor {
    let num_experts = offsets.meta.num_elements() - 1;
    first_rows_kernel::launch(
        &counts.client,
        CubeCount::new_single(),
        CubeDim::new_1d(SUM_UNITS as u32),
        counts.clone().into_tensor_arg(),
        offsets.clone().into_tensor_arg(),
        num_experts,
        counts.meta.num_elements() / num_experts,
        elem(counts),
    );
    offsets.clone()
}
