//! Handing out seats where the scores are.

use burn_cubecl::{ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::{calculate_cube_count_elemwise, prelude::*};

use super::launch::{Elementwise, elem_pair};
use crate::ops::SeatRules;

/// Units that count together.
const UNITS: usize = 256;
/// log₂ of that.
const STEPS: usize = 8;

/// All bits of the exponent: set in what is not finite. A comparison would not do, as a compiler may take every number for finite.
const EXPONENT: u32 = 0x7f80_0000;

/// The `top_k` experts of each token by descending score, ties to the lower one; −1 for a token that may not ask.
#[cube(launch)]
fn choose_kernel<F: Float, I: Int>(
    scores: &Tensor<F>,
    bias: &Tensor<F>,
    valid: &Tensor<I>,
    chosen: &mut Tensor<I>,
    choice_slot: &mut Tensor<I>,
    num_experts: usize,
    num_tokens: usize,
    #[comptime] top_k: usize,
    #[comptime] has_bias: bool,
    #[comptime] has_valid: bool,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    if ABSOLUTE_POS >= num_tokens {
        terminate!();
    }
    let token = ABSOLUTE_POS;
    let mut asks = true;
    if has_valid {
        asks = i32::cast_from(valid[token]) != 0;
    }
    for e in 0..num_experts {
        let bits = u32::reinterpret(f32::cast_from(scores[token * num_experts + e]));
        if bits & EXPONENT == EXPONENT {
            asks = false;
        }
    }
    let none = i32::new(-1);
    let mut last_score = 0.0f32;
    let mut last_expert = i32::new(-1);
    #[unroll]
    for k in 0..top_k {
        let mut best_score = 0.0f32;
        let mut best_expert = i32::new(-1);
        for e in 0..num_experts {
            let mut score = f32::cast_from(scores[token * num_experts + e]);
            if has_bias {
                score += f32::cast_from(bias[e]);
            }
            let expert = i32::cast_from(e);
            let is_left = last_expert < 0 || score < last_score || (score == last_score && expert > last_expert);
            if is_left && (best_expert < 0 || score > best_score) {
                best_score = score;
                best_expert = expert;
            }
        }
        last_score = best_score;
        last_expert = best_expert;
        if !asks {
            best_expert = none;
        }
        chosen[token * top_k + k] = I::cast_from(best_expert);
        choice_slot[token * top_k + k] = I::cast_from(i32::new(-1));
    }
}

/// The `index`-th choice of a group in the order in which slots are filled.
#[cube]
fn choice_at(index: usize, group: usize, group_size: usize, #[comptime] top_k: usize, #[comptime] token_major: bool) -> usize {
    let first = group * group_size * top_k;
    if token_major { first + index } else { first + index % group_size * top_k + index / group_size }
}

/// Whether a choice names this cube's expert, in this round: protected tokens have the first one for themselves.
#[cube]
fn counts<I: Int>(
    chosen: &Tensor<I>,
    protected: &Tensor<I>,
    choice: usize,
    expert: i32,
    #[comptime] top_k: usize,
    #[comptime] round: usize,
    #[comptime] rounds: usize,
) -> bool {
    let mut counts = i32::cast_from(chosen[choice]) == expert;
    if rounds == 2 {
        let is_protected = i32::cast_from(protected[choice / top_k]) != 0;
        if round == 0 {
            counts = counts && is_protected;
        } else {
            counts = counts && !is_protected;
        }
    }
    counts
}

