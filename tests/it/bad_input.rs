//! Bad data gets an error that names it.

use std::fs;

use burn::tensor::{Device, Tensor};
use burn_moe::{
    clip::{
        Clip, ClipAuxiliaryLossConfig, ClipConfig, EndOfText, TextConfig, VisionConfig,
        lists::{CaptionedImages, ListOptions},
        preprocess::ImagePreprocessor,
        tokenizer::ClipTokenizer,
    },
    finite::{check_finite, check_finite_module},
    train::{
        Arm, OptimizerConfig, TrainConfig, TrainData, TrainError, TrainInput, WarmupCosine,
        data::{BatchConfig, Batches, Caption, Concept, EmojiPack, EmojiVendor, ImageTextSet, Language, load_images},
        evaluate,
        ranks::Solo,
        train,
    },
    transformer::EncoderConfig,
};

use super::support::ROOT;

fn folder_with(name: &str, list: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    image::RgbImage::from_pixel(20, 10, image::Rgb([255, 0, 0])).save(folder.path().join("red.png")).unwrap();
    image::RgbaImage::from_pixel(9, 9, image::Rgba([0, 0, 255, 255])).save(folder.path().join("blue.png")).unwrap();
    fs::write(folder.path().join("no.png"), "I am no picture").unwrap();
    fs::write(folder.path().join(name), list).unwrap();
    folder
}

fn load(name: &str, list: &str) -> Result<(ImageTextSet, Vec<String>), String> {
    let folder = folder_with(name, list);
    let short = |error: &dyn std::error::Error| error.to_string().replace(&format!("{}/", folder.path().display()), "");
    let list = CaptionedImages::read(folder.path().join(name), &ListOptions::default()).map_err(|error| short(&error))?;
    let loaded = load_images(list, folder.path(), &ImagePreprocessor::new(8), |_| ()).map_err(|error| short(&error))?;
    Ok((loaded.set, loaded.skipped.iter().map(|error| short(error)).collect()))
}

#[test]
fn a_users_list_is_read_from_csv_and_json_lines() {
    let csv = load("list.csv", "path,caption\nred.png,a red thing\nblue.png,\"blue, square\"\nred.png,red again\n").unwrap();
    let lines = "{\"path\": \"red.png\", \"caption\": \"a red thing\"}\n\n{\"path\": \"blue.png\", \"caption\": \"blue, square\"}\n{\"path\": \"red.png\", \"caption\": \"red again\"}\n";
    let jsonl = load("list.jsonl", lines).unwrap();
    for (set, skipped) in [csv, jsonl] {
        assert_eq!((set.len(), set.image_size(), skipped), (2, 8, vec![]));
        assert_eq!(set.concepts()[0].captions, ["a red thing", "red again"].map(Caption::new));
        assert_eq!(set.concepts()[1].captions, [Caption::new("blue, square")]);
        assert_eq!((&set.image(0)[..3], &set.image(1)[..3]), (&[255u8, 0, 0][..], &[0u8, 0, 255][..]));
    }
}

#[test]
fn images_that_cannot_be_read_are_skipped_and_named() {
    let (set, skipped) = load("list.csv", "path,caption\nno.png,no\nred.png,red\ngone.png,gone\nblue.png,blue\n").unwrap();
    assert_eq!(
        (set.len(), set.concepts()[0].captions[0].text.as_str(), set.concepts()[1].captions[0].text.as_str()),
        (2, "red", "blue")
    );
    assert!(skipped[0].starts_with("no.png is no readable image: ") && skipped[1].starts_with("gone.png: "), "{skipped:?}");
}

#[test]
fn what_is_wrong_in_a_users_list_is_named() {
    let error = |name, list| load(name, list).unwrap_err();
    assert_eq!(error("list.csv", "path,caption\nred.png,red\nblue.png,  \n"), "list.csv: line 3: no caption");
    let text = error("list.csv", "path,caption\nred.png\nred.png\nred.png\nred.png\nred.png\n");
    let line = |line: usize| format!("line {line}: 1 columns, but the first line has 2");
    assert_eq!(text, format!("list.csv: {}; {}; {}; and 2 more", line(2), line(3), line(4)));
    assert!(error("list.csv", "path,caption\nno.png,no\n").starts_with("no.png is no readable image: "));
    assert!(error("list.csv", "path,caption\nmissing.png,x\n").starts_with("missing.png: "));
    let text = error("list.csv", "photo,words\nred.png,x\n");
    assert!(
        text.starts_with("list.csv: the columns of its first line are `photo`, `words`; expected one of path, filepath"),
        "{text}"
    );
    let text = error("list.jsonl", "{\"path\": \"red.png\"}\n");
    assert!(text.starts_with("list.jsonl: line 1: its fields are `path`; expected one of path,"), "{text}");
    assert!(CaptionedImages::read("nowhere.csv", &ListOptions::default()).unwrap_err().to_string().starts_with("nowhere.csv: "));
}

