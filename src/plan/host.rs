//! Seats as the host sees them.

use burn::tensor::{Int, Tensor};

use crate::ops::{DeviceSeats, LOST};

/// Marks a choice without a row and a slot without a token.
pub(super) const NONE: i32 = -1;

/// The seats as the host sees them.
#[derive(Debug, Clone)]
pub(super) struct HostSeats {
    pub(super) asked: Vec<usize>,
    pub(super) asked_per_choice: Vec<usize>,
    pub(super) kept_per_choice: Vec<usize>,
    pub(super) offsets: Vec<usize>,
    pub(super) row_token: Vec<i32>,
    pub(super) choice_row: Vec<i32>,
    pub(super) unroutable: Vec<usize>,
}

/// What an assignment decides about one choice, in the order token by token, choice by choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Seat {
    /// The token asks for nothing (padding).
    Unasked,
    /// Asked, but every slot of the expert was taken.
    Dropped { expert: usize },
    /// Asked, and seated in the expert's `position`-th slot.
    Kept { expert: usize, position: usize },
}

impl HostSeats {
    /// From one seat per choice, token-major.
    pub(super) fn new(num_experts: usize, num_choices: usize, seats: &[Seat], unroutable: Vec<usize>) -> Self {
        let mut asked = vec![0; num_experts];
        let mut kept = vec![0; num_experts];
        let (mut asked_per_choice, mut kept_per_choice) = (vec![0; num_choices], vec![0; num_choices]);
        for (choice, seat) in seats.iter().enumerate() {
            let (Seat::Dropped { expert } | Seat::Kept { expert, .. }) = *seat else { continue };
            asked[expert] += 1;
            asked_per_choice[choice % num_choices] += 1;
            if matches!(seat, Seat::Kept { .. }) {
                kept[expert] += 1;
                kept_per_choice[choice % num_choices] += 1;
            }
        }
        let mut offsets = Vec::with_capacity(num_experts + 1);
        offsets.push(0);
        for load in &kept {
            offsets.push(offsets.last().unwrap() + load);
        }
        let mut row_token = vec![NONE; offsets[num_experts]];
        let choice_row = seats
            .iter()
            .enumerate()
            .map(|(choice, seat)| match *seat {
                Seat::Kept { expert, position } => {
                    let row = offsets[expert] + position;
                    row_token[row] = (choice / num_choices) as i32;
                    row as i32
                }
                _ => NONE,
            })
            .collect();
        debug_assert!(row_token.iter().all(|&token| token != NONE), "every row has a token");
        Self { asked, asked_per_choice, kept_per_choice, offsets, row_token, choice_row, unroutable }
    }
}

/// One seat per choice, and the tokens that could not ask. Slots of an expert count all groups; rows have no gaps, so a row's position is its
/// rank among those taken.
pub(super) fn read_seats(seats: &DeviceSeats, num_choices: usize) -> (Vec<Seat>, Vec<usize>) {
    let read = |x: &Tensor<1, Int>| x.clone().try_into_vec_as::<i32>().expect("indices are integers");
    let (chosen, choice_slot, slot_choice) = (read(&seats.chosen), read(&seats.choice_slot), read(&seats.slot_choice));
    let mut position_of_slot = vec![0; slot_choice.len()];
    for (slots, positions) in slot_choice.chunks(seats.slots.max(1)).zip(position_of_slot.chunks_mut(seats.slots.max(1))) {
        let mut taken = 0;
        for (choice, position) in slots.iter().zip(positions) {
            *position = taken;
            taken += usize::from(*choice != NONE);
        }
    }
    let seat = |(&chosen, &slot): (&i32, &i32)| match (usize::try_from(chosen), usize::try_from(slot)) {
        (Err(_), _) => Seat::Unasked,
        (Ok(expert), Err(_)) => Seat::Dropped { expert },
        (Ok(expert), Ok(slot)) => Seat::Kept { expert, position: position_of_slot[slot] },
    };
    let unroutable = chosen.chunks(num_choices).enumerate().filter(|(_, choices)| choices[0] == LOST).map(|(token, _)| token);
    (chosen.iter().zip(&choice_slot).map(seat).collect(), unroutable.collect())
}
