//! Rotary positions of tokens in a grid.

use burn::config::Config;
use burn::tensor::{DType, Device, Int, Tensor, TensorData, assert_shape};

use crate::support::error::ConfigError;

/// Rotary positions in two dimensions: attention turns pairs of numbers of its queries and keys by angles that depend on where a token is in a
/// [`TokenGrid`], so that a score depends on how far two tokens are apart (RoFormer, [arXiv 2104.09864](https://arxiv.org/abs/2104.09864); by column and
/// row as in MoE-ViE, [arXiv 2608.17402](https://arxiv.org/abs/2608.17402)).
///
/// With heads of width `h` and `n = ⌊h / 4⌋` frequencies `θ_i = theta^(−2 i / (h / 2))`, the token in column `x` and row `y`, both from 0, turns pair `i`
/// of a head by `(x + 1) · θ_i` and pair `n + i` by `(y + 1) · θ_i`; the numbers behind pair `2 n`, if there are any, stay. A pair is two neighbouring
/// numbers: `(a, b)` becomes `(a cos − b sin, b cos + a sin)`. The angles have no gradient.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct RotaryPositions {
    /// Base of the frequencies. Default: 10,000
    #[config(default = 10_000.0)]
    pub theta: f64,
}

/// Where the tokens of each sample are: the cells of a grid, row by row, or some of these cells. Tokens before those of the grid have no place, like a class
/// token, and rotary positions leave them as they are.
#[derive(Clone, Debug)]
pub struct TokenGrid {
    rows: usize,
    columns: usize,
    kept: Option<Tensor<2, Int>>,
}

impl TokenGrid {
    /// A token in each cell.
    pub fn new(rows: usize, columns: usize) -> Self {
        Self { rows, columns, kept: None }
    }

    /// Tokens in some cells only.
    ///
    /// # Shapes
    /// - cells: `[B, M]`, for each token the number of its cell, row by row from 0
    pub fn with_kept(mut self, cells: Tensor<2, Int>) -> Self {
        self.kept = Some(cells);
        self
    }
}

impl RotaryPositions {
    /// Refuses what heads of this width cannot have.
    pub(super) fn validate(&self, head_width: usize) -> Result<(), ConfigError> {
        if !(self.theta.is_finite() && self.theta > 0.0) {
            let reason = "the base of frequencies must be finite and above 0";
            return Err(ConfigError::OutOfRange { field: "rotary.theta", value: self.theta, reason });
        }
        if head_width < 4 || !head_width.is_multiple_of(2) {
            let reason = "rotary positions turn pairs of numbers by column and by row: heads need an even width of at least 4";
            return Err(ConfigError::OutOfRange { field: "d_model / n_heads", value: head_width as f64, reason });
        }
        Ok(())
    }

    /// The frequencies of heads of this width, in radians per cell, `[n]`.
    pub fn frequencies(&self, head_width: usize) -> Vec<f64> {
        let half = head_width / 2;
        (0..half / 2).map(|i| self.theta.powf(-2.0 * i as f64 / half as f64)).collect()
    }
}

