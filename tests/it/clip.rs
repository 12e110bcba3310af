//! CLIP checkpoints on disk.

use std::{fs, path::Path};

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use burn_moe::{
    BalancingOptions, BalancingRule, ExpertGroups, FeedForwardForm, Router, RouterOptions, TokenChoiceConfig, UpcycleFromDense,
    UpcycleOptions,
    clip::{
        Clip, ClipConfig, ImagePreprocessing, Interpolation, MAX_LOGIT_SCALE, ResizeMode, SparseClipConfig, TextConfig,
        TokenizerKind, VisionConfig,
        checkpoint::{CheckpointError, ClipCheckpoint, LoadOptions, Precision},
    },
    transformer::{EncoderConfig, FeedForward, Padding, RoutedLayerConfig, SparseEncoderConfig, SparseLayer},
};

use super::support::{ROOT, numbers, values};

fn config() -> ClipConfig {
    let encoder = || EncoderConfig::new(8, 2, 2, 16);
    let text = TextConfig::new(encoder()).with_vocab_size(50).with_context_length(6);
    ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 10)
}

fn dense(device: &Device) -> ClipCheckpoint {
    ClipCheckpoint { config: config(), model: config().init(device) }
}

fn image_embeds(checkpoint: &ClipCheckpoint, device: &Device) -> Vec<f32> {
    values(&checkpoint.model.encode_image(numbers([2, 3, 8, 8], 4, device)).embedding)
}

#[test]
fn a_model_comes_back_from_disk_to_the_bit() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let dense = dense(&device);
    dense.save_open_clip(folder.path(), Precision::F32).unwrap();
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
    assert_eq!(image_embeds(&back, &device), image_embeds(&dense, &device));
    // Nothing in open_clip's format says what the ids of so few are.
    assert!(!folder.path().join("merges.txt.gz").exists());
    assert_eq!(back.config.text.tokenizer, TokenizerKind::Other);
    assert_eq!(format!("{}", back.config).replace("Other", "ClipBpe"), format!("{}", dense.config));

    let sparse_config = config().sparse(SparseClipConfig::clip_up());
    let sparse = sparse_config.init(&device).upcycle_from_dense(&dense.model, &UpcycleOptions::default()).unwrap().model;
    let sparse = ClipCheckpoint { config: sparse_config, model: sparse };
    let folder = tempfile::tempdir().unwrap();
    sparse.save_sparse(folder.path(), Precision::F32).unwrap();
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
    assert_eq!(image_embeds(&back, &device), image_embeds(&sparse, &device));
    assert_eq!(format!("{}", back.config), format!("{}", sparse.config));
    let refused = sparse.save_open_clip(folder.path(), Precision::F32).unwrap_err();
    assert_eq!(refused.to_string(), "open_clip's format has no place for sparse blocks");
}

#[test]
fn a_model_comes_back_from_memory_as_from_disk() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let config = config().sparse(SparseClipConfig::clip_up());
    let sparse = ClipCheckpoint { model: config.init(&device), config };
    sparse.save_sparse(folder.path(), Precision::Int8).unwrap();
    let text = fs::read_to_string(folder.path().join("burn_moe_config.json")).unwrap();
    let bytes = fs::read(folder.path().join("burn_moe_model.safetensors")).unwrap();
    let read = |text: &str, bytes: &[u8]| ClipCheckpoint::from_bytes(text, bytes.to_vec(), &LoadOptions::new(), &device);
    let (from_disk, from_memory) = (ClipCheckpoint::load(folder.path(), &device).unwrap(), read(&text, &bytes).unwrap());
    assert_eq!(image_embeds(&from_memory, &device), image_embeds(&from_disk, &device));
    assert_eq!(format!("{}", from_memory.config), format!("{}", from_disk.config));

    let refused = |text: &str, bytes: &[u8]| read(text, bytes).unwrap_err().to_string();
    for bytes in [&bytes[..bytes.len() - 1], &bytes[..100], &bytes[..7], &[]] {
        assert!(refused(&text, bytes).starts_with("burn_moe_model.safetensors is not a whole safetensors file"));
    }
    assert!(refused("{}", &bytes).starts_with("burn_moe_config.json: "), "{}", refused("{}", &bytes));
    let zero_heads = text.replacen("\"n_heads\": 2", "\"n_heads\": 0", 1);
    assert!(refused(&zero_heads, &bytes).contains("n_heads"), "{}", refused(&zero_heads, &bytes));
}

