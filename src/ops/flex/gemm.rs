//! The matrix product, fenced: the one place that hands pointers to the `gemm` crate.
#![allow(unsafe_code)]

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows × cols`, row after row.
    pub(super) fn new(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The columns `from..to`.
    pub(super) fn columns(self, from: usize, to: usize) -> Self {
        assert!(from <= to && to <= self.cols, "columns {from}..{to} of {}", self.cols);
        Self { values: &self.values[(from * self.col_stride).min(self.values.len())..], cols: to - from, ..self }
    }

    /// Rows for columns.
    pub(super) fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn assert_in_bounds(&self) {
        if self.rows > 0 && self.cols > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride;
            assert!(last < self.values.len(), "a {} × {} matrix does not fit {} values", self.rows, self.cols, self.values.len());
        }
    }
}

/// `out = lhs · rhs` on the calling thread; `out` is row after row and fully overwritten.
pub(super) fn matmul(out: &mut [f32], lhs: Matrix, rhs: Matrix) {
    assert_eq!(lhs.cols, rhs.rows, "inner sizes");
    assert_eq!(out.len(), lhs.rows * rhs.cols, "output size");
    if out.is_empty() {
        return;
    }
    if lhs.cols == 0 {
        return out.fill(0.0);
    }
    lhs.assert_in_bounds();
    rhs.assert_in_bounds();
    // SAFETY: every offset that gemm reaches is at most the last element of its matrix, which was checked against its slice above;
    // `out` is borrowed mutably, so nothing else reads or writes it.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            out.as_mut_ptr(),
            1,
            rhs.cols as isize,
            false,
            lhs.values.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.values.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(lhs: Matrix, rhs: Matrix) -> Vec<f32> {
        let at = |m: &Matrix, r: usize, c: usize| m.values[r * m.row_stride + c * m.col_stride];
        let mut out = Vec::new();
        for r in 0..lhs.rows {
            for c in 0..rhs.cols {
                out.push((0..lhs.cols).map(|k| at(&lhs, r, k) * at(&rhs, k, c)).sum());
            }
        }
        out
    }

    #[test]
    fn products_of_views_equal_the_sum_by_hand() {
        let values: Vec<f32> = (0..60).map(|v| ((v * 7) % 11) as f32 - 5.0).collect();
        for (m, k, n) in [(3, 4, 5), (1, 7, 1), (6, 1, 6), (2, 0, 3), (0, 3, 2)] {
            let lhs = Matrix::new(&values[..m * k], m, k);
            let rhs = Matrix::new(&values[..k * n], k, n);
            let views = [
                (lhs, rhs),
                (Matrix::new(&values[..m * k], k, m).transposed(), rhs),
                (lhs, Matrix::new(&values[..k * n], n, k).transposed()),
                (Matrix::new(&values[..m * (k + 1)], m, k + 1).columns(1, k + 1), rhs),
            ];
            for (lhs, rhs) in views {
                let mut out = vec![f32::NAN; m * n];
                matmul(&mut out, lhs, rhs);
                assert_eq!(out, naive(lhs, rhs));
            }
        }
    }

    #[test]
    #[should_panic(expected = "a 3 × 4 matrix does not fit 11 values")]
    fn a_slice_that_is_too_short_is_refused() {
        let values = [0.0; 16];
        matmul(&mut [0.0; 12], Matrix::new(&values[..11], 3, 4), Matrix::new(&values, 4, 4));
    }
}