/// What turns the heads of the tokens of a batch: cosines, and sines with the sign that they have in front of a number's partner.
pub(super) struct Rotation {
    /// `[B or 1, N, 1, h]`
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotation {
    /// For samples of `num_tokens` tokens.
    ///
    /// # Panics
    /// When the grid has more tokens than there are, or cells of another number of samples.
    pub(super) fn new(
        rotary: &RotaryPositions,
        grid: &TokenGrid,
        [batch, num_tokens]: [usize; 2],
        head_width: usize,
        device: &Device,
    ) -> Self {
        let cells = grid.rows * grid.columns;
        let count = grid.kept.as_ref().map_or(cells, |kept| kept.dims()[1]);
        if let Some(kept) = &grid.kept {
            assert_shape!(kept, [batch, count]);
        }
        assert!(count <= num_tokens, "a grid with {count} tokens does not fit samples of {num_tokens}");
        // On the host: of some devices, sines are not exact.
        let frequencies = rotary.frequencies(head_width);
        let ahead = num_tokens - count;
        let (mut cos, mut sin) = (vec![1f32; ahead * head_width], vec![0f32; ahead * head_width]);
        for cell in 0..cells {
            let places = [cell % grid.columns, cell / grid.columns];
            let angles = places.iter().flat_map(|place| frequencies.iter().map(move |frequency| (place + 1) as f64 * frequency));
            for angle in angles {
                cos.extend([angle.cos() as f32; 2]);
                sin.extend([-angle.sin() as f32, angle.sin() as f32]);
            }
            let rest = head_width - 4 * frequencies.len();
            cos.extend(std::iter::repeat_n(1.0, rest));
            sin.extend(std::iter::repeat_n(0.0, rest));
        }
        let table = |values: Vec<f32>| {
            let data = TensorData::new(values, [ahead + cells, head_width]);
            let table = Tensor::<2>::from_data(data, (device, DType::F32));
            match &grid.kept {
                None => table.reshape([1, num_tokens, 1, head_width]),
                Some(kept) => {
                    let kept = (kept.clone() + ahead as i64).reshape([-1]);
                    let own = table.clone().select(0, kept).reshape([batch, count, 1, head_width]);
                    if ahead == 0 {
                        return own;
                    }
                    let others = table.narrow(0, 0, ahead).reshape([1, ahead, 1, head_width]);
                    Tensor::cat(vec![others.expand([batch, ahead, 1, head_width]), own], 1)
                }
            }
        };
        Self { cos: table(cos), sin: table(sin) }
    }

    /// Queries or keys of all tokens, `[B · N, D]`.
    pub(super) fn turn(&self, x: Tensor<2>, heads: usize) -> Tensor<2> {
        turn(x, heads, &self.cos, &self.sin)
    }

    /// Queries of one token of each sample, `[B, D]`, which are those of `rows`, `[B]`.
    pub(super) fn turn_some(&self, x: Tensor<2>, heads: usize, rows: Tensor<1, Int>) -> Tensor<2> {
        let [batch, _] = x.dims();
        let [_, num_tokens, _, width] = self.cos.dims();
        let some = |table: &Tensor<4>| {
            let all = table.clone().expand([batch, num_tokens, 1, width]).reshape([batch * num_tokens, width]);
            all.select(0, rows.clone()).reshape([batch, 1, 1, width])
        };
        turn(x, heads, &some(&self.cos), &some(&self.sin))
    }
}

/// In f32 for numbers of 16 bits, as the models do that were trained so.
fn turn(x: Tensor<2>, heads: usize, cos: &Tensor<4>, sin: &Tensor<4>) -> Tensor<2> {
    let ([rows, d_model], dtype) = (x.dims(), x.dtype());
    let [_, num_tokens, _, width] = cos.dims();
    let wide = if matches!(dtype, DType::F16 | DType::BF16) { DType::F32 } else { dtype };
    let shape = [rows / num_tokens, num_tokens, heads, width];
    let x = x.cast(wide);
    let partners = x.clone().reshape([rows * d_model / 2, 2]).flip([1]).reshape(shape);
    let turned = x.reshape(shape) * cos.clone().cast(wide) + partners * sin.clone().cast(wide);
    turned.reshape([rows, d_model]).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Distribution;

    /// The formula, number by number.
    fn by_hand(x: &[f32], [x_cell, y_cell]: [usize; 2], head_width: usize) -> Vec<f32> {
        let mut out = x.to_vec();
        let n = head_width / 4;
        for head in out.chunks_exact_mut(head_width) {
            for pair in 0..2 * n {
                let place = if pair < n { x_cell } else { y_cell };
                let frequency = 1.0 / 10_000f64.powf((pair % n * 2) as f64 / (head_width / 2) as f64);
                let (sin, cos) = ((place + 1) as f64 * frequency).sin_cos();
                let (a, b) = (f64::from(head[2 * pair]), f64::from(head[2 * pair + 1]));
                head[2 * pair] = (a * cos - b * sin) as f32;
                head[2 * pair + 1] = (b * cos + a * sin) as f32;
            }
        }
        out
    }

    fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
        tensor.try_into_vec_as().unwrap()
    }

    fn near(found: &[f32], expected: &[f32]) {
        assert!(
            found.len() == expected.len() && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5),
            "{found:?} {expected:?}"
        );
    }

    #[test]
    fn heads_of_every_width_turn_by_column_and_row() {
        let device = Device::default();
        for head_width in [4, 6, 8, 10, 12] {
            let (heads, d_model) = (2, 2 * head_width);
            let x = Tensor::<2>::random([2 * 7, d_model], Distribution::Normal(0.0, 1.0), &device);
            let rotary = RotaryPositions::new();
            let rotation = Rotation::new(&rotary, &TokenGrid::new(2, 3), [2, 7], head_width, &device);
            let found = numbers(rotation.turn(x.clone(), heads));
            let x = numbers(x);
            for (row, (found, x)) in found.chunks_exact(d_model).zip(x.chunks_exact(d_model)).enumerate() {
                match (row % 7).checked_sub(1) {
                    None => assert_eq!(found, x, "a token without a place"),
                    Some(cell) => near(found, &by_hand(x, [cell % 3, cell / 3], head_width)),
                }
            }
        }
    }

    #[test]
    fn some_cells_and_one_token_turn_as_in_the_whole_grid() {
        let device = Device::default();
        let rotary = RotaryPositions::new();
        let cells = Tensor::<2, Int>::from_data([[5, 0, 2], [1, 3, 4]], &device);
        let rotation = Rotation::new(&rotary, &TokenGrid::new(2, 3).with_kept(cells), [2, 4], 8, &device);
        let x = Tensor::<2>::random([8, 8], Distribution::Normal(0.0, 1.0), &device);
        let found = numbers(rotation.turn(x.clone(), 1));
        let values = numbers(x.clone());
        for (row, cell) in [None, Some(5), Some(0), Some(2), None, Some(1), Some(3), Some(4)].into_iter().enumerate() {
            let own = &values[8 * row..][..8];
            let expected = cell.map_or(own.to_vec(), |cell: usize| by_hand(own, [cell % 3, cell / 3], 8));
            near(&found[8 * row..][..8], &expected);
        }
        let rows = Tensor::<1, Int>::from_data([3, 5], &device);
        let some = numbers(rotation.turn_some(x.select(0, rows.clone()), 1, rows));
        near(&some, &[&found[24..32], &found[40..48]].concat());
    }

    #[test]
    fn widths_and_bases_without_angles_are_refused() {
        let text = |rotary: RotaryPositions, width| rotary.validate(width).unwrap_err().to_string();
        assert!(text(RotaryPositions::new(), 2).starts_with("`d_model / n_heads` is 2: "));
        assert!(text(RotaryPositions::new(), 9).starts_with("`d_model / n_heads` is 9: "));
        assert!(text(RotaryPositions::new().with_theta(f64::NAN), 8).starts_with("`rotary.theta` is NaN: "));
        assert_eq!(RotaryPositions::new().validate(10), Ok(()));
    }
}