#[test]
fn a_balancing_bias_and_narrow_experts_come_back_from_disk() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let router = RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.5)));
    let experts = SparseEncoderConfig::new().with_layer(RoutedLayerConfig::new().with_router(router).into()).with_d_ff(Some(4));
    let sparse_config = config().sparse(SparseClipConfig::new().with_vision(Some(experts)));
    let model = sparse_config.init(&device);
    let routings = model.encode_image(numbers([2, 3, 8, 8], 4, &device)).routings;
    let model = model.update_balancing_bias(&routings, &[]);
    let sparse = ClipCheckpoint { config: sparse_config, model };
    sparse.save_sparse(folder.path(), Precision::F32).unwrap();
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
    assert_eq!(image_embeds(&back, &device), image_embeds(&sparse, &device));
    let FeedForward::Moe(layer) = &back.model.vision.encoder.blocks[1].feed_forward else { panic!("block 1 is sparse") };
    let bias = values(&layer.router.balancing_bias.as_ref().unwrap().val());
    assert!(bias.contains(&0.5) && bias.contains(&-0.5), "{bias:?}");
}

#[test]
fn balancing_goes_on_where_a_checkpoint_was_written() {
    let device = Device::default();
    let balancing =
        BalancingOptions::new(0.5).with_rule(BalancingRule::ZScore).with_momentum(0.75).with_cap(Some(0.25)).with_warmup_steps(700);
    let router = RouterOptions::new().with_balancing(Some(balancing)).with_logit_normalization(Some(2.0));
    let experts = SparseEncoderConfig::new().with_layer(RoutedLayerConfig::new().with_router(router.clone()).into());
    let sparse_config = config().sparse(SparseClipConfig::new().with_text(Some(experts)));
    let router_of = |model: &Clip| match &model.text.encoder.blocks[1].feed_forward {
        FeedForward::Moe(layer) => layer.router.clone(),
        _ => panic!("block 1 is sparse"),
    };
    let state = |router: &Router| {
        let params = [&router.balancing_bias, &router.balancing_momentum, &router.balancing_warmup];
        params.map(|param| values(&param.as_ref().unwrap().val()))
    };
    let mut model = sparse_config.init(&device);
    let FeedForward::Moe(layer) = &mut model.text.encoder.blocks[1].feed_forward else { panic!("block 1 is sparse") };
    for load in [[1, 2, 3, 4, 5, 6, 7, 8], [9, 0, 0, 1, 0, 3, 0, 0], [0; 8]] {
        layer.router = layer.router.clone().update_balancing_bias(&load);
    }
    let written = ClipCheckpoint { config: sparse_config, model };
    let next = |router: Router| router.update_balancing_bias(&[3, 1, 4, 1, 5, 9, 2, 6]);
    for precision in [Precision::F32, Precision::BF16, Precision::F16] {
        let folder = tempfile::tempdir().unwrap();
        written.save_sparse(folder.path(), precision).unwrap();
        let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
        assert_eq!(format!("{}", back.config), format!("{}", written.config));
        let [before, after] = [&written.model, &back.model].map(router_of);
        assert_eq!((&after.balancing, after.logit_normalization), (&router.balancing, Some(2.0)));
        if precision == Precision::F32 {
            assert_eq!(state(&after), state(&before));
            assert_eq!(state(&next(after)), state(&next(before)));
        } else {
            let (before, after) = (state(&next(before)), state(&next(after)));
            assert_eq!(after[2], before[2], "steps of the warm-up are whole");
            for (before, after) in before.into_iter().flatten().zip(after.into_iter().flatten()) {
                assert!((before - after).abs() < 1e-2 * before.abs(), "{before} {after}");
            }
        }
    }
}

