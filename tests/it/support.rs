//! Small things that several tests need.

use burn::tensor::{Bool, Device, Tensor, TensorData};

pub(crate) const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Numbers between -1 and 1 that look random and are the same everywhere.
pub(crate) fn numbers<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let values: Vec<f32> = (0..shape.iter().product::<usize>())
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

pub(crate) fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.clone().detach().try_into_vec_as::<f32>().expect("a float tensor reads as f32")
}

pub(crate) fn mask(flags: &[bool], device: &Device) -> Tensor<1, Bool> {
    Tensor::from_data(TensorData::new(flags.to_vec(), [flags.len()]), device)
}

pub(crate) fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d > max || d.is_nan() { d } else { max })
}
