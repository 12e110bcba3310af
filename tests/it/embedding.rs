//! Embeddings alone are those of a whole forward pass.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use burn_moe::{
    AssignmentConfig, Capacity, ExpertChoiceConfig, TokenChoiceConfig, TokenGroups,
    clip::{Clip, ClipConfig, EndOfText, SparseClipConfig, TextConfig, VisionConfig},
    kernels::{Kernels, with_kernels},
    transformer::{BlockSelection, EncoderConfig, Padding, RoutedLayerConfig, SparseEncoderConfig, SparseLayer},
};

use super::support::{numbers, values};

/// Texts of every length, one without an end, and images of 5 or (more than the attention kernel takes) 145 tokens.
fn compare(sparse: Option<SparseEncoderConfig>, end_of_text: EndOfText, image_size: usize) {
    let device = Device::default();
    let encoder = || EncoderConfig::new(24, 3, 2, 40);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(9).with_end_of_text(end_of_text);
    let config = ClipConfig::new(VisionConfig::new(encoder(), image_size, 4), text, 10);
    let config = config.sparse(SparseClipConfig::new().with_vision(sparse.clone()).with_text(sparse.clone()));
    let model: Clip = config.init(&device);
    let ids =
        [[48, 1, 2, 3, 4, 5, 6, 7, 49], [48, 49, 0, 0, 0, 0, 0, 0, 0], [48, 1, 2, 49, 3, 49, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]];
    let tokens = Tensor::<2, Int>::from_data(ids, &device);
    let images = numbers([3, 3, image_size, image_size], 4, &device);
    let near = |found: Tensor<2>, expected: Tensor<2>| {
        let (found, expected) = (values(&found), values(&expected));
        let largest = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5 * largest, "{a} instead of {b}: {sparse:?} {end_of_text:?}");
        }
    };
    for kernels in [Kernels::Fastest, Kernels::Reference] {
        with_kernels(kernels, || {
            near(model.text.embedding(tokens.clone()), model.text.forward(tokens.clone()).embedding);
            near(model.vision.embedding(images.clone()), model.vision.forward(images.clone()).embedding);
        });
    }
    // One by one, and with more padding: a result depends on nothing else.
    for (row, ids) in ids.iter().enumerate().take(3) {
        let end = ids.iter().position(|&id| id == 49).unwrap() + 1;
        let alone = Tensor::<1, Int>::from_data(&ids[..end], &device).unsqueeze();
        if sparse.as_ref().is_none_or(|sparse| sparse.padding == Padding::Excluded) {
            near(model.text.embedding(alone), model.text.embedding(tokens.clone()).narrow(0, row, 1));
        }
    }
}

#[test]
fn they_are_those_of_a_forward_pass() {
    let every = || SparseEncoderConfig::new().with_num_experts(4).with_blocks(BlockSelection::EveryNth(1));
    let assigned = |assignment: AssignmentConfig| every().with_layer(RoutedLayerConfig::new().with_assignment(assignment).into());
    let per_sample = ExpertChoiceConfig::new().with_groups(TokenGroups::PerSample);
    for end_of_text in [EndOfText::HighestId, EndOfText::Id(49)] {
        for image_size in [8, 48] {
            compare(None, end_of_text, image_size);
            compare(Some(every()), end_of_text, image_size);
            compare(Some(every().with_padding(Padding::Routed)), end_of_text, image_size);
        }
    }
    // Where the last block's experts do not take each token by itself.
    let limited = TokenChoiceConfig::new().with_inference_capacity(Capacity::OfTokens(0.5)).with_groups(TokenGroups::PerSample);
    for sparse in
        [assigned(limited.into()), assigned(per_sample.into()), every().with_layer(SparseLayer::Soft { slots_per_expert: 2 })]
    {
        let padding = sparse.with_padding(Padding::Routed);
        compare(Some(padding), EndOfText::HighestId, 8);
    }
}

#[test]
fn on_an_autodiff_device_they_have_gradients() {
    let device = Device::default().autodiff();
    let encoder = || EncoderConfig::new(8, 2, 2, 16);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    let config = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10);
    let model = config.sparse(SparseClipConfig::clip_up()).init(&device);
    let gradients = model.vision.embedding(numbers([2, 3, 8, 8], 4, &device)).sum().backward();
    assert!(model.vision.class_embedding.as_ref().unwrap().grad(&gradients).is_some());
    let tokens = Tensor::from_data([[48, 1, 49, 0]], &device);
    let gradients = model.text.embedding(tokens).sum().backward();
    assert!(model.text.position_embedding.grad(&gradients).is_some());
    assert_eq!(model.valid().text.embedding(Tensor::from_data([[48, 1, 49, 0]], &device.inner())).dims(), [1, 10]);
}
