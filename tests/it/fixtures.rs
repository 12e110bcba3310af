//! The reference cases, by the code of the `verify` example.

use std::path::{Path, PathBuf};

use burn::tensor::Device;

use super::support::ROOT;

#[allow(dead_code)]
#[path = "../../examples/verify.rs"]
mod verify;

fn case(name: &str) -> PathBuf {
    Path::new(ROOT).join("tests/fixtures").join(name)
}

fn passes(name: &str) {
    let mut errors = verify::Errors::default();
    verify::run(&case(name), &Device::default(), &mut errors).unwrap();
    assert!(errors.checked > 0 && errors.above == 0, "{name}: {} of {} tensors are off", errors.above, errors.checked);
}

#[test]
fn layers_equal_pytorch_forward_and_backward() {
    ["moe-top1", "moe-top2-dropless", "moe-top2-capacity", "moe-top2-masked-after-drop"].into_iter().for_each(passes);
}

#[test]
fn clips_equal_transformers_and_open_clip() {
    ["clip-hf-gelu", "clip-hf-quickgelu", "clip-openclip-gelu"].into_iter().for_each(passes);
}

#[test]
fn a_case_beyond_what_exists_names_its_option() {
    let error = |name| verify::run(&case(name), &Device::default(), &mut verify::Errors::default()).unwrap_err().to_string();
    assert_eq!(error("moe-expert-choice"), "the case needs `policy` = expert_choice, which does not exist yet");
    assert_eq!(error("moe-top2-batch-priority"), "the case needs `fill_order` = batch_priority, which does not exist yet");
    assert_eq!(error("moe-top2-protected"), "the case needs `protected_tokens` = 4, which does not exist yet");
}