/// A cube hands out the slots of one expert in one group. Its units count the choices in their stretches of the order, add up what is
/// before them, and go through their stretches again.
#[cube(launch)]
fn seat_kernel<I: Int>(
    chosen: &Tensor<I>,
    protected: &Tensor<I>,
    choice_slot: &mut Tensor<I>,
    slot_choice: &mut Tensor<I>,
    group_size: usize,
    slots: usize,
    groups: usize,
    total: usize,
    #[comptime] top_k: usize,
    #[comptime] token_major: bool,
    #[comptime] rounds: usize,
    #[define(I)] _dtype: ElemType,
) {
    let mut sums = Shared::<[u32]>::new_slice(2 * UNITS);
    // No early end: every unit must come to the barriers below.
    let cube = CUBE_POS.min(total - 1);
    let is_real = CUBE_POS < total;
    let expert = i32::cast_from(cube / groups);
    let group = cube % groups;
    let first_slot = cube * slots;
    let unit = UNIT_POS as usize;
    let choices = group_size * top_k;
    let stretch = choices.div_ceil(UNITS);
    let start = (unit * stretch).min(choices);
    let end = (start + stretch).min(choices);

    let mut seated = 0usize;
    #[unroll]
    for round in 0..rounds {
        let mut count = 0u32;
        for index in start..end {
            let choice = choice_at(index, group, group_size, top_k, token_major);
            if counts::<I>(chosen, protected, choice, expert, top_k, round, rounds) {
                count += 1u32;
            }
        }
        // Inclusive sums, in two halves of the memory by turns.
        sums[unit] = count;
        sync_cube();
        #[unroll]
        for step in 0..STEPS {
            let from = comptime!((step % 2) * UNITS);
            let to = comptime!(((step + 1) % 2) * UNITS);
            let distance = comptime!(1usize << step);
            let mut sum = sums[from + unit];
            if unit >= distance {
                sum += sums[from + unit - distance];
            }
            sums[to + unit] = sum;
            sync_cube();
        }
        // An even number of steps: the sums are where they began.
        let mut position = seated + usize::cast_from(sums[unit] - count);
        seated += usize::cast_from(sums[UNITS - 1]);
        for index in start..end {
            let choice = choice_at(index, group, group_size, top_k, token_major);
            if counts::<I>(chosen, protected, choice, expert, top_k, round, rounds) {
                if position < slots && is_real {
                    choice_slot[choice] = I::cast_from(first_slot + position);
                    slot_choice[first_slot + position] = I::cast_from(choice);
                }
                position += 1;
            }
        }
        sync_cube();
    }
    let mut empty = seated + unit;
    while empty < slots {
        if is_real {
            slot_choice[first_slot + empty] = I::cast_from(i32::new(-1));
        }
        empty += UNITS;
    }
}

/// See [`SeatOps`](crate::ops::extension::SeatOps).
pub(super) fn seat(
    scores: CubeTensor,
    bias: CubeTensor,
    valid: CubeTensor,
    protected: CubeTensor,
    rules: SeatRules,
    [has_bias, has_valid, has_protected]: [bool; 3],
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let [num_tokens, num_experts] = scores.meta.shape().dims();
    let groups = num_tokens / rules.group_size;
    let indices =
        |count: usize| empty_device_contiguous_dtype(valid.client.clone(), valid.device.clone(), [count].into(), valid.dtype);
    let (chosen, choice_slot) = (indices(num_tokens * rules.top_k), indices(num_tokens * rules.top_k));
    let slot_choice = indices(num_experts * groups * rules.slots);
    let dtypes = elem_pair(&scores, &valid);
    let grid = Elementwise::new(&chosen, num_tokens);
    choose_kernel::launch(
        &chosen.client,
        grid.count,
        grid.dim,
        scores.into_tensor_arg(),
        bias.into_tensor_arg(),
        valid.into_tensor_arg(),
        chosen.clone().into_tensor_arg(),
        choice_slot.clone().into_tensor_arg(),
        num_experts,
        num_tokens,
        rules.top_k,
        has_bias,
        has_valid,
        dtypes,
    );
    let total = num_experts * groups;
    let dim = CubeDim::new_1d(UNITS as u32);
    seat_kernel::launch(
        &chosen.client,
        calculate_cube_count_elemwise(&chosen.client, total * UNITS, dim),
        dim,
        chosen.clone().into_tensor_arg(),
        protected.into_tensor_arg(),
        choice_slot.clone().into_tensor_arg(),
        slot_choice.clone().into_tensor_arg(),
        rules.group_size,
        rules.slots,
        groups,
        total,
        rules.top_k,
        rules.token_major,
        if has_protected { 2 } else { 1 },
        dtypes[1],
    );
    (chosen, choice_slot, slot_choice)
}
