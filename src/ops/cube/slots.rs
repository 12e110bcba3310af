//! Assigning slots on the device that holds the scores.
//!
//! Tokens are handled in blocks of a group, a cube each. First every block chooses and counts the choices of each expert; then the counts of
//! the blocks before are added up; then every choice finds its place among those of its block that come before it. No atomics.

use burn_cubecl::{ops::numeric::empty_device_contiguous_dtype, tensor::CubeTensor};
use cubecl::prelude::*;

use super::{
    counts,
    launch::{cubes, elem_pair},
    router::is_finite,
};
use crate::ops::{NON_FINITE, SlotRules};

/// The most choices of a block, which its cube holds in shared memory: those of 256 tokens with 8 choices each.
const MAX_CHOICES: usize = 2048;
/// The most tokens of a block.
const MAX_BLOCK: usize = 256;

/// What decides the order in which slots are filled: by round (protected tokens first, where there are any), by class (the first choices of
/// all tokens, then the second; or one class for all), by block, by token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Order {
    top_k: usize,
    token_major: bool,
    rounds: usize,
    /// Tokens of a block, one for each unit.
    block: usize,
}

impl Order {
    fn classes(&self) -> usize {
        if self.token_major { 1 } else { self.top_k }
    }
}

/// Which tokens a cube has.
#[derive(CubeType)]
struct Block {
    group: usize,
    /// In its group.
    index: usize,
    /// The token of this unit; some other one unless `is_token`.
    token: usize,
    is_token: bool,
}

#[cube]
fn this_block(group_size: usize, blocks: usize, num_tokens: usize, #[comptime] order: Order) -> Block {
    let group = CUBE_POS / blocks;
    let index = CUBE_POS % blocks;
    let place = index * order.block + UNIT_POS as usize;
    let token = group * group_size + place;
    Block { group, index, token: token.min(num_tokens - 1), is_token: place < group_size && token < num_tokens }
}

/// How many choices of this class a token of the block has for this expert, in this round.
#[cube]
fn requests(
    choices: &Shared<[i32]>,
    rounds: &Shared<[u32]>,
    unit: usize,
    expert: i32,
    round: u32,
    #[comptime] class: usize,
    #[comptime] order: Order,
) -> u32 {
    let mut count = 0u32;
    #[unroll]
    for k in 0..order.top_k {
        let is_of_class = comptime!(order.token_major || k == class);
        if is_of_class && choices[k * order.block + unit] == expert {
            count += 1u32;
        }
    }
    if order.rounds == 2 && rounds[unit] != round {
        count = 0u32;
    }
    count
}

/// The round in which a token gets its slots.
#[cube]
fn round_of<I: Int>(states: &Tensor<I>, block: &Block, #[comptime] order: Order) -> u32 {
    let mut round = 0u32;
    if order.rounds == 2 {
        round = u32::cast_from(i32::cast_from(states[block.token]) != 2);
    }
    round
}

/// The `top_k` experts of each token by descending score, ties to the lower one, −1 for padding and `NON_FINITE` for other tokens whose scores are
/// not finite: `chosen [T, K]`; and how many choices each block has for each expert: `counts [groups, rounds, classes, blocks, E]`.
#[cube(launch)]
fn choose_kernel<F: Float, I: Int>(
    scores: &Tensor<F>,
    states: &Tensor<I>,
    chosen: &mut Tensor<I>,
    counts: &mut Tensor<I>,
    num_experts: usize,
    group_size: usize,
    blocks: usize,
    num_tokens: usize,
    #[comptime] order: Order,
    #[define(F, I)] _dtypes: [ElemType; 2],
) {
    let mut choices = Shared::<[i32]>::new_slice(order.top_k * order.block);
    let mut rounds = Shared::<[u32]>::new_slice(order.block);
    let unit = UNIT_POS as usize;
    let block = this_block(group_size, blocks, num_tokens, order);
    let first = block.token * num_experts;
    // What stands in place of all choices, if not 0.
    let mut instead = i32::new(0);
    for e in 0..num_experts {
        if !is_finite(f32::cast_from(scores[first + e])) {
            instead = i32::new(comptime!(NON_FINITE as i64));
        }
    }
    if !block.is_token || i32::cast_from(states[block.token]) == 0 {
        instead = i32::new(-1);
    }
    let mut last_score = 0.0f32;
    let mut last_expert = i32::new(-1);
    #[unroll]
    for k in 0..order.top_k {
        let mut best_score = 0.0f32;
        let mut best_expert = i32::new(-1);
        for e in 0..num_experts {
            let score = f32::cast_from(scores[first + e]);
            let expert = i32::cast_from(e);
            let is_left = last_expert < 0 || score < last_score || (score == last_score && expert > last_expert);
            if is_left && (best_expert < 0 || score > best_score) {
                best_score = score;
                best_expert = expert;
            }
        }
        last_score = best_score;
        last_expert = best_expert;
        if instead < 0 {
            best_expert = instead;
        }
        choices[k * order.block + unit] = best_expert;
        if block.is_token {
            chosen[block.token * order.top_k + k] = I::cast_from(best_expert);
        }
    }
    rounds[unit] = round_of::<I>(states, &block, order);
    sync_cube();

    let classes = comptime!(order.classes());
    for round in 0..order.rounds as u32 {
        #[unroll]
        for class in 0..classes {
            let row = (block.group * order.rounds + round as usize) * classes + class;
            let at = (row * blocks + block.index) * num_experts;
            let mut e = unit;
            while e < num_experts {
                let expert = i32::cast_from(e);
                let mut count = 0u32;
                for other in 0..order.block {
                    count += requests(&choices, &rounds, other, expert, round, class, order);
                }
                if block.group * group_size < num_tokens {
                    counts[at + e] = I::cast_from(count);
                }
                e += order.block;
            }
        }
    }
}