#[test]
fn a_missing_or_damaged_pack_is_named() {
    let folder = tempfile::tempdir().unwrap();
    assert!(EmojiPack::open(folder.path()).unwrap_err().to_string().contains("take it from the repository's `data/emoji`"));
    fs::write(folder.path().join("captions.jsonl"), "{}\n").unwrap();
    assert!(EmojiPack::open(folder.path()).unwrap_err().to_string().contains("captions.jsonl, line 1: missing field `hexcode`"));

    for name in ["captions.jsonl", "captions-multilingual.jsonl"] {
        fs::copy(format!("{ROOT}/data/emoji/{name}"), folder.path().join(name)).unwrap();
    }
    let others = folder.path().join("captions-multilingual.jsonl");
    let text = fs::read_to_string(&others).unwrap();
    fs::write(&others, text.split_once('\n').unwrap().1).unwrap();
    let error = EmojiPack::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("captions-multilingual.jsonl, line 1: expected the captions of 1F600, found those of "), "{error}");
    fs::write(&others, text).unwrap();
    let pack = EmojiPack::open(folder.path()).unwrap();
    let error = || pack.load(&[EmojiVendor::Noto], &[Language::En], true).unwrap_err().to_string();
    assert!(error().contains("noto.png is no readable image"));
    let sheet = fs::read(format!("{ROOT}/data/emoji/noto.png")).unwrap();
    fs::write(folder.path().join("noto.png"), &sheet[..sheet.len() / 2]).unwrap();
    assert!(error().contains("noto.png is no readable image"));
    image::RgbImage::new(64, 32).save(folder.path().join("noto.png")).unwrap();
    assert!(error().contains("is outside its 2 tiles"));
}

fn tiny_set(concepts: usize) -> ImageTextSet {
    let concept = |i| Concept { captions: vec![Caption::new(format!("number {i}"))] };
    ImageTextSet::new(8, vec![99; concepts * 192], (0..concepts).collect(), (0..concepts).map(concept).collect())
}

fn clip(device: &Device) -> Clip {
    let encoder = || EncoderConfig::new(8, 2, 1, 16);
    let text = TextConfig::new(encoder()).with_context_length(8);
    ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 8).init(device)
}

#[test]
fn batches_need_enough_concepts_and_possible_settings() {
    let error = |config: BatchConfig| Batches::new(&tiny_set(5), config, 0, 0).unwrap_err().to_string();
    let six = BatchConfig::new().with_batch_size(6);
    assert!(error(six).starts_with("a batch of 6 needs as many concepts, because none may stand in it twice; the data has 5"));
    let four = BatchConfig::new().with_batch_size(4);
    assert!(error(four.with_tag_probability(1.5)).starts_with("`tag_probability` is 1.5"));
    assert!(error(four.with_context_length(2)).starts_with("`context_length` is 2"));
    assert!(error(four.with_vocab_size(100)).starts_with("`vocab_size` is 100"));
    assert!(error(four.with_augment(four.augment.with_scale(f32::NAN))).starts_with("`scale` is NaN"));
}

#[test]
fn long_captions_are_cut_and_counted() {
    let mut concepts = tiny_set(2).concepts().to_vec();
    concepts[1].captions[0].text = "one two three four five six seven eight nine".into();
    let set = ImageTextSet::new(8, vec![99; 2 * 192], vec![0, 1], concepts);
    let device = Device::default();
    let evaluation = evaluate(&clip(&device), &set, &ClipTokenizer::new(), 8, None, &device).unwrap();
    assert_eq!(evaluation.truncated, 1);
}

#[test]
fn a_number_that_is_none_stops_a_run_and_is_named() {
    let device = Device::default();
    let mut model = clip(&device);
    let arm = |model| Arm {
        name: "mine".into(),
        model,
        optimizer: OptimizerConfig::new(WarmupCosine::new(1e-3)),
        auxiliary: ClipAuxiliaryLossConfig::new(),
        state: None,
        frozen: None,
    };
    let config = TrainConfig::new(2);
    let batch = BatchConfig::new().with_batch_size(4).with_context_length(8);
    let run = |arm| {
        train(TrainInput {
            arms: vec![arm],
            data: TrainData::Set { set: &tiny_set(4), batch },
            test: Some(&tiny_set(4)),
            config: &config,
            checkpointing: None,
            ranks: &Solo,
            device: &device,
            observer: &mut (),
        })
        .unwrap_err()
    };

    let mut wild = arm(model.clone());
    wild.optimizer.schedule = WarmupCosine::new(1e38).with_warmup_steps(1);
    let error = run(wild);
    assert!(matches!(&error, TrainError::NonFinite { arm, .. } if arm == "mine"), "{error}");

    let query = &mut model.vision.encoder.blocks[0].attention.query;
    query.weight = query.weight.clone().map(|w| Tensor::full(w.dims(), f32::INFINITY, &device));
    let path = "vision.encoder.blocks.0.attention.query.weight";
    let found = check_finite_module(&model).unwrap_err();
    assert_eq!((found.tensor.as_str(), found.count, found.total), (path, 64, 64));
    assert!(run(arm(model.clone())).to_string().starts_with(&format!("mine, step 0: `{path}` holds 64 values")));

    let mut fixed = clip(&device);
    fixed.text.end_of_text = EndOfText::Id(7);
    assert_eq!(run(arm(fixed)).to_string(), "mine: `end of text` should be the highest id or id 49407, but is id 7");
    let encoder = || EncoderConfig::new(8, 2, 1, 16);
    let text = TextConfig::new(encoder()).with_context_length(8).with_vocab_size(100);
    let foreign = ClipConfig::new(VisionConfig::new(encoder(), 8, 4), text, 8).init(&device);
    assert_eq!(run(arm(foreign)).to_string(), "mine: `vocabulary` should be 49408, but is 100");
    let large = VisionConfig::new(encoder(), 16, 4);
    let large = ClipConfig::new(large, TextConfig::new(encoder()).with_context_length(8), 8).init(&device);
    assert_eq!(run(arm(large)).to_string(), "mine: `pixel values` should be 192, but is 768");
    assert!(check_finite("x", &Tensor::<1>::from_data([1.0, f32::NAN], &device)).is_err());
}
