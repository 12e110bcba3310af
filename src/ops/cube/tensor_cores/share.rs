//! Pieces of factors on their way to shared memory.

use cubecl::prelude::{barrier::copy_async_checked, *};

use super::plan::{LANES, Plan};

/// A vector in registers, as words of 32 bits: with values of 16 bits, the compiler repacks each vector as soon as it is loaded, and so waits
/// for it.
type Words = Vector<u32, Const<4>>;

/// Part of a matrix: its first vector, the vectors from one line to the next, and the lines and vectors that the matrix has from there on.
#[derive(CubeType)]
pub(super) struct Piece {
    pub(super) first: usize,
    pub(super) pitch: usize,
    pub(super) lines: usize,
    pub(super) vectors: usize,
}

/// The vectors that a unit moves of each piece of a factor. Across the sum, those beyond the matrix are its last ones: nothing of what comes of
/// them is written. Along the sum, they are zeros.
#[derive(CubeType)]
pub(super) struct Share {
    /// Of the first piece, each step's vector in the matrix.
    from: Array<usize>,
    /// Vectors of the matrix from a piece to the next.
    advance: usize,
    /// Along the sum, the first step's vector or line, and how many the matrix has.
    depth: usize,
    total: usize,
    /// In shared memory, the first step's vector of the piece.
    to: usize,
}

#[cube]
impl Share {
    pub(super) fn new(piece: &Piece, #[comptime] plan: Plan, #[comptime] across: usize, #[comptime] along: bool) -> Share {
        let width = comptime!(plan.width(across, along));
        let (line, vector) = (UNIT_POS as usize / width, UNIT_POS as usize % width);
        let mut from = Array::<usize>::new(comptime!(plan.steps(across)));
        #[unroll]
        for step in 0..comptime!(plan.steps(across)) {
            let line = line + comptime!(step * plan.units() / width);
            from[step] = if along {
                piece.first + line.min(piece.lines - 1) * piece.pitch + vector
            } else {
                piece.first + line * piece.pitch + vector.min(piece.vectors - 1)
            };
        }
        let to = line * comptime!(width + 1) + vector;
        if along {
            Share { from, advance: comptime!(plan.depth / LANES).runtime(), depth: vector, total: piece.vectors, to }
        } else {
            Share { from, advance: piece.pitch * comptime!(plan.depth), depth: line, total: piece.lines, to }
        }
    }

    /// Whether the sum goes on to this vector of piece `index`.
    fn is_there(
        &self,
        index: usize,
        #[comptime] step: usize,
        #[comptime] plan: Plan,
        #[comptime] width: usize,
        #[comptime] along: bool,
    ) -> bool {
        if along {
            self.depth + index * comptime!(plan.depth / LANES) < self.total
        } else {
            self.depth + comptime!(step * plan.units() / width) + index * comptime!(plan.depth) < self.total
        }
    }
}

/// Loads a unit's share of piece `index`. Where there is none, it is the first vector of the matrix; [`put`] replaces it by zeros, so that no load
/// is waited for here.
#[cube]
pub(super) fn fetch<F: Float, N: Size>(
    source: &Tensor<Vector<F, N>>,
    share: &Share,
    index: usize,
    #[comptime] plan: Plan,
    #[comptime] across: usize,
    #[comptime] along: bool,
) -> Array<Words> {
    let width = comptime!(plan.width(across, along));
    let mut words = Array::<Words>::new(comptime!(plan.steps(across)));
    #[unroll]
    for step in 0..comptime!(plan.steps(across)) {
        let at = select(share.is_there(index, step, plan, width, along), share.from[step] + index * share.advance, 0usize);
        words[step] = Words::reinterpret(source[at]);
    }
    words
}

/// Stores a unit's share of piece `index` in a stage of shared memory that begins at `start`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn put<F: Float, N: Size>(
    words: &Array<Words>,
    memory: &mut Shared<[Vector<F, N>]>,
    start: usize,
    share: &Share,
    index: usize,
    #[comptime] plan: Plan,
    #[comptime] across: usize,
    #[comptime] along: bool,
) {
    let width = comptime!(plan.width(across, along));
    #[unroll]
    for step in 0..comptime!(plan.steps(across)) {
        let value = select(share.is_there(index, step, plan, width, along), words[step], Words::new(0u32));
        memory[start + share.to + comptime!(step * plan.units() / width * (width + 1))] = Vector::reinterpret(value);
    }
}

/// Lets the device copy a unit's share of piece `index` to a stage of shared memory that begins at `start`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn copy<F: Float, N: Size>(
    source: &Tensor<Vector<F, N>>,
    memory: &mut Shared<[Vector<F, N>]>,
    start: usize,
    share: &Share,
    index: usize,
    #[comptime] plan: Plan,
    #[comptime] across: usize,
    #[comptime] along: bool,
) {
    let width = comptime!(plan.width(across, along));
    #[unroll]
    for step in 0..comptime!(plan.steps(across)) {
        // Where the length is zero, nothing is read.
        let from = share.from[step] + index * share.advance;
        let length = select(share.is_there(index, step, plan, width, along), 1usize, 0usize);
        let to = start + share.to + comptime!(step * plan.units() / width * (width + 1));
        copy_async_checked(&source[from..from + length], &mut memory[to..to + 1], comptime!(LANES as u32));
    }
}

/// Ends a group of copies.
#[cube]
pub(super) fn end_of_group() {
    gpu_asm!("cp.async.commit_group;");
}

/// Waits for this unit's copies, but for those of the last `groups`.
#[cube]
pub(super) fn wait_for_groups(#[comptime] groups: usize) {
    gpu_asm!("cp.async.wait_group {groups};", groups = const groups);
}
