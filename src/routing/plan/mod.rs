//! The dispatch plan: the row and the gate of each choice.

mod host;

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData, read_sync};

use crate::ops::{DeviceSlots, Offsets, RowIndex, int_tensor};
pub(crate) use host::ChoiceOutcome;
use host::{HostSlots, NONE, read_slots};

/// Which expert computes which token, in which order and with which gate, as a value.
///
/// A *choice* is one (token, expert) pair; each token has `M` of them (`K` for token choice; `E` for expert choice, most of them not
/// requested). A choice that got a slot owns a *row*; rows are sorted by expert, and inside an expert in the order in which slots were
/// filled. Rows of expert `e` are `offsets[e]..offsets[e + 1]`, so nothing is padded. The inverse map, from choices to rows, makes combining
/// a gather.
///
/// Positions are data, not parameters: only [`gates`](Self::gates) carries a gradient. If a GPU assigned the slots (token choice), the host reads
/// them once, at the first call that needs them; in a browser, which cannot wait, such a call panics before [`read_async`](Self::read_async).
#[derive(Debug, Clone)]
pub struct DispatchPlan {
    num_tokens: usize,
    num_choices: usize,
    num_experts: usize,
    gates: Tensor<2>,
    slots: Slots,
}

/// Where the slots were assigned.
#[derive(Debug, Clone)]
enum Slots {
    Host(HostSlots),
    Device(Box<SlotsOnDevice>),
}

/// Slots that a device assigned.
#[derive(Debug, Clone)]
struct SlotsOnDevice {
    slots: DeviceSlots,
    /// What the host has read of them.
    host: Arc<OnceLock<HostSlots>>,
}

impl DispatchPlan {
    /// A plan from what became of each choice (`[T · M]`, token-major), the gates `[T, M]`, and the tokens whose scores are not finite.
    pub(crate) fn new(
        num_experts: usize,
        num_choices: usize,
        outcomes: &[ChoiceOutcome],
        gates: Tensor<2>,
        non_finite_tokens: Vec<usize>,
    ) -> Self {
        let num_tokens = outcomes.len().checked_div(num_choices).unwrap_or(0);
        let slots = Slots::Host(HostSlots::new(num_experts, num_choices, outcomes, non_finite_tokens));
        Self { num_tokens, num_choices, num_experts, gates, slots }
    }

    /// A plan from choices that were made elsewhere, for a router of your own: token `t` goes to the experts `experts[t, ..]` with the factors
    /// `gates[t, ..]`, and nothing is dropped. An expert of −1 is no choice, so that tokens may have different numbers of experts; its gate
    /// counts as 0. The rows of an expert are in the order of the tokens. Indices are read by the host; gates keep their gradient.
    ///
    /// # Shapes
    /// - experts, gates: `[T, M]`
    ///
    /// # Panics
    /// When the shapes differ, or an index is neither −1 nor below `num_experts`.
    #[track_caller]
    pub fn from_choices(num_experts: usize, experts: Tensor<2, Int>, gates: Tensor<2>) -> Self {
        let ([num_tokens, num_choices], device) = (gates.dims(), gates.device());
        let shape = experts.dims();
        assert!(shape == gates.dims(), "experts of shape {shape:?} do not fit gates of shape {:?}", gates.dims());
        if num_tokens == 0 {
            return Self::of_no_tokens(num_experts, num_choices, &device);
        }
        let indices: Vec<i32> = experts.try_into_vec_as().expect("indices are integers");
        let mut taken = vec![0; num_experts];
        let outcome = |&index: &i32| match usize::try_from(index) {
            Err(_) => {
                assert!(index == -1, "expert {index} of a choice is neither -1 nor below {num_experts}");
                ChoiceOutcome::NotRequested
            }
            Ok(expert) => {
                assert!(expert < num_experts, "expert {index} of a choice is neither -1 nor below {num_experts}");
                taken[expert] += 1;
                ChoiceOutcome::Kept { expert, position: taken[expert] - 1 }
            }
        };
        let outcomes: Vec<ChoiceOutcome> = indices.iter().map(outcome).collect();
        let unrequested: Vec<bool> = outcomes.iter().map(|outcome| *outcome == ChoiceOutcome::NotRequested).collect();
        let gates = if unrequested.contains(&true) {
            gates.mask_fill(Tensor::from_data(TensorData::new(unrequested, [num_tokens, num_choices]), &device), 0.0)
        } else {
            gates
        };
        Self::new(num_experts, num_choices, &outcomes, gates, Vec::new())
    }

