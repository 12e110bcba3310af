//! The assignment as the host reads it.

use crate::ops::{DeviceSlots, NON_FINITE, ints};

/// Marks a choice without a row and a slot without a token.
pub(super) const NONE: i32 = -1;

/// The assignment as the host reads it.
#[derive(Debug, Clone)]
pub(super) struct HostSlots {
    pub(super) requested: Vec<usize>,
    pub(super) requested_per_choice: Vec<usize>,
    pub(super) kept_per_choice: Vec<usize>,
    pub(super) offsets: Vec<usize>,
    pub(super) row_token: Vec<i32>,
    pub(super) choice_row: Vec<i32>,
    pub(super) non_finite_tokens: Vec<usize>,
}

/// What an assignment decides about one choice, in the order token by token, choice by choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum ChoiceOutcome {
    /// The token requests no expert (padding).
    NotRequested,
    /// Requested, but every slot of the expert was taken.
    Dropped { expert: usize },
    /// Requested, and in the expert's `position`-th slot.
    Kept { expert: usize, position: usize },
}

impl HostSlots {
    /// From what became of each choice, token-major.
    pub(super) fn new(num_experts: usize, num_choices: usize, outcomes: &[ChoiceOutcome], non_finite_tokens: Vec<usize>) -> Self {
        let mut requested = vec![0; num_experts];
        let mut kept = vec![0; num_experts];
        let (mut requested_per_choice, mut kept_per_choice) = (vec![0; num_choices], vec![0; num_choices]);
        for (choice, outcome) in outcomes.iter().enumerate() {
            let (ChoiceOutcome::Dropped { expert } | ChoiceOutcome::Kept { expert, .. }) = *outcome else { continue };
            requested[expert] += 1;
            requested_per_choice[choice % num_choices] += 1;
            if matches!(outcome, ChoiceOutcome::Kept { .. }) {
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
        let choice_row = outcomes
            .iter()
            .enumerate()
            .map(|(choice, outcome)| match *outcome {
                ChoiceOutcome::Kept { expert, position } => {
                    let row = offsets[expert] + position;
                    row_token[row] = (choice / num_choices) as i32;
                    row as i32
                }
                _ => NONE,
            })
            .collect();
        debug_assert!(row_token.iter().all(|&token| token != NONE), "every row has a token");
        Self { requested, requested_per_choice, kept_per_choice, offsets, row_token, choice_row, non_finite_tokens }
    }
}

/// What became of each choice, and the tokens whose scores are not finite. Slots of an expert count all groups; rows have no gaps, so a
/// row's position is its rank among those taken.
pub(super) async fn read_slots(slots: &DeviceSlots, num_choices: usize) -> (Vec<ChoiceOutcome>, Vec<usize>) {
    let index = &slots.index;
    let (chosen, choice_row) = (ints(&slots.chosen).await, ints(&index.choice_row).await);
    let row_choice = ints(&index.row_choice).await;
    index.offsets.read_async().await;
    let mut position_of_row = vec![0; row_choice.len()];
    for rows in index.offsets.host().windows(2) {
        let mut taken = 0;
        for row in rows[0]..rows[1] {
            position_of_row[row] = taken;
            taken += usize::from(row_choice[row] != NONE);
        }
    }
    let outcome = |(&chosen, &row): (&i32, &i32)| match (usize::try_from(chosen), usize::try_from(row)) {
        (Err(_), _) => ChoiceOutcome::NotRequested,
        (Ok(expert), Err(_)) => ChoiceOutcome::Dropped { expert },
        (Ok(expert), Ok(row)) => ChoiceOutcome::Kept { expert, position: position_of_row[row] },
    };
    let non_finite_tokens =
        chosen.chunks(num_choices).enumerate().filter(|(_, choices)| choices[0] == NON_FINITE).map(|(token, _)| token);
    (chosen.iter().zip(&choice_row).map(outcome).collect(), non_finite_tokens.collect())
}
