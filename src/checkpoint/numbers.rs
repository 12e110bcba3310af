//! Numbers as they are stored.

use safetensors::Dtype;

use crate::Precision;

/// Numbers of a stored tensor; `None` for a dtype that is no weight.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => return None,
    })
}

/// Bytes with a sign, before their scales.
pub(crate) fn decode_int8(bytes: &[u8]) -> Vec<f32> {
    bytes.iter().map(|byte| f32::from(byte.cast_signed())).collect()
}

impl Precision {
    /// Of what has no scales: it is never in 8 bits.
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            Self::F32 | Self::Int8 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// How many values would be written as something else than a finite number.
    pub(crate) fn overflows(self, values: &[f32]) -> usize {
        values.iter().filter(|value| !self.holds(**value)).count()
    }

    pub(crate) fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 | Self::Int8 => bytes_of(values, f32::to_le_bytes),
            Self::F16 => bytes_of(values, |v| half::f16::from_f32(v).to_le_bytes()),
            Self::BF16 => bytes_of(values, |v| half::bf16::from_f32(v).to_le_bytes()),
        }
    }
}

fn bytes_of<const N: usize>(values: &[f32], encode: impl Fn(f32) -> [u8; N]) -> Vec<u8> {
    let mut bytes = vec![0; N * values.len()];
    for (bytes, value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
        *bytes = encode(*value);
    }
    bytes
}

/// `[rows, columns] -> [columns, rows]`
pub(crate) fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    transpose(values, rows, &mut out);
    out
}

/// The same into `out`. Squares as wide as a line of the cache are read and written line by line: with rows of a power of two, all lines of a square
/// fall on few places of the cache, and none would be there a second time.
pub(crate) fn transpose(values: &[f32], rows: usize, out: &mut [f32]) {
    const SIDE: usize = 16;
    let columns = values.len() / rows.max(1);
    for first_row in (0..rows).step_by(SIDE) {
        let height = SIDE.min(rows - first_row);
        for first_column in (0..columns).step_by(SIDE) {
            let width = SIDE.min(columns - first_column);
            let mut square = [[0.0; SIDE]; SIDE];
            for (row, line) in square[..height].iter_mut().enumerate() {
                line[..width].copy_from_slice(&values[(first_row + row) * columns + first_column..][..width]);
            }
            for column in 0..width {
                let line = &mut out[(first_column + column) * rows + first_row..][..height];
                line.iter_mut().zip(&square).for_each(|(value, row)| *value = row[column]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns_whatever_their_number() {
        for (rows, columns) in [(1, 1), (3, 50), (16, 16), (17, 33), (64, 5), (0, 4)] {
            let values: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
            let out = transposed(&values, rows);
            for (i, value) in out.iter().enumerate() {
                assert_eq!(*value, ((i % rows) * columns + i / rows) as f32);
            }
        }
    }
}
