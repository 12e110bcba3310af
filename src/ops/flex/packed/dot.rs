//! Products of bytes, fenced: the one place that calls instructions by their names.
//!
//! All implementations compute the same integers.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use std::sync::LazyLock;

use pulp::{Arch, Simd, WithSimd};

use crate::ops::flex::{
    prefetch::Ahead,
    tiles::{self, Line, PANEL, TILE_ROWS},
};

/// Inner indices that one instruction adds up.
pub(super) const GROUP: usize = 4;

/// How this processor multiplies bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dot(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// AVX-512 with VNNI: four products at once, exactly.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// AVX2: two products at once, in 16 bits, which they must not leave.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Plain code.
    Portable,
}

impl Dot {
    /// The fastest that this processor has.
    pub(super) fn fastest() -> Self {
        static FASTEST: LazyLock<Dot> = LazyLock::new(|| Dot::all()[0]);
        *FASTEST
    }

    /// All that this processor has, the fastest first.
    pub(super) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni")
            {
                all.push(Self(Kind::Vnni));
            }
            if is_x86_feature_detected!("avx2") {
                all.push(Self(Kind::Avx2));
            }
        }
        all.push(Self(Kind::Portable));
        all
    }

    /// The largest value that rows may have: twice 127 times it must fit 16 bits where sums of two are made in them.
    pub(super) fn largest(self) -> u8 {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => 127,
            _ => 255,
        }
    }

    /// `out = tile · panel`; what is `ahead` is asked for meanwhile, where the processor has instructions for bytes. The tile holds, for each group of inner indices, the values of its rows one after the other.
    pub(super) fn multiply(
        self,
        tile: &[[u8; GROUP]],
        height: usize,
        panel: &[Line<[i8; GROUP]>],
        ahead: Ahead,
        out: &mut [[i32; PANEL]],
    ) {
        assert!(out.len() == height && tile.len() == panel.len() * height, "a tile of {height} rows, and a panel of its length");
        #[cfg(target_arch = "x86_64")]
        macro_rules! by_height {
            ($f:ident: $($m:literal)*) => {
                match height {
                    $($m => $f::<$m>(tile, panel, ahead, out),)*
                    _ => unreachable!("a tile of {height} rows"),
                }
            };
        }
        // Plain code asks for nothing.
        #[cfg(not(target_arch = "x86_64"))]
        let _ = ahead;
        match self.0 {
            // SAFETY: only `all` makes this kind, where the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => unsafe { by_height!(vnni: 1 2 3 4 5 6 7 8 9 10 11 12) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { by_height!(avx2: 1 2 3 4 5 6 7 8 9 10 11 12) },
            Kind::Portable => Arch::new().dispatch(Portable { tile, height, panel, out }),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn vnni<const M: usize>(tile: &[[u8; GROUP]], panel: &[Line<[i8; GROUP]>], mut ahead: Ahead, out: &mut [[i32; PANEL]]) {
    let mut sums = [[_mm512_setzero_si512(); 2]; M];
    for (line, values) in panel.iter().zip(tile.as_chunks::<M>().0) {
        ahead.step();
        // SAFETY: a line is 128 bytes, at a multiple of 64.
        let (left, right) = unsafe {
            let start = line.0.as_ptr().cast::<__m512i>();
            (_mm512_load_si512(start), _mm512_load_si512(start.add(1)))
        };
        for (sums, value) in sums.iter_mut().zip(values) {
            let value = _mm512_set1_epi32(i32::from_ne_bytes(*value));
            sums[0] = _mm512_dpbusd_epi32(sums[0], value, left);
            sums[1] = _mm512_dpbusd_epi32(sums[1], value, right);
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        // SAFETY: a row of the output is 128 bytes.
        unsafe {
            let start = out.as_mut_ptr().cast::<__m512i>();
            _mm512_storeu_si512(start, sums[0]);
            _mm512_storeu_si512(start.add(1), sums[1]);
        }
    }
}

/// In halves of two vectors and tiles of four rows: sums, factors and what is in between fill the sixteen registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<const M: usize>(tile: &[[u8; GROUP]], panel: &[Line<[i8; GROUP]>], ahead: Ahead, out: &mut [[i32; PANEL]]) {
    let ones = _mm256_set1_epi16(1);
    for rows in (0..M).step_by(4) {
        let height = (M - rows).min(4);
        for half in 0..2 {
            let (mut sums, mut ahead) = ([[_mm256_setzero_si256(); 2]; 4], ahead);
            for (line, values) in panel.iter().zip(tile.as_chunks::<M>().0) {
                ahead.step();
                // SAFETY: a line is four vectors of 32 bytes, at a multiple of 64.
                let (left, right) = unsafe {
                    let start = line.0.as_ptr().cast::<__m256i>().add(2 * half);
                    (_mm256_load_si256(start), _mm256_load_si256(start.add(1)))
                };
                for place in 0..4 {
                    if place < height {
                        let value = _mm256_set1_epi32(i32::from_ne_bytes(values[rows + place]));
                        for (sum, factor) in sums[place].iter_mut().zip([left, right]) {
                            let pairs = _mm256_maddubs_epi16(value, factor);
                            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
                        }
                    }
                }
            }
            for (out, sums) in out[rows..rows + height].iter_mut().zip(sums) {
                // SAFETY: a row of the output is four vectors of 32 bytes.
                unsafe {
                    let start = out.as_mut_ptr().cast::<__m256i>().add(2 * half);
                    _mm256_storeu_si256(start, sums[0]);
                    _mm256_storeu_si256(start.add(1), sums[1]);
                }
            }
        }
    }
}

/// The same by products of floats, of so many at a time that every sum is exact.
struct Portable<'a> {
    tile: &'a [[u8; GROUP]],
    height: usize,
    panel: &'a [Line<[i8; GROUP]>],
    out: &'a mut [[i32; PANEL]],
}

/// Groups whose sum of products, 255 · 127 each at most, stays below 2²⁴.
const EXACT: usize = 128;

impl WithSimd for Portable<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tile, height, panel, out } = self;
        let mut rows = [0.0; EXACT * GROUP * TILE_ROWS];
        let mut lines = [Line([0.0; PANEL]); EXACT * GROUP];
        out.as_flattened_mut().fill(0);
        for (tile, panel) in tile.chunks(EXACT * height).zip(panel.chunks(EXACT)) {
            let rows = &mut rows[..panel.len() * GROUP * height];
            for (values, rows) in tile.chunks_exact(height).zip(rows.chunks_exact_mut(GROUP * height)) {
                for (place, values) in values.iter().enumerate() {
                    for (index, value) in values.iter().enumerate() {
                        rows[index * height + place] = f32::from(*value);
                    }
                }
            }
            let lines = &mut lines[..panel.len() * GROUP];
            for (group, lines) in panel.iter().zip(lines.as_chunks_mut::<GROUP>().0) {
                for (column, values) in group.0.iter().enumerate() {
                    for (line, value) in lines.iter_mut().zip(values) {
                        line.0[column] = f32::from(*value);
                    }
                }
            }
            let mut sums = [[0.0; PANEL]; TILE_ROWS];
            tiles::multiply(simd, rows, height, lines, Ahead::NONE, &mut sums[..height]);
            for (out, sums) in out.iter_mut().zip(&sums) {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out += *sum as i32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_compute_the_same_integers() {
        for dot in Dot::all() {
            let largest = i32::from(dot.largest());
            for height in 1..=TILE_ROWS {
                let groups = 9;
                // The largest factors at first, where sums of 16 bits would end.
                let value = |i: usize| if i < 4 * height { largest } else { (i as i32 * 37) % (largest + 1) };
                let weight = |i: usize| {
                    if i < 2 * PANEL {
                        127
                    } else if i < 4 * PANEL {
                        -127
                    } else {
                        (i as i32 * 91) % 255 - 127
                    }
                };
                let tile: Vec<[u8; GROUP]> =
                    (0..groups * height).map(|i| std::array::from_fn(|j| value(GROUP * i + j) as u8)).collect();
                let panel: Vec<_> = (0..groups)
                    .map(|g| Line(std::array::from_fn(|c| std::array::from_fn(|j| weight((g * PANEL + c) * GROUP + j) as i8))))
                    .collect();
                let mut out = vec![[-1; PANEL]; height];
                dot.multiply(&tile, height, &panel, Ahead::NONE, &mut out);
                for (row, out) in out.iter().enumerate() {
                    for (column, out) in out.iter().enumerate() {
                        let product = |i: usize| {
                            let (g, j) = (i / GROUP, i % GROUP);
                            value(GROUP * (g * height + row) + j) * weight((g * PANEL + column) * GROUP + j)
                        };
                        let expected: i32 = (0..groups * GROUP).map(product).sum();
                        assert_eq!(*out, expected, "{dot:?}: row {row} of {height}, column {column}");
                    }
                }
            }
        }
    }
}
