//! Files that PyTorch, open_clip, transformers and Pillow wrote (`tools/fixtures/published.py`), read as they read them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_moe::{
    UpcycleFromDense, UpcycleOptions,
    clip::{
        ImageEmbedder, ImagePreprocessing, ResizeMode, TextEmbedder,
        checkpoint::{ClipCheckpoint, Precision, TextCheckpoint, Towers, VisionCheckpoint, towers_in},
        lists::lines_in,
        normalize,
        preprocess::ImagePreprocessor,
    },
    transformer::SparseEncoderConfig,
    upcycle::Probe,
};
use safetensors::SafeTensors;

use super::support::{ROOT, largest_difference, values};

fn data(name: &str) -> PathBuf {
    Path::new(ROOT).join("tests/data/published").join(name)
}

fn floats(file: &SafeTensors, name: &str) -> (Vec<f32>, Vec<usize>) {
    let view = file.tensor(name).unwrap();
    (view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(), view.shape().to_vec())
}

/// The inputs and embeddings of a folder's `expected.safetensors`.
struct Expected {
    images: Tensor<4>,
    texts: Tensor<2, Int>,
    image_embeds: Vec<f32>,
    text_embeds: Vec<f32>,
}

impl Expected {
    fn of(folder: &str, device: &Device) -> Self {
        let bytes = fs::read(data(folder).join("expected.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |name: &str| {
            let (values, shape) = floats(&file, name);
            TensorData::new(values, shape)
        };
        Self {
            images: Tensor::from_data(tensor("images"), device),
            texts: Tensor::<2>::from_data(tensor("texts"), device).int(),
            image_embeds: floats(&file, "image_embeds").0,
            text_embeds: floats(&file, "text_embeds").0,
        }
    }

    fn check(&self, folder: &Path, within: f32, device: &Device) {
        let model = ClipCheckpoint::load(folder, device).unwrap_or_else(|error| panic!("{error}")).model;
        let image = values(&model.encode_image(self.images.clone()).embedding);
        let text = values(&model.encode_text(self.texts.clone()).embedding);
        assert!(largest_difference(&image, &self.image_embeds) < within, "{}", folder.display());
        assert!(largest_difference(&text, &self.text_embeds) < within, "{}", folder.display());
    }
}

/// A folder with these files of `data`, under other names.
fn with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (from, to) in files {
        fs::copy(data(from), folder.path().join(to)).unwrap();
    }
    folder
}

fn open_clip_with(weights: &str, name: &str) -> tempfile::TempDir {
    with(&[("open_clip/open_clip_config.json", "open_clip_config.json"), (weights, name)])
}

#[test]
fn pickled_weights_are_those_of_the_safetensors_file() {
    let device = Device::default();
    let expected = Expected::of("open_clip", &device);
    for (weights, name, within) in [
        ("open_clip/open_clip_model.safetensors", "open_clip_model.safetensors", 1e-5),
        ("open_clip/plain.bin", "open_clip_pytorch_model.bin", 1e-5),
        ("open_clip/plain.bin", "open_clip_pytorch_model.pt", 1e-5),
        // The content tells the kind, not the name.
        ("open_clip/plain.bin", "open_clip_model.safetensors", 1e-5),
        ("open_clip/training.pt", "open_clip_pytorch_model.bin", 1e-5),
        // Some names behind a wrapper's prefix.
        ("open_clip/prefixed.bin", "open_clip_pytorch_model.bin", 1e-5),
        ("open_clip/views.bin", "open_clip_pytorch_model.bin", 1e-5),
        ("open_clip/half.bin", "open_clip_pytorch_model.bin", 2e-2),
    ] {
        expected.check(open_clip_with(weights, name).path(), within, &device);
    }
    let expected = Expected::of("hugging_face", &device);
    let config = ("hugging_face/config.json", "config.json");
    expected.check(with(&[config, ("hugging_face/pytorch_model.bin", "pytorch_model.bin")]).path(), 1e-5, &device);
    let [first, second] = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"];
    let shards = with(&[
        config,
        (&format!("hugging_face/{first}"), first),
        (&format!("hugging_face/{second}"), second),
        ("hugging_face/pytorch_model.bin.index.json.txt", "pytorch_model.bin.index.json"),
    ]);
    expected.check(shards.path(), 1e-5, &device);
}