    /// A plan whose slots were assigned on a device.
    pub(crate) fn on_device(num_experts: usize, slots: DeviceSlots, gates: Tensor<2>) -> Self {
        let [num_tokens, num_choices] = gates.dims();
        let slots = Slots::Device(Box::new(SlotsOnDevice { slots, host: Arc::default() }));
        Self { num_tokens, num_choices, num_experts, gates, slots }
    }

    /// The assignment as the host reads it; waits for the device if it was made there.
    fn host(&self) -> &HostSlots {
        match &self.slots {
            Slots::Host(host) => host,
            Slots::Device(device_slots) => device_slots.host.get_or_init(|| read_sync(self.read(&device_slots.slots))),
        }
    }

    /// Reads the assignment if a device made it, so that no other function of the plan need wait: for a device that the host cannot wait for, as
    /// in a browser.
    pub async fn read_async(&self) {
        if let Slots::Device(device_slots) = &self.slots
            && device_slots.host.get().is_none()
        {
            // What somebody else has read meanwhile is the same.
            let _ = device_slots.host.set(self.read(&device_slots.slots).await);
        }
    }

    async fn read(&self, slots: &DeviceSlots) -> HostSlots {
        let (outcomes, non_finite_tokens) = read_slots(slots, self.num_choices).await;
        HostSlots::new(self.num_experts, self.num_choices, &outcomes, non_finite_tokens)
    }

    /// The plan of a batch without a token.
    pub(crate) fn of_no_tokens(num_experts: usize, num_choices: usize, device: &Device) -> Self {
        let gates = Tensor::zeros([0, num_choices], (device, DType::F32));
        Self {
            num_tokens: 0,
            num_choices,
            num_experts,
            gates,
            slots: Slots::Host(HostSlots::new(num_experts, num_choices, &[], vec![])),
        }
    }

    /// Tokens, `T`, padding included.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// Experts, `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Choices per token, `M` (`K` for token choice, `E` for expert choice).
    pub fn num_choices(&self) -> usize {
        self.num_choices
    }

    /// Kept choices in all, `R`.
    pub fn num_rows(&self) -> usize {
        self.host().row_token.len()
    }

    /// Gate of each choice, `[T, M]`; exactly 0 where the choice has no slot. Carries the router's task gradient.
    pub fn gates(&self) -> Tensor<2> {
        self.gates.clone()
    }

    /// Choices that named each expert, before drops, `[E]`.
    pub fn requested(&self) -> &[usize] {
        &self.host().requested
    }

