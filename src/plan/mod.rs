//! Who sits where, and with which gate: the one contract between routing and compute.

mod host;

use std::sync::{Arc, OnceLock};

use burn::tensor::{Bool, DType, Device, Int, Tensor, TensorData};

use crate::ops::{DeviceSeats, Offsets, PaddedIndex, RaggedIndex, RowIndex};
pub(crate) use host::Seat;
use host::{HostSeats, NONE, read_seats};

/// The seats that a router handed out, as a value.
///
/// A *choice* is one (token, expert) pair; each token has `M` of them (`K` for token choice; `E` for expert choice, most of them unasked). A choice that got a slot owns a
/// *row*; rows are sorted by expert, and inside an expert in the order in which slots were filled. Rows of expert `e` are
/// `offsets[e]..offsets[e + 1]`, so nothing is padded. The inverse map, from choices to rows, makes combining a gather.
///
/// Positions are data, not parameters: only [`gates`](Self::gates) carries a gradient. Where seats were handed out on a device (token choice with a
/// fixed capacity on a GPU), the host reads them once, when it first asks.
#[derive(Debug, Clone)]
pub struct DispatchPlan {
    num_tokens: usize,
    num_choices: usize,
    num_experts: usize,
    gates: Tensor<2>,
    seats: Seats,
}

/// Who handed out the seats.
#[derive(Debug, Clone)]
enum Seats {
    Host(HostSeats),
    Device(Box<SeatsOfDevice>),
}

/// Seats that a device handed out.
#[derive(Debug, Clone)]
struct SeatsOfDevice {
    seats: DeviceSeats,
    /// What the host has read of them.
    host: Arc<OnceLock<HostSeats>>,
}