#[test]
fn every_kind_of_sparse_block_comes_back_from_disk() {
    let device = Device::default();
    for sparse in [
        SparseEncoderConfig::new()
            .with_form(Some(FeedForwardForm::Gated))
            .with_layer(RoutedLayerConfig::new().with_shared_expert(Some(5)).into())
            .with_padding(Padding::Routed),
        SparseEncoderConfig::new().with_layer(SparseLayer::Soft { slots_per_expert: 3 }),
        // What published language models have.
        SparseEncoderConfig::new().with_form(Some(FeedForwardForm::ClampedGated { limit: 0.3, alpha: 1.702 })).with_layer(
            RoutedLayerConfig::new()
                .with_router(RouterOptions::new().with_bias(true))
                .with_assignment(
                    TokenChoiceConfig::new().with_gate_scale(2.5).with_expert_groups(Some(ExpertGroups::new(4, 2))).into(),
                )
                .with_shared_expert(Some(5))
                .with_shared_expert_gate(true)
                .into(),
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let config = config().sparse(SparseClipConfig::new().with_vision(Some(sparse.clone())).with_text(Some(sparse)));
        let sparse = ClipCheckpoint { model: config.init(&device), config };
        sparse.save_sparse(folder.path(), Precision::F32).unwrap();
        let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
        assert_eq!(image_embeds(&back, &device), image_embeds(&sparse, &device));
        assert_eq!(format!("{}", back.config), format!("{}", sparse.config));
        assert_eq!(back.model.text.encoder.padding, sparse.model.text.encoder.padding);
    }
}

#[test]
fn both_layouts_are_written_back_to_the_bit() {
    let device = Device::default();
    for (name, file) in [("clip-hf-gelu", "model.safetensors"), ("clip-openclip-gelu", "open_clip_model.safetensors")] {
        let source = Path::new(ROOT).join("tests/fixtures").join(name);
        let checkpoint = ClipCheckpoint::load(&source, &device).unwrap();
        let folder = tempfile::tempdir().unwrap();
        match name {
            "clip-hf-gelu" => checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap(),
            _ => checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap(),
        }
        let tensors = |folder: &Path| {
            let bytes = fs::read(folder.join(file)).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let tensors = file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()));
            tensors.collect::<std::collections::BTreeSet<_>>()
        };
        assert!(tensors(&source) == tensors(folder.path()), "{name}");
        let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
        assert_eq!(format!("{}", back.config), format!("{}", checkpoint.config));
    }
}

#[test]
fn half_precisions_come_back_to_the_bit() {
    let device = Device::default();
    for precision in [Precision::F16, Precision::BF16] {
        let [first, second] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        dense(&device).save_hugging_face(first.path(), precision).unwrap();
        let rounded = ClipCheckpoint::load(first.path(), &device).unwrap();
        rounded.save_hugging_face(second.path(), precision).unwrap();
        let bytes = |folder: &tempfile::TempDir| fs::read(folder.path().join("model.safetensors")).unwrap();
        assert!(bytes(&first) == bytes(&second), "{precision:?}");
    }
}

/// The weights of `folder` in two files with an index, as transformers writes large models.
fn shard(folder: &Path) {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (number, parity) in [(1, 0), (2, 1)] {
        let name = format!("model-0000{number}-of-00002.safetensors");
        let mut tensors = file.tensors();
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let own: Vec<_> = tensors.into_iter().enumerate().filter(|(i, _)| i % 2 == parity).map(|(_, tensor)| tensor).collect();
        own.iter().for_each(|(tensor, _)| drop(weight_map.insert(tensor.clone(), name.clone().into())));
        fs::write(folder.join(name), safetensors::serialize(own, None).unwrap()).unwrap();
    }
    let index = serde_json::json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    fs::remove_file(folder.join("model.safetensors")).unwrap();
}

#[test]
fn weights_in_shards_are_read() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let dense = dense(&device);
    dense.save_hugging_face(folder.path(), Precision::F32).unwrap();
    shard(folder.path());
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
    assert_eq!(image_embeds(&back, &device), image_embeds(&dense, &device));

    let index = folder.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let with = |from: &str, to: &str| {
        fs::write(&index, text.replacen(from, to, 1)).unwrap();
        ClipCheckpoint::load(folder.path(), &device).unwrap_err().to_string()
    };
    let shard = "\"model-00001-of-00002.safetensors\"";
    assert!(with(shard, "\"../elsewhere\"").ends_with("`../elsewhere` is no name of a file"));
    assert!(
        with(shard, "\"model-00002-of-00002.safetensors\"").contains("should be in model-00002-of-00002.safetensors, but is not")
    );
    assert!(with(shard, "\"missing.safetensors\"").contains("missing.safetensors: "));
    assert!(with("weight_map", "weights").contains("missing field `weight_map`"));
}