    /// First row of each expert, and the row count at the end, `[E + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.host().offsets
    }

    /// Rows of each expert, `[E]`.
    pub fn load(&self) -> Vec<usize> {
        self.offsets().windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Requested choices by rank, before drops, `[M]`.
    pub fn requested_per_choice(&self) -> &[usize] {
        &self.host().requested_per_choice
    }

    /// Kept choices by rank (first choices, second choices, …; by expert for expert choice), `[M]`.
    pub fn kept_per_choice(&self) -> &[usize] {
        &self.host().kept_per_choice
    }

    /// Share of requested choices without a slot, `1 − kept / requested`; 0 when none was requested.
    pub fn dropped(&self) -> f64 {
        match self.requested().iter().sum::<usize>() {
            0 => 0.0,
            requested => 1.0 - self.num_rows() as f64 / requested as f64,
        }
    }

    /// Token of each row, `[R]`, sorted by expert.
    pub fn row_token(&self) -> &[i32] {
        &self.host().row_token
    }

    /// Row of each choice, `[T · M]`; -1 for a choice without a slot.
    pub fn choice_row(&self) -> &[i32] {
        &self.host().choice_row
    }

    /// Valid tokens whose scores are not finite, in order: they have no slot.
    pub fn non_finite_tokens(&self) -> &[usize] {
        &self.host().non_finite_tokens
    }

    /// Expert of each row, `[R]`.
    pub fn row_expert(&self) -> Vec<usize> {
        self.offsets().windows(2).enumerate().flat_map(|(expert, pair)| std::iter::repeat_n(expert, pair[1] - pair[0])).collect()
    }

    /// The plan as index tensors, and [`non_finite`](Self::non_finite), unless the index says it itself. With `kernels`, slots that a device
    /// assigned stay there; the reference takes rows without gaps.
    pub(crate) fn row_index(&self, device: &Device, kernels: bool) -> (RowIndex, Option<Tensor<2, Bool>>) {
        match &self.slots {
            Slots::Device(device_slots) if kernels => (device_slots.slots.index.clone(), None),
            _ => (self.host_index(device), self.non_finite(device)),
        }
    }

    /// Whether no token has a row, as far as is known without waiting for a device.
    pub(crate) fn is_known_empty(&self) -> bool {
        matches!(&self.slots, Slots::Host(host) if host.row_token.is_empty())
    }

    /// `[T, 1]`, true for a valid token whose scores are not finite; none when there are none.
    pub(crate) fn non_finite(&self, device: &Device) -> Option<Tensor<2, Bool>> {
        let non_finite_tokens = self.non_finite_tokens();
        (!non_finite_tokens.is_empty()).then(|| {
            let mut non_finite = vec![false; self.num_tokens];
            non_finite_tokens.iter().for_each(|&token| non_finite[token] = true);
            Tensor::from_data(TensorData::new(non_finite, [self.num_tokens, 1]), device)
        })
    }

    /// Share of all requested choices, before drops, that name each expert, `[1, E]`, f32; zeros when none was requested.
    pub(crate) fn requested_share(&self, device: &Device) -> Tensor<2> {
        match &self.slots {
            Slots::Device(device_slots) => {
                let experts = Tensor::<1, Int>::arange(0..self.num_experts as i64, device).unsqueeze_dim::<2>(0);
                let chosen = device_slots.slots.chosen.clone().unsqueeze_dim::<2>(1);
                let requested = chosen.equal(experts).float().cast(DType::F32).sum_dim(0);
                requested.clone() / requested.sum().clamp_min(1.0).unsqueeze_dim(1)
            }
            Slots::Host(host) => share_of(&host.requested, device),
        }
    }

    fn host_index(&self, device: &Device) -> RowIndex {
        let mut row_choice = vec![0; self.num_rows()];
        for (choice, &row) in self.choice_row().iter().enumerate().filter(|(_, row)| **row != NONE) {
            row_choice[row as usize] = choice as i32;
        }
        RowIndex {
            offsets: Offsets::new(self.offsets(), device),
            row_choice: int_tensor(row_choice, device),
            choice_row: int_tensor(self.choice_row().to_vec(), device),
        }
    }
}

/// Share of all counts, `[1, E]`, f32; zeros when all are.
pub(super) fn share_of(counts: &[usize], device: &Device) -> Tensor<2> {
    let total = counts.iter().sum::<usize>().max(1) as f32;
    let share: Vec<f32> = counts.iter().map(|&count| count as f32 / total).collect();
    Tensor::from_data(TensorData::new(share, [1, counts.len()]), (device, DType::F32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_the_inverse_map_finds_them() {
        let device = Device::default();
        let gates = Tensor::<2>::ones([3, 2], &device);
        // Token 0: expert 1 (slot 1), expert 0. Token 1: padding. Token 2: expert 1 (slot 0), expert 0 dropped.
        let outcomes = [
            ChoiceOutcome::Kept { expert: 1, position: 1 },
            ChoiceOutcome::Kept { expert: 0, position: 0 },
            ChoiceOutcome::NotRequested,
            ChoiceOutcome::NotRequested,
            ChoiceOutcome::Kept { expert: 1, position: 0 },
            ChoiceOutcome::Dropped { expert: 0 },
        ];
        let plan = DispatchPlan::new(3, 2, &outcomes, gates, Vec::new());
        assert_eq!(plan.offsets(), [0, 1, 3, 3]);
        assert_eq!(plan.row_token(), [0, 2, 0]);
        assert_eq!(plan.choice_row(), [2, 0, -1, -1, 1, -1]);
        assert_eq!(plan.requested(), [2, 2, 0]);
        assert_eq!(plan.load(), [1, 2, 0]);
        assert_eq!(plan.kept_per_choice(), [2, 1]);
        assert_eq!(plan.row_expert(), [0, 1, 1]);

        let ids = |t: Tensor<1, Int>| t.try_into_vec_as::<i32>().unwrap();
        let index = plan.host_index(&device);
        assert_eq!(index.offsets.host()[..], [0, 1, 3, 3]);
        assert_eq!(ids(index.row_choice), [1, 4, 0]);
        assert_eq!(ids(index.choice_row), plan.choice_row());
    }
}
