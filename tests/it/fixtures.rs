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
    let mut errors = verify::Errors::new(1.0);
    verify::run(&case(name), &Device::default(), &mut errors).unwrap();
    assert!(errors.checked > 0 && errors.above == 0, "{name}: {} of {} tensors are off", errors.above, errors.checked);
}

#[test]
fn layers_equal_pytorch_forward_and_backward() {
    let cases = [
        "top1",
        "top2-dropless",
        "top2-capacity",
        "top2-masked-after-drop",
        "top2-batch-priority",
        "top2-protected",
        "expert-choice",
    ];
    cases.into_iter().for_each(|name| passes(&format!("moe-{name}")));
}

#[test]
fn clips_equal_transformers_and_open_clip() {
    ["clip-hf-gelu", "clip-hf-quickgelu", "clip-openclip-gelu"].into_iter().for_each(passes);
}

#[test]
fn a_moe_vie_equals_its_owners_code() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["moevie_config.json", "reference.safetensors", "model.pt"] {
        std::fs::copy(case("moevie").join(name), folder.path().join(name)).unwrap();
    }
    for path in [case("moevie").as_path(), folder.path()] {
        let mut errors = verify::Errors::new(1.0);
        verify::run(path, &Device::default(), &mut errors).unwrap();
        assert_eq!((errors.checked, errors.above), (6, 0));
    }
}

#[test]
fn moe_layers_of_language_models_equal_transformers_forward_and_backward() {
    let families = burn_moe::language_models::Family::ALL;
    families.into_iter().for_each(|family| passes(&format!("lm-{}", family.model_type())));
}

#[test]
fn a_case_beyond_what_exists_names_its_option() {
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(case("moe-top1").join("case.json")).unwrap();
    std::fs::write(folder.path().join("case.json"), text.replace("\"gelu\"", "\"mish\"")).unwrap();
    let error = verify::run(folder.path(), &Device::default(), &mut verify::Errors::new(1.0)).unwrap_err().to_string();
    assert_eq!(error, "the case needs `activation` = mish, which does not exist yet");
}

#[test]
fn devices_that_cannot_be_had_are_named() {
    use verify::support::device_by_name;

    assert!(device_by_name("cpu").is_ok());
    assert_eq!(
        device_by_name("gpu").unwrap_err().to_string(),
        "`gpu` is no device: expected one of cpu, wgpu, vulkan, metal, cuda, webgpu"
    );
    if !cfg!(feature = "cuda") {
        let error = device_by_name("cuda").unwrap_err().to_string();
        assert_eq!(error, "device `cuda` is not built in: build with `--features cuda`");
    }
}

#[test]
fn names_that_the_tokenizer_reads_alike_are_found() {
    let equal = |names: &[&str]| verify::support::equal_names(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(equal(&["cat", "dog", "Cat "]).unwrap(), "1 and 3 are the same name, \"Cat \"");
    assert_eq!(equal(&["cat", "cats", "dog"]), None);
}