#[test]
fn layouts_share_a_folder_without_harm() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let dense = dense(&device);
    let config = config().sparse(SparseClipConfig::clip_up());
    let sparse = ClipCheckpoint { model: config.init(&device), config };
    sparse.save_sparse(folder.path(), Precision::F32).unwrap();
    dense.save_hugging_face(folder.path(), Precision::F32).unwrap();
    dense.save_open_clip(folder.path(), Precision::F32).unwrap();
    let embeds = |folder: &Path| image_embeds(&ClipCheckpoint::load(folder, &device).unwrap(), &device);
    assert_eq!(embeds(folder.path()), image_embeds(&sparse, &device));
    fs::remove_file(folder.path().join("burn_moe_config.json")).unwrap();
    assert_eq!(embeds(folder.path()), image_embeds(&dense, &device));
    fs::remove_file(folder.path().join("open_clip_config.json")).unwrap();
    assert_eq!(embeds(folder.path()), image_embeds(&dense, &device));
}

#[test]
fn how_images_are_prepared_is_read_and_written() {
    let device = Device::default();
    let plain = ImagePreprocessing::new();
    assert_eq!(plain.mean[0], 0.481_454_66);
    let own = ImagePreprocessing {
        mean: [0.5, 0.25, 0.125],
        std: [0.5, 0.5, 0.75],
        resize_mode: ResizeMode::Squash,
        interpolation: Interpolation::Bilinear,
        resize_to: None,
    };
    let mut checkpoint = dense(&device);
    for preprocessing in [plain, own] {
        checkpoint.config.vision.preprocessing = preprocessing;
        for layout in ["open_clip", "Hugging Face", "sparse"] {
            let folder = tempfile::tempdir().unwrap();
            match layout {
                "open_clip" => checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap(),
                "sparse" => checkpoint.save_sparse(folder.path(), Precision::F32).unwrap(),
                _ => checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap(),
            }
            assert_eq!(ClipCheckpoint::read_config(folder.path()).unwrap().vision.preprocessing, preprocessing);
        }
    }
}