/// `choice_row [T, K]` and `row_choice`, −1 where there is none; `NON_FINITE` stays. With a limit there is a row for each slot,
/// `[E, groups, slots]`, and `before` counts within an expert of a group; without, rows have no gaps and `before` is one. `ends` is what was
/// `requested [groups, E]`, or the experts' `offsets [E + 1]`.
#[cube(launch)]
fn slot_kernel<I: Int>(
    chosen: &Tensor<I>,
    states: &Tensor<I>,
    before: &Tensor<I>,
    ends: &Tensor<I>,
    choice_row: &mut Tensor<I>,
    row_choice: &mut Tensor<I>,
    num_experts: usize,
    group_size: usize,
    blocks: usize,
    slots: usize,
    num_tokens: usize,
    #[comptime] has_limit: bool,
    #[comptime] order: Order,
    #[define(I)] _dtype: ElemType,
) {
    let mut choices = Shared::<[i32]>::new_slice(order.top_k * order.block);
    let mut rounds = Shared::<[u32]>::new_slice(order.block);
    let unit = UNIT_POS as usize;
    let block = this_block(group_size, blocks, num_tokens, order);
    let groups = num_tokens / group_size;
    #[unroll]
    for k in 0..order.top_k {
        let mut choice = i32::new(-1);
        if block.is_token {
            choice = i32::cast_from(chosen[block.token * order.top_k + k]);
        }
        choices[k * order.block + unit] = choice;
    }
    let round = round_of::<I>(states, &block, order);
    rounds[unit] = round;
    sync_cube();

    let classes = comptime!(order.classes());
    if block.is_token {
        #[unroll]
        for k in 0..order.top_k {
            let class = comptime!(if order.token_major { 0 } else { k });
            let expert = choices[k * order.block + unit];
            let choice = block.token * order.top_k + k;
            let mut row_of_choice = expert;
            if expert >= 0 {
                row_of_choice = i32::new(-1);
                let e = usize::cast_from(expert);
                let row = (block.group * order.rounds + round as usize) * classes + class;
                let mut position = usize::cast_from(before[(row * blocks + block.index) * num_experts + e]);
                for other in 0..unit {
                    position += requests(&choices, &rounds, other, expert, round, class, order) as usize;
                }
                if !has_limit || position < slots {
                    if has_limit {
                        position += (e * groups + block.group) * slots;
                    }
                    row_of_choice = i32::cast_from(position);
                    row_choice[position] = I::cast_from(choice);
                }
            }
            choice_row[choice] = I::cast_from(row_of_choice);
            // As many rows as choices: those behind the last expert's are empty.
            if !has_limit && choice >= usize::cast_from(ends[num_experts]) {
                row_choice[choice] = I::cast_from(i32::new(-1));
            }
        }
    }
    // The blocks of a group share the work of marking what stays empty.
    if has_limit && block.group < groups {
        let mut at = block.index * order.block + unit;
        while at < num_experts * slots {
            let e = at / slots;
            let position = at % slots;
            if position >= usize::cast_from(ends[block.group * num_experts + e]) {
                row_choice[(e * groups + block.group) * slots + position] = I::cast_from(i32::new(-1));
            }
            at += blocks * order.block;
        }
    }
}

/// See [`SlotOps`](crate::ops::extension::SlotOps).
pub(super) fn assign(scores: CubeTensor, states: CubeTensor, rules: SlotRules) -> (CubeTensor, CubeTensor, CubeTensor, CubeTensor) {
    let [num_tokens, num_experts] = scores.meta.shape().dims();
    let SlotRules { top_k, group_size, slots, token_major, protects } = rules;
    let groups = num_tokens / group_size;
    let order = Order {
        top_k,
        token_major,
        rounds: if protects { 2 } else { 1 },
        block: group_size.next_power_of_two().clamp(32, MAX_BLOCK.min((MAX_CHOICES / top_k).next_power_of_two())),
    };
    let blocks = group_size.div_ceil(order.block);
    let counts_each = order.rounds * order.classes() * blocks;
    let indices =
        |count: usize| empty_device_contiguous_dtype(states.client.clone(), states.device.clone(), [count].into(), states.dtype);
    let (chosen, choice_row) = (indices(num_tokens * top_k), indices(num_tokens * top_k));
    let (row_choice, offsets) = (indices(rules.num_rows(num_tokens, num_experts)), indices(num_experts + 1));
    let counts = indices(groups * counts_each * num_experts);
    let dtypes = elem_pair(&scores, &states);
    let dim = CubeDim::new_1d(order.block as u32);
    let client = chosen.client.clone();
    let count = || cubes(&chosen, groups * blocks, dim);
    choose_kernel::launch(
        &client,
        count(),
        dim,
        scores.into_tensor_arg(),
        states.clone().into_tensor_arg(),
        chosen.clone().into_tensor_arg(),
        counts.clone().into_tensor_arg(),
        num_experts,
        group_size,
        blocks,
        num_tokens,
        order,
        dtypes,
    );
    let ends = match slots {
        Some(slots) => counts::slots_before(&counts, &offsets, groups, groups * slots),
        None => counts::rows_before(&counts, &offsets),
    };
    slot_kernel::launch(
        &client,
        count(),
        dim,
        chosen.clone().into_tensor_arg(),
        states.into_tensor_arg(),
        counts.into_tensor_arg(),
        ends.into_tensor_arg(),
        choice_row.clone().into_tensor_arg(),
        row_choice.clone().into_tensor_arg(),
        num_experts,
        group_size,
        blocks,
        slots.unwrap_or(0),
        num_tokens,
        slots.is_some(),
        order,
        dtypes[1],
    );
    (chosen, choice_row, row_choice, offsets)
}