#[test]
fn no_code_of_a_pickle_runs_and_what_cannot_be_read_says_what_to_do() {
    let error = |weights: &str| {
        let folder = open_clip_with(weights, "open_clip_pytorch_model.bin");
        ClipCheckpoint::load(folder.path(), &Device::default()).unwrap_err().to_string()
    };
    // Its weights are read, and what would call a function is not.
    let evil = open_clip_with("open_clip/evil.bin", "open_clip_pytorch_model.bin");
    Expected::of("open_clip", &Device::default()).check(evil.path(), 1e-5, &Device::default());
    let text = error("open_clip/legacy.bin");
    assert!(text.contains("written by PyTorch before 1.6") && text.contains("\"open_clip_model.safetensors\""), "{text}");
    let text = error("open_clip/repeated.bin");
    assert!(text.contains("its tensors have 16") && text.contains("bytes, but the file has 3"), "{text}");

    let folder = open_clip_with("open_clip/plain.bin", "open_clip_pytorch_model.bin");
    let path = folder.path().join("open_clip_pytorch_model.bin");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let text = ClipCheckpoint::load(folder.path(), &Device::default()).unwrap_err().to_string();
    assert!(text.contains("these pickled weights cannot be read"), "{text}");
    // A weight that was changed on its way.
    let mut damaged = bytes;
    let middle = damaged.len() / 2;
    damaged[middle..middle + 8].iter_mut().for_each(|byte| *byte ^= 0x55);
    fs::write(&path, &damaged).unwrap();
    assert!(ClipCheckpoint::load(folder.path(), &Device::default()).is_err());
}