#[test]
fn images_as_others_prepare_them_are_read_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let read = |name: &str, text: String| {
        fs::write(folder.path().join(name), text).unwrap();
        ClipCheckpoint::read_config(folder.path()).map(|config| config.vision.preprocessing).map_err(|error| error.to_string())
    };
    fs::write(folder.path().join("config.json"), r#"{"vision_config": {"image_size": 224}, "text_config": {}}"#).unwrap();
    let plain = ImagePreprocessing::new();
    let half = plain.with_mean([0.5; 3]).with_std([0.5; 3]);
    // As OpenAI's files have it, as newer ones do, and the one that a processor of both texts and images writes.
    let hugging_face = |fields: &str| read("preprocessor_config.json", format!("{{{fields}}}"));
    assert_eq!(
        hugging_face(
            r#""crop_size": 224, "do_center_crop": true, "resample": 3, "size": 224, "feature_extractor_type": "CLIPFeatureExtractor""#
        ),
        Ok(plain)
    );
    assert_eq!(
        hugging_face(
            r#""image_mean": 0.5, "image_std": [0.5, 0.5, 0.5], "size": {"shortest_edge": 224}, "data_format": "channels_first""#
        ),
        Ok(half)
    );
    let squash = plain.with_resize_mode(ResizeMode::Squash).with_interpolation(Interpolation::Bilinear);
    assert_eq!(hugging_face(r#""size": {"height": 224, "width": 224}, "do_center_crop": false, "resample": 2"#), Ok(squash));
    assert_eq!(hugging_face(r#""do_normalize": false"#), Ok(plain.with_mean([0.0; 3]).with_std([1.0; 3])));
    for (fields, named) in [
        (r#""size": 200"#, "`size` = 200 with a crop of 224"),
        (r#""size": {"height": 224, "width": 448}"#, "`size` = 224 x 448"),
        (r#""crop_size": {"height": 200, "width": 200}"#, "`crop_size` = 200 with an image size of 224"),
        (r#""do_center_crop": false"#, "`do_center_crop` = false"),
        (r#""do_resize": false"#, "`do_resize` = false"),
        (r#""do_rescale": false"#, "`do_rescale` = false"),
        (r#""rescale_factor": 0.5"#, "`rescale_factor` = 0.5"),
        (r#""resample": 1"#, "`resample` = 1"),
        (r#""image_processor_type": "SiglipImageProcessor""#, "`image_processor_type` = SiglipImageProcessor"),
        (r#""image_std": [0.5, 0.0, 0.5]"#, "`std` is 0: must be finite and above 0"),
        (r#""image_mean": [0.5]"#, "`processor.image_mean` = [0.5]: expected a number, or one for each of three channels"),
    ] {
        let error = hugging_face(fields).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
    fs::remove_file(folder.path().join("preprocessor_config.json")).unwrap();
    assert_eq!(read("processor_config.json", r#"{"image_processor": {"image_mean": 0.5, "image_std": 0.5}}"#.into()), Ok(half));

    let model = r#""embed_dim": 8, "vision_cfg": {"layers": 1, "width": 64, "patch_size": 16, "image_size": 224}, "text_cfg": {"width": 64, "heads": 1, "layers": 1}"#;
    let open_clip =
        |fields: &str| read("open_clip_config.json", format!(r#"{{"model_cfg": {{{model}}}, "preprocess_cfg": {{{fields}}}}}"#));
    fs::remove_file(folder.path().join("config.json")).unwrap();
    assert_eq!(open_clip(r#""mean": [0.5, 0.5, 0.5], "std": 0.5, "size": 512, "fill_color": 0"#), Ok(half));
    assert_eq!(open_clip(r#""interpolation": "bilinear", "resize_mode": "squash", "mode": "RGB""#), Ok(squash));
    assert_eq!(open_clip(r#""interpolation": "random", "resize_mode": null"#), Ok(plain));
    for (fields, named) in [
        (r#""resize_mode": "longest""#, "`preprocess_cfg.resize_mode` = longest is not supported"),
        (r#""interpolation": "nearest""#, "`preprocess_cfg.interpolation` = nearest"),
        (r#""mode": "L""#, "`preprocess_cfg.mode` = L"),
    ] {
        let error = open_clip(fields).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}

#[test]
#[should_panic(expected = "does not have the shape [10] of its configuration")]
fn a_configuration_of_another_model_is_not_written() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let mut other = config();
    other.text.projection_bias = true;
    other.embed_dim = 12;
    let model = other.init(&device);
    let mut config = config();
    config.text.projection_bias = true;
    let _ = ClipCheckpoint { config, model }.save_open_clip(folder.path(), Precision::F32);
}

#[test]
fn a_projection_with_a_bias_comes_back() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config.text.projection_bias = true;
    let checkpoint = ClipCheckpoint { model: config.init(&device), config };
    checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap();
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
    let bias = |checkpoint: &ClipCheckpoint| values(&checkpoint.model.text.projection.bias.as_ref().unwrap().val());
    assert_eq!(bias(&back), bias(&checkpoint));
    assert_eq!(checkpoint.model.num_params() as u64, checkpoint.config.cost().params_total);
    let error = checkpoint.save_hugging_face(folder.path(), Precision::F32).unwrap_err().to_string();
    assert_eq!(error, "Hugging Face's format has no place for a bias of the text projection");
}

#[test]
fn a_sparse_model_is_a_burn_record_too() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.bpk");
    let sparse = || config().sparse(SparseClipConfig::clip_up()).init(&device);
    let model = sparse();
    model.clone().save_file(&path).unwrap();
    let back = sparse().try_load_file(&path).unwrap();
    let embed = |model: &burn_moe::clip::Clip| values(&model.encode_image(numbers([2, 3, 8, 8], 4, &device)).embedding);
    assert_eq!(embed(&back), embed(&model));
}

/// Files that were made to do harm: each is an error that names the file, and none takes memory for what it claims.
#[test]
fn hostile_weights_are_refused() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    dense(&device).save_hugging_face(folder.path(), Precision::F32).unwrap();
    let path = folder.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let (header, data) = (String::from_utf8(whole[8..8 + length].to_vec()).unwrap(), &whole[8 + length..]);
    let load = |bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        ClipCheckpoint::load(folder.path(), &device).map(|_| ()).unwrap_err()
    };
    let with_header = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    let first = |from: &str, to: &str| {
        assert!(header.contains(from), "{from}");
        with_header(&header.replacen(from, to, 1))
    };
    let offsets = "\"data_offsets\":[0,";
    for (what, bytes) in [
        ("a length beyond the file", [&u64::MAX.to_le_bytes()[..], &whole[8..]].concat()),
        ("a length of nearly everything", [&(whole.len() as u64 - 8).to_le_bytes()[..], &whole[8..]].concat()),
        ("a length of zero", [&0u64.to_le_bytes()[..], &whole[8..]].concat()),
        ("tensors that overlap", first(offsets, "\"data_offsets\":[4,")),
        ("an offset beyond the file", first(offsets, "\"data_offsets\":[99999999999,")),
        ("a shape without an end", first("\"shape\":[", "\"shape\":[18446744073709551615,18446744073709551615,")),
        ("a shape of more than there is", first("\"shape\":[", "\"shape\":[1000000,1000000,")),
        ("a header that is no JSON", with_header("{{{{")),
        ("a header that is no text", [&4u64.to_le_bytes()[..], &[0xff, 0xfe, 0xfd, 0xfc], data].concat()),
        ("no tensors", with_header("{}")),
        ("bytes behind the end", [&whole[..], &[0; 5]].concat()),
    ] {
        assert!(matches!(load(bytes), CheckpointError::Safetensors { .. }), "{what}");
    }
    let integers = first("\"F32\"", "\"I32\"");
    assert!(load(integers).to_string().contains("has dtype I32"));
    let name = header.split('"').find(|name| name.ends_with(".weight")).unwrap();
    let twice = header.replacen('{', &format!("{{\"{name}\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}},"), 1);
    assert!(matches!(load(with_header(&twice)), CheckpointError::Duplicate { tensor, .. } if tensor == name));
    // Any byte of the header, changed: an error or a model, and no panic.
    for at in (0..length).step_by(7) {
        let mut bytes = whole.clone();
        bytes[8 + at] ^= 0x15;
        fs::write(&path, bytes).unwrap();
        let _ = ClipCheckpoint::load(folder.path(), &device);
    }
}

/// The file of version 7 that says what this one says, as far as version 7 could.
fn as_version_7(file: &mut serde_json::Value) {
    file["version"] = 7.into();
    for tower in ["vision", "text"] {
        // Since version 9.
        let mut remove = |path: &str, fields: &[&str]| {
            let Some(object) = file["clip"][tower].pointer_mut(path).and_then(|object| object.as_object_mut()) else { return };
            fields.iter().for_each(|field| drop(object.remove(*field).unwrap()));
        };
        match tower {
            "vision" => remove("", &["class_token", "position_table", "norm_pre", "norm_post", "pooling"]),
            _ => remove("", &["norm_final"]),
        }
        remove("/encoder", &["form", "rotary"]);
        remove("/encoder/sparse", &["bias"]);
        let Some(router) = file["clip"][tower].pointer_mut("/encoder/sparse/layer/Routed/router") else { continue };
        let router = router.as_object_mut().unwrap();
        router.remove("logit_normalization").unwrap();
        let balancing = router.remove("balancing").unwrap();
        router.insert("balancing_rate".into(), balancing.get("rate").cloned().unwrap_or_default());
    }
}

/// The file of version 4 that says what this one says, as far as version 4 could.
fn as_version_4(file: &mut serde_json::Value) {
    as_version_7(file);
    file["version"] = 4.into();
    for tower in ["vision", "text"] {
        let Some(blocks) = file["clip"][tower]["encoder"]["sparse"].as_object_mut() else { continue };
        let defaults = serde_json::to_value(RoutedLayerConfig::new()).unwrap();
        let mut routed = match blocks["layer"].get_mut("Routed").map(serde_json::Value::take) {
            Some(routed) => {
                blocks.insert("layer".into(), "Routed".into());
                routed
            }
            None => defaults,
        };
        let rate = routed["router"].as_object_mut().unwrap().remove("balancing_rate").unwrap_or_default();
        routed["router"]["balancing_bias"] =
            if rate.is_null() { "None".into() } else { serde_json::json!({ "Sign": { "rate": rate } }) };
        blocks.append(routed.as_object_mut().unwrap());
    }
}

#[test]
fn sparse_checkpoints_of_older_versions_are_read() {
    let device = Device::default();
    let router = RouterOptions::new().with_balancing(Some(BalancingOptions::new(0.25)));
    let sparse = SparseEncoderConfig::new();
    for (layer, version) in [
        (RoutedLayerConfig::new().into(), 2),
        (RoutedLayerConfig::new().into(), 4),
        (RoutedLayerConfig::new().with_router(router.clone()).with_shared_expert(Some(5)).into(), 4),
        (SparseLayer::Soft { slots_per_expert: 2 }, 4),
        (RoutedLayerConfig::new().into(), 7),
        (RoutedLayerConfig::new().with_router(router.clone()).into(), 7),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let sparse = sparse.clone().with_form(Some(FeedForwardForm::Plain)).with_layer(layer);
        let config = config().sparse(SparseClipConfig::new().with_vision(Some(sparse.clone())).with_text(Some(sparse)));
        let written = ClipCheckpoint { model: config.init(&device), config };
        written.save_sparse(folder.path(), Precision::F32).unwrap();
        let path = folder.path().join("burn_moe_config.json");
        let mut file: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        if version == 7 {
            as_version_7(&mut file)
        } else {
            as_version_4(&mut file)
        }
        if version == 2 {
            file["version"] = 2.into();
            // Its weights had the name that Hugging Face's have.
            fs::rename(folder.path().join("burn_moe_model.safetensors"), folder.path().join("model.safetensors")).unwrap();
            for tower in ["vision", "text"] {
                let blocks = file["clip"][tower]["encoder"]["sparse"].as_object_mut().unwrap();
                for field in ["layer", "form", "shared_expert", "padding"] {
                    blocks.remove(field).unwrap();
                }
                file["clip"][tower].as_object_mut().unwrap().remove("projection_bias");
            }
            file["clip"]["vision"].as_object_mut().unwrap().remove("preprocessing").unwrap();
        }
        fs::write(&path, file.to_string()).unwrap();
        let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
        assert_eq!(image_embeds(&back, &device), image_embeds(&written, &device));
        assert_eq!(format!("{}", back.config), format!("{}", written.config));
    }
}

#[test]
fn half_precision_rounds_and_no_more() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let dense = dense(&device);
    dense.save_open_clip(folder.path(), Precision::F16).unwrap();
    let back = ClipCheckpoint::load(folder.path(), &device).unwrap();
    let weight = |c: &ClipCheckpoint| values(&c.model.text.token_embedding.weight.val());
    for (a, b) in weight(&dense).into_iter().zip(weight(&back)) {
        assert!((a - b).abs() <= a.abs() / 1024.0 + 1e-7);
    }
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let load = || ClipCheckpoint::load(folder.path(), &device).unwrap_err();
    assert!(load().to_string().contains("holds no checkpoint: expected `config.json` (Hugging Face)"));

    dense(&device).save_open_clip(folder.path(), Precision::F32).unwrap();
    let weights = folder.path().join("open_clip_model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for length in [7, 8, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        assert!(matches!(load(), CheckpointError::Safetensors { .. }), "cut to {length} bytes");
    }
    fs::write(&weights, "").unwrap();
    assert!(matches!(load(), CheckpointError::NotWeights { .. }));
    fs::remove_file(&weights).unwrap();
    assert!(matches!(load(), CheckpointError::NoWeights { .. }));

    fs::write(&weights, &whole).unwrap();
    let config_path = folder.path().join("open_clip_config.json");
    let text = fs::read_to_string(&config_path).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from));
        fs::write(&config_path, text.replacen(from, to, 1)).unwrap();
        load().to_string()
    };
    assert!(with("\"embed_dim\": 10", "\"embed_dim\": 12").contains("`visual.proj` should be [8, 12], but is [8, 10]"));
    assert!(with("\"layers\": 2", "\"layers\": 3").contains("missing tensors: 12 (`transformer.resblocks.2.attn.in_proj_bias`, "));
    assert!(with("\"layers\": 2", "\"layers\": 1").contains("unexpected tensors: 12 (`transformer.resblocks.1."));
    assert!(with("\"layers\": 2", "\"layers\": 99").contains("the configuration names 101 blocks, and there are "));
    assert!(with("\"layers\": 2", "\"layers\": 4000000000").contains("layers of 4000000000: at most 1048576 is possible"));
    assert!(with("\"width\": 8", "\"width\": 18446744073709551615").contains("at most 1048576 is possible"));
    assert!(with("\"heads\": 2", "\"heads\": 0").contains("`n_heads` must be at least 1, got 0"));
    assert!(with("\"heads\": 2", "\"heads\": 3").contains("`n_heads` (3) must divide `d_model` (8)"));
    assert!(
        with("\"quick_gelu\": false", "\"timm_model_name\": \"x\"")
            .contains("`model_cfg.timm_model_name` = \"x\" is not supported")
    );
    assert!(with("{", "[").contains("not the JSON that was expected"));
}

#[test]
fn weights_that_are_not_finite_are_neither_written_nor_read() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let mut checkpoint = dense(&device);
    checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap();
    let weights = folder.path().join("open_clip_model.safetensors");
    let good = fs::read(&weights).unwrap();

    let scale = |value: f32| Tensor::full([1], value, &device);
    checkpoint.model.logit_scale = checkpoint.model.logit_scale.map(|_| scale(1e6));
    let error = checkpoint.save_open_clip(folder.path(), Precision::F16).unwrap_err().to_string();
    assert!(error.starts_with("`logit_scale` holds 1 values that cannot be written"), "{error}");
    assert_eq!(fs::read(&weights).unwrap(), good, "the old file is as it was");

    // 1e6 as f32 stands in the file once; NaN takes its place.
    checkpoint.save_open_clip(folder.path(), Precision::F32).unwrap();
    let mut bytes = fs::read(&weights).unwrap();
    let at = bytes.windows(4).position(|b| b == 1e6f32.to_le_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let error = ClipCheckpoint::load(folder.path(), &device).unwrap_err().to_string();
    assert!(error.ends_with("`logit_scale` holds 1 values that are not finite, of 1"), "{error}");
}

#[test]
fn hugging_faces_settings_are_checked() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(ROOT).join("tests/fixtures/clip-hf-gelu");
    fs::copy(source.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let text = fs::read_to_string(source.join("config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from));
        fs::write(folder.path().join("config.json"), text.replace(from, to)).unwrap();
        ClipCheckpoint::load(folder.path(), &device).unwrap_err().to_string()
    };
    assert!(with("\"gelu\"", "\"mish\"").contains("`vision_config.hidden_act` = \"mish\" is not supported"));
    assert!(with("\"text_config\"", "\"txt_config\"").contains("`text_config` is missing"));
    assert!(with("\"patch_size\": 8", "\"patch_size\": 5").contains("`patch_size` (5) must divide `image_size` (32)"));
}

#[test]
fn a_version_of_the_future_says_so() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("burn_moe_config.json"), r#"{"version": 99, "clip": {}}"#).unwrap();
    let error = ClipCheckpoint::load(folder.path(), &Device::default()).unwrap_err().to_string();
    assert!(error.contains("version 99 was written by another burn-moe; this one reads 2 to 9"), "{error}");
}

#[test]
fn the_logit_scale_is_brought_back_to_a_hundred() {
    for device in [Device::default(), Device::default().autodiff()] {
        let mut model = config().init(&device);
        model.logit_scale = model.logit_scale.map(|_| Tensor::full([1], 9.0, &device));
        let model = model.clamp_logit_scale();
        assert!((f64::from(model.logit_scale.val().into_scalar::<f32>()) - MAX_LOGIT_SCALE).abs() < 1e-6);
        assert!((model.scale().into_scalar::<f32>() - 100.0).abs() < 1e-3);
        assert_eq!(model.valid().scale().dims(), [1]);
    }
}