impl DispatchPlan {
    /// A plan from one seat per choice (`[T · M]`, token-major), the gates `[T, M]`, and the tokens that could not ask.
    pub(crate) fn new(num_experts: usize, num_choices: usize, seats: &[Seat], gates: Tensor<2>, unroutable: Vec<usize>) -> Self {
        let num_tokens = seats.len().checked_div(num_choices).unwrap_or(0);
        let seats = Seats::Host(HostSeats::new(num_experts, num_choices, seats, unroutable));
        Self { num_tokens, num_choices, num_experts, gates, seats }
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
    pub fn from_choices(num_experts: usize, experts: Tensor<2, Int>, gates: Tensor<2>) -> Self {
        let ([num_tokens, num_choices], device) = (gates.dims(), gates.device());
        let shape = experts.dims();
        assert!(shape == gates.dims(), "experts of shape {shape:?} do not fit gates of shape {:?}", gates.dims());
        if num_tokens == 0 {
            return Self::of_no_tokens(num_experts, num_choices, &device);
        }
        let indices: Vec<i32> = experts.try_into_vec_as().expect("indices are integers");
        let mut taken = vec![0; num_experts];
        let seat = |&index: &i32| match usize::try_from(index) {
            Err(_) => {
                assert!(index == -1, "expert {index} of a choice is neither -1 nor below {num_experts}");
                Seat::Unasked
            }
            Ok(expert) => {
                assert!(expert < num_experts, "expert {index} of a choice is neither -1 nor below {num_experts}");
                taken[expert] += 1;
                Seat::Kept { expert, position: taken[expert] - 1 }
            }
        };
        let seats: Vec<Seat> = indices.iter().map(seat).collect();
        let unasked: Vec<bool> = seats.iter().map(|seat| *seat == Seat::Unasked).collect();
        let gates = if unasked.contains(&true) {
            gates.mask_fill(Tensor::from_data(TensorData::new(unasked, [num_tokens, num_choices]), &device), 0.0)
        } else {
            gates
        };
        Self::new(num_experts, num_choices, &seats, gates, Vec::new())
    }

    /// A plan whose seats were handed out on a device.
    pub(crate) fn on_device(num_experts: usize, seats: DeviceSeats, gates: Tensor<2>) -> Self {
        let [num_tokens, num_choices] = gates.dims();
        let seats = Seats::Device(Box::new(SeatsOfDevice { seats, host: Arc::default() }));
        Self { num_tokens, num_choices, num_experts, gates, seats }
    }

    /// The seats as the host sees them; waits for the device if it handed them out.
    fn host(&self) -> &HostSeats {
        match &self.seats {
            Seats::Host(host) => host,
            Seats::Device(device_seats) => device_seats.host.get_or_init(|| {
                let (seats, unroutable) = read_seats(&device_seats.seats, self.num_choices);
                HostSeats::new(self.num_experts, self.num_choices, &seats, unroutable)
            }),
        }
    }

    /// The plan of a batch without a token.
    pub(crate) fn of_no_tokens(num_experts: usize, num_choices: usize, device: &Device) -> Self {
        let gates = Tensor::zeros([0, num_choices], (device, DType::F32));
        Self {
            num_tokens: 0,
            num_choices,
            num_experts,
            gates,
            seats: Seats::Host(HostSeats::new(num_experts, num_choices, &[], vec![])),
        }
    }

    /// A plan in which nobody chooses: for layers without choices.
    pub(crate) fn without_rows(num_experts: usize, num_tokens: usize, device: &Device) -> Self {
        if num_tokens == 0 {
            return Self::of_no_tokens(num_experts, 1, device);
        }
        let seats = vec![Seat::Unasked; num_tokens];
        Self::new(num_experts, 1, &seats, Tensor::zeros([num_tokens, 1], device), Vec::new())
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
    pub fn asked(&self) -> &[usize] {
        &self.host().asked
    }

    /// First row of each expert, and the row count at the end, `[E + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.host().offsets
    }

    /// Rows of each expert, `[E]`.
    pub fn load(&self) -> Vec<usize> {
        self.offsets().windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Asked choices by rank, before drops, `[M]`.
    pub fn asked_per_choice(&self) -> &[usize] {
        &self.host().asked_per_choice
    }

    /// Kept choices by rank (first choices, second choices, …; by expert for expert choice), `[M]`.
    pub fn kept_per_choice(&self) -> &[usize] {
        &self.host().kept_per_choice
    }

    /// Share of asked choices without a slot, `1 − kept / asked`; 0 when nothing was asked.
    pub fn dropped(&self) -> f64 {
        match self.asked().iter().sum::<usize>() {
            0 => 0.0,
            asked => 1.0 - self.num_rows() as f64 / asked as f64,
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

    /// Valid tokens whose scores are not finite, in order: they have no seat.
    pub fn unroutable(&self) -> &[usize] {
        &self.host().unroutable
    }

    /// Expert of each row, `[R]`.
    pub fn row_expert(&self) -> Vec<usize> {
        self.offsets().windows(2).enumerate().flat_map(|(expert, pair)| std::iter::repeat_n(expert, pair[1] - pair[0])).collect()
    }

    /// The plan as index tensors: ragged for kernels, a slot grid of the largest load for batched matrix products. And those of
    /// [`lost`](Self::lost), unless the index says it itself.
    pub(crate) fn row_index(&self, device: &Device, kernels: bool) -> (RowIndex, Option<Tensor<2, Bool>>) {
        match &self.seats {
            Seats::Device(device_seats) if kernels => (RowIndex::Ragged(device_seats.seats.index(self.num_experts, device)), None),
            _ if kernels => (RowIndex::Ragged(self.ragged_index(device)), self.lost(device)),
            _ => (RowIndex::Padded(self.padded_index(device)), self.lost(device)),
        }
    }

    /// Whether no token has a row, as far as is known without waiting for a device.
    pub(crate) fn is_known_empty(&self) -> bool {
        matches!(&self.seats, Seats::Host(host) if host.row_token.is_empty())
    }

    /// `[T, 1]`, true for a valid token whose scores are not finite; none when there are none.
    pub(crate) fn lost(&self, device: &Device) -> Option<Tensor<2, Bool>> {
        let unroutable = self.unroutable();
        (!unroutable.is_empty()).then(|| {
            let mut lost = vec![false; self.num_tokens];
            unroutable.iter().for_each(|&token| lost[token] = true);
            Tensor::from_data(TensorData::new(lost, [self.num_tokens, 1]), device)
        })
    }

    /// Share of all asked choices, before drops, that name each expert, `[1, E]`, f32; zeros when nothing was asked.
    pub(crate) fn asked_share(&self, device: &Device) -> Tensor<2> {
        match &self.seats {
            Seats::Device(device_seats) => {
                let experts = Tensor::<1, Int>::arange(0..self.num_experts as i64, device).unsqueeze_dim::<2>(0);
                let chosen = device_seats.seats.chosen.clone().unsqueeze_dim::<2>(1);
                let asked = chosen.equal(experts).float().cast(DType::F32).sum_dim(0);
                asked.clone() / asked.sum().clamp_min(1.0).unsqueeze_dim(1)
            }
            Seats::Host(host) => {
                let total = host.asked.iter().sum::<usize>().max(1) as f32;
                let share: Vec<f32> = host.asked.iter().map(|&asked| asked as f32 / total).collect();
                Tensor::from_data(TensorData::new(share, [1, self.num_experts]), (device, DType::F32))
            }
        }
    }

    fn ragged_index(&self, device: &Device) -> RaggedIndex {
        let mut row_choice = vec![0; self.num_rows()];
        for (choice, &row) in self.choice_row().iter().enumerate().filter(|(_, row)| **row != NONE) {
            row_choice[row as usize] = choice as i32;
        }
        RaggedIndex {
            offsets: Offsets::new(self.offsets(), device),
            row_choice: int_tensor(row_choice, device),
            choice_row: int_tensor(self.choice_row().to_vec(), device),
        }
    }

    fn padded_index(&self, device: &Device) -> PaddedIndex {
        let slots = self.load().into_iter().max().unwrap_or(0);
        let num_slots = slots * self.num_experts();
        let mut slot_token = vec![self.num_tokens as i32; num_slots];
        let mut row_slot = vec![0i32; self.num_rows()];
        for (expert, pair) in self.offsets().windows(2).enumerate() {
            let rows = pair[0]..pair[1];
            let first_slot = expert * slots;
            slot_token[first_slot..first_slot + rows.len()].copy_from_slice(&self.row_token()[rows.clone()]);
            row_slot[rows].iter_mut().zip(first_slot..).for_each(|(seat, slot)| *seat = slot as i32);
        }
        let choice_slot: Vec<i32> =
            self.choice_row().iter().map(|&row| if row == NONE { num_slots as i32 } else { row_slot[row as usize] }).collect();
        PaddedIndex {
            has_empty_slots: self.num_rows() < num_slots,
            has_unseated_choices: self.num_rows() < self.choice_row().len(),
            slot_token: int_tensor(slot_token, device),
            choice_slot: int_tensor(choice_slot, device),
        }
    }
}

fn int_tensor(values: Vec<i32>, device: &Device) -> Tensor<1, Int> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_the_inverse_map_finds_them() {
        let device = Device::default();
        let gates = Tensor::<2>::ones([3, 2], &device);
        // Token 0: expert 1 (slot 1), expert 0. Token 1: padding. Token 2: expert 1 (slot 0), expert 0 dropped.
        let seats = [
            Seat::Kept { expert: 1, position: 1 },
            Seat::Kept { expert: 0, position: 0 },
            Seat::Unasked,
            Seat::Unasked,
            Seat::Kept { expert: 1, position: 0 },
            Seat::Dropped { expert: 0 },
        ];
        let plan = DispatchPlan::new(3, 2, &seats, gates, Vec::new());
        assert_eq!(plan.offsets(), [0, 1, 3, 3]);
        assert_eq!(plan.row_token(), [0, 2, 0]);
        assert_eq!(plan.choice_row(), [2, 0, -1, -1, 1, -1]);
        assert_eq!(plan.asked(), [2, 2, 0]);
        assert_eq!(plan.load(), [1, 2, 0]);
        assert_eq!(plan.kept_per_choice(), [2, 1]);
        assert_eq!(plan.row_expert(), [0, 1, 1]);

        let grid = plan.padded_index(&device);
        assert!(grid.has_empty_slots && grid.has_unseated_choices);
        let ids = |t: Tensor<1, Int>| t.try_into_vec_as::<i32>().unwrap();
        assert_eq!(ids(grid.slot_token), [0, 3, 2, 0, 3, 3]);
        assert_eq!(ids(grid.choice_slot), [3, 0, 6, 6, 2, 6]);

        let ragged = plan.ragged_index(&device);
        assert_eq!(ragged.offsets.host[..], [0, 1, 3, 3]);
        assert_eq!(ids(ragged.row_choice), [1, 4, 0]);
        assert_eq!(ids(ragged.choice_row), plan.choice_row());
    }
}