#[test]
fn a_tower_alone_loads_embeds_upcycles_and_is_written_again() {
    let device = Device::default();
    let expected = Expected::of("hugging_face", &device);
    let (vision, text) = (data("hugging_face_vision"), data("hugging_face_text"));
    assert_eq!((towers_in(&vision).unwrap(), towers_in(&text).unwrap()), (Towers::Vision, Towers::Text));
    let image = |checkpoint: &VisionCheckpoint| values(&checkpoint.model.forward(expected.images.clone()).embedding);
    let words = |checkpoint: &TextCheckpoint| values(&checkpoint.model.forward(expected.texts.clone()).embedding);
    let dense = VisionCheckpoint::load(&vision, None, &device).unwrap();
    assert!(largest_difference(&image(&dense), &expected.image_embeds) < 1e-5);
    let dense_text = TextCheckpoint::load(&text, &device).unwrap();
    assert!(largest_difference(&words(&dense_text), &expected.text_embeds) < 1e-5);
    // A tower of a whole checkpoint.
    let whole = with(&[("hugging_face/config.json", "config.json"), ("hugging_face/pytorch_model.bin", "pytorch_model.bin")]);
    let of_whole = VisionCheckpoint::load(whole.path(), None, &device).unwrap();
    assert!(largest_difference(&image(&of_whole), &expected.image_embeds) < 1e-5);
    // What is not there is said.
    let error = TextCheckpoint::load(&vision, &device).unwrap_err().to_string();
    assert!(error.ends_with("holds a vision tower alone, but a text tower is asked for"), "{error}");
    let error = ClipCheckpoint::load(&text, &device).unwrap_err().to_string();
    assert!(error.ends_with("holds a text tower alone, but two towers are asked for"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let mut config = dense.config.clone();
    config.encoder.sparse = Some(SparseEncoderConfig::new());
    let options = UpcycleOptions::default().with_probe(Probe::Images(expected.images.clone()));
    let upcycled = config.init(dense.embed_dim, &device).upcycle_from_dense(&dense.model, &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5);
    assert_eq!(
        upcycled.report.layers.iter().map(|layer| layer.path.as_str()).collect::<Vec<_>>(),
        ["encoder.blocks.1.feed_forward"]
    );
    let sparse = VisionCheckpoint { config, embed_dim: dense.embed_dim, model: upcycled.model };
    sparse.save_sparse(folder.path().join("vision"), Precision::F32).unwrap();
    let back = VisionCheckpoint::load(folder.path().join("vision"), None, &device).unwrap();
    assert_eq!(image(&back), image(&sparse));
    assert!(largest_difference(&image(&back), &expected.image_embeds) < 1e-5);

    let mut config = dense_text.config.clone();
    config.encoder.sparse = Some(SparseEncoderConfig::new());
    let options = UpcycleOptions::default().with_probe(Probe::Texts(expected.texts.clone()));
    let upcycled = config.init(dense_text.embed_dim, &device).upcycle_from_dense(&dense_text.model, &options).unwrap();
    assert!(upcycled.report.max_deviation.unwrap() < 1e-5);
    let sparse = TextCheckpoint { config, embed_dim: dense_text.embed_dim, model: upcycled.model };
    sparse.save_sparse(folder.path().join("text"), Precision::F32).unwrap();
    let back = TextCheckpoint::load(folder.path().join("text"), &device).unwrap();
    assert_eq!(words(&back), words(&sparse));
    assert_eq!(towers_in(folder.path().join("text")).unwrap(), Towers::Text);
    let error = VisionCheckpoint::load(folder.path().join("text"), None, &device).unwrap_err().to_string();
    assert!(error.ends_with("holds a text tower alone, but a vision tower is asked for"), "{error}");
}

/// A small vision tower whose position table is `table`, `[rows, 5]`, read for images of `side` patches.
fn positions_for(table: &[f32], rows: usize, side: usize, ask: bool) -> Result<Vec<f32>, String> {
    use burn_moe::clip::VisionConfig;
    use burn_moe::transformer::EncoderConfig;
    let device = Device::default();
    let grid = (rows - 1).isqrt();
    let config = VisionConfig::new(EncoderConfig::new(5, 1, 1, 4), 2 * grid, 2);
    let mut model = config.init(3, &device);
    let table = Tensor::from_data(TensorData::new(table.to_vec(), [rows, 5]), &device);
    model.position_embedding = Some(burn::module::Param::from_tensor(table));
    let folder = tempfile::tempdir().unwrap();
    VisionCheckpoint { config, embed_dim: 3, model }.save_sparse(folder.path(), Precision::F32).unwrap();
    if !ask {
        // The configuration says another size than the table is for.
        let path = folder.path().join("burn_moe_config.json");
        let text = fs::read_to_string(&path).unwrap();
        let ours = format!("\"image_size\": {}", 2 * grid);
        assert!(text.contains(&ours), "{text}");
        fs::write(&path, text.replace(&ours, &format!("\"image_size\": {}", 2 * side))).unwrap();
    }
    let asked = VisionCheckpoint::load(folder.path(), ask.then_some(2 * side), &device).map_err(|error| error.to_string())?;
    assert_eq!(asked.config.num_tokens(), side * side + 1);
    Ok(values(&asked.model.position_embedding.unwrap().val()))
}

#[test]
fn position_embeddings_are_interpolated_as_open_clip_does() {
    let bytes = fs::read(data("positions/expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for (old, new) in [(4usize, 7usize), (7, 4), (7, 8), (14, 24), (3, 3)] {
        let (table, shape) = floats(&file, &old.to_string());
        let (expected, _) = floats(&file, &format!("{old}-{new}"));
        let found = positions_for(&table, shape[0], new, true).unwrap();
        let difference = largest_difference(&found, &expected);
        assert!(found.len() == expected.len() && difference < 1e-5, "{old} to {new}: {difference}");
    }
    let (table, shape) = floats(&file, "7");
    let error = positions_for(&table, shape[0], 8, false).unwrap_err();
    let end = "`visual.positional_embedding` is for images of 14 x 14 pixels, and the model's have 16 x 16: load it for an image size \
               (`--image-size` in the examples) to have it interpolated";
    assert!(error.ends_with(end), "{error}");
}

#[test]
fn images_of_other_kinds_are_prepared_as_open_clip_does() {
    let bytes = fs::read(data("images.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let mut cases = 0;
    for (case, view) in expected.tensors() {
        let (file, rest) = case.split_once('/').unwrap();
        let plain = ImagePreprocessing::new();
        let preprocessing = match rest.split('/').nth(1) {
            None => plain,
            Some("shortest-48") => plain.with_resize_to(Some(48)),
            Some("squash-48") => plain.with_resize_mode(ResizeMode::Squash).with_resize_to(Some(48)),
            Some(other) => panic!("{other}"),
        };
        let preprocessor = ImagePreprocessor::new(32).with_preprocessing(preprocessing);
        let found = preprocessor.open(data("images").join(file)).unwrap_or_else(|error| panic!("{case}: {error}"));
        let differences = (0..3 * 32 * 32).map(|i| found[i].abs_diff(view.data()[i % 3 * 32 * 32 + i / 3]));
        let largest = differences.max().unwrap();
        assert!(largest <= 1, "{case}: {largest} of 255");
        cases += 1;
    }
    assert_eq!(cases, 18);
}

/// `tools/fixtures/hugging_face_export.py` loaded the same export with `CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained`.
#[test]
fn transformers_computes_the_same_from_our_export() {
    let device = Device::default();
    let folder = tempfile::tempdir().unwrap();
    let tiny = ClipCheckpoint::load(Path::new(ROOT).join("tests/data/clip-tiny"), &device).unwrap();
    tiny.save_hugging_face(folder.path(), Precision::F32).unwrap();
    let mut files: Vec<String> =
        fs::read_dir(&folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    let expected =
        ["config.json", "merges.txt", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json", "vocab.json"];
    assert_eq!(files, expected);

    let model = ClipCheckpoint::load(folder.path(), &device).unwrap();
    let bytes = fs::read(data("export/expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let preprocessor = ImagePreprocessor::for_model(&model.config.vision);
    let images = ImageEmbedder::new(&model.model.vision, preprocessor, &device).images(vec![data("export/square.png")], |_| ());
    let texts = lines_in(data("export/texts.txt")).unwrap();
    let texts = TextEmbedder::new(&model.model.text, &device).unwrap().texts(&texts, |_| ()).embeddings;
    for (found, name) in [(images.embeddings, "image_embeds"), (texts, "text_embeds")] {
        let difference = largest_difference(&values(&normalize(found)), &floats(&file, name).0);
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}
