//! Position embeddings for images of another size than the model was trained on.

/// The side of the grid of patches that a table of this many rows is for: `ahead` class tokens and a square.
pub(super) fn side_of(rows: usize, ahead: usize) -> Option<usize> {
    let patches = rows.checked_sub(ahead)?;
    let side = patches.isqrt();
    (side > 0 && side * side == patches).then_some(side)
}

/// A table for `to` by `to` patches from one for `from` by `from`, `[ahead + from², D] -> [ahead + to², D]`: the rows of `ahead` class tokens stay, the others
/// are resized as an image is, bicubic and antialiased (open_clip's `resize_pos_embed`).
pub(super) fn interpolated(table: &[f32], ahead: usize, from: usize, to: usize) -> Vec<f32> {
    let width = table.len() / (from * from + ahead);
    let (class, grid) = table.split_at(ahead * width);
    let filters = filters(from, to);
    // Rows of the grid, then its columns.
    let down = resized(grid, from * width, &filters);
    let across = down.chunks_exact(from * width).flat_map(|row| resized(row, width, &filters));
    class.iter().copied().chain(across).collect()
}

/// The weighted sums of `values`, `[from, size] -> [to, size]`.
fn resized(values: &[f32], size: usize, filters: &[(usize, Vec<f32>)]) -> Vec<f32> {
    let mut out = vec![0.0; filters.len() * size];
    for (out, (first, weights)) in out.chunks_exact_mut(size).zip(filters) {
        for (values, weight) in values.chunks_exact(size).skip(*first).zip(weights) {
            out.iter_mut().zip(values).for_each(|(out, value)| *out += weight * value);
        }
    }
    out
}

/// For each of `to` places the first of `from` places that it reads, and the weights of those from there on: PyTorch's antialiased bicubic
/// filter (a = -0.5).
fn filters(from: usize, to: usize) -> Vec<(usize, Vec<f32>)> {
    let scale = from as f64 / to as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    let filter = |place: usize| {
        let centre = scale * (place as f64 + 0.5);
        let first = (centre - support + 0.5).max(0.0) as usize;
        let end = ((centre + support + 0.5) as usize).min(from);
        let weights: Vec<f64> = (first..end).map(|i| cubic((i as f64 - centre + 0.5) / stretch)).collect();
        let total: f64 = weights.iter().sum();
        (first, weights.into_iter().map(|weight| (weight / total) as f32).collect())
    };
    (0..to).map(filter).collect()
}

fn cubic(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_those_of_squares_with_a_class_token() {
        assert_eq!([50, 197, 257, 577, 2].map(|rows| side_of(rows, 1)), [Some(7), Some(14), Some(16), Some(24), Some(1)]);
        assert_eq!([0, 1, 49, 198].map(|rows| side_of(rows, 1)), [None; 4]);
        assert_eq!([49, 50].map(|rows| side_of(rows, 0)), [Some(7), None]);
    }

    #[test]
    fn the_same_size_changes_nothing_and_even_tables_stay_even() {
        let table: Vec<f32> = (0..10 * 3).map(|i| (i * i % 17) as f32).collect();
        assert_eq!(interpolated(&table, 1, 3, 3), table);
        let even = interpolated(&[[9.0; 2].as_slice(), &[0.25; 18]].concat(), 1, 3, 5);
        assert_eq!(even.len(), 26 * 2);
        assert_eq!(interpolated(&[[0.0; 2].as_slice(), &[0.25; 18]].concat()[2..], 0, 3, 5), even[2..]);
        assert!(even[..2] == [9.0; 2] && even[2..].iter().all(|v| (v - 0.25).abs() < 1e-6));
    }
}
