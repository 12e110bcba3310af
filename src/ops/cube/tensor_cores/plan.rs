//! Sizes of tiles and of what they are computed in.

/// Rows and depth of a fragment of the left factor, and columns of two fragments of the right one, which are loaded together.
pub(super) const FRAGMENT: usize = 16;
/// Columns of a fragment of the right factor and of the sums.
pub(super) const COLUMNS: usize = 8;
pub(super) const PLANE_UNITS: usize = 32;
/// Side of a plane's part of the tile, and how many times a fragment fits.
pub(super) const PART: usize = 64;
pub(super) const FRAGMENTS: usize = PART / FRAGMENT;
/// Values that a unit moves at once.
pub(super) const LANES: usize = 8;
/// From a line of a plane's sums to the next, in vectors.
pub(super) const SUMS: usize = PART / LANES + 1;

/// How a cube computes its tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Rows and columns of a tile.
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Length of the pieces in which factors pass through shared memory.
    pub(super) depth: usize,
    /// Pieces that shared memory holds.
    pub(super) stages: usize,
    /// Whether the device copies to shared memory by itself.
    pub(super) asynchronous: bool,
}

impl Plan {
    pub(super) fn units(self) -> usize {
        self.rows * self.columns / (PART * PART) * PLANE_UNITS
    }

    /// Bytes of shared memory that the larger of its products needs, with values of 16 bits.
    pub(super) fn memory(self) -> usize {
        let pieces = self.stages * (self.piece(self.rows, true) + self.piece(self.columns, true)) * LANES * size_of::<u16>();
        pieces + self.written_at_once() * size_of::<f32>()
    }

    /// Sums that pass through shared memory at a time when they are written.
    pub(super) fn written_at_once(self) -> usize {
        self.units() / PLANE_UNITS * FRAGMENT * SUMS * LANES
    }

    /// Vectors of a line of a piece that is `across` wide across the sum: lines go along the sum, or across.
    pub(super) fn width(self, across: usize, along: bool) -> usize {
        if along { self.depth / LANES } else { across / LANES }
    }

    /// Vectors that a unit moves of a piece.
    pub(super) fn steps(self, across: usize) -> usize {
        across * self.depth / LANES / self.units()
    }

    /// Vectors of a piece in shared memory, where each line is padded by one against bank conflicts.
    pub(super) fn piece(self, across: usize, along: bool) -> usize {
        let lines = if along { across } else { self.depth };
        lines * (self.width(across, along) + 1)
    }
}
