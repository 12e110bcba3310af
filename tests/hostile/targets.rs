//! What is done with bytes from a stranger: one function per parser. The fuzz targets call them, and so does the test that replays their corpus.
//!
//! Each must return: a panic, a hang or too much memory is a failure.

use std::{cell::RefCell, fs, io::Write, path::Path};

use burn::tensor::Device;
use burn_moe::{
    clip::{
        ClipConfig, TextConfig, VisionConfig,
        checkpoint::{ClipCheckpoint, Precision},
        lists::{CaptionedImages, ListOptions},
        preprocess::{ImagePreprocessor, Orientation},
        tokenizer::ClipTokenizer,
    },
    language_models::MoeCheckpoint,
    train::data::load_images,
    transformer::EncoderConfig,
};
use tempfile::TempDir;

/// A parser of ours, by the name of its fuzz target.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&[u8]),
    /// Bytes that it may take beside what its input becomes.
    pub(crate) memory: usize,
}

impl Target {
    /// The most memory for an input: a model has four bytes where its file has two or more, and each text is held as file, as bytes and parsed.
    pub(crate) fn allowance(&self, bytes: &[u8]) -> usize {
        self.memory + 16 * bytes.len()
    }
}

const MIB: usize = 1 << 20;

pub(crate) const TARGETS: [Target; 8] = [
    Target { name: "weights", run: weights, memory: 64 * MIB },
    Target { name: "index", run: index, memory: 64 * MIB },
    Target { name: "pickle", run: pickle, memory: 256 * MIB },
    Target { name: "config", run: config, memory: 64 * MIB },
    Target { name: "lists", run: lists, memory: 64 * MIB },
    Target { name: "pairs", run: pairs, memory: 64 * MIB },
    // A decoder may take 256 MiB, and the image is then converted or turned once.
    Target { name: "image", run: image, memory: 512 * MIB },
    Target { name: "tokenizer", run: tokenizer, memory: 64 * MIB },
];

/// The smallest CLIP that has every kind of tensor.
pub(crate) fn small() -> ClipConfig {
    let vision = VisionConfig::new(EncoderConfig::new(4, 1, 1, 4), 4, 2);
    let text = TextConfig::new(EncoderConfig::new(4, 1, 1, 4)).with_vocab_size(8).with_context_length(3);
    ClipConfig::new(vision, text, 4)
}

/// A folder that the cases of one thread share: files of other names stay from case to case.
fn in_folder<R>(body: impl FnOnce(&Path) -> R) -> R {
    thread_local!(static FOLDER: RefCell<Option<TempDir>> = const { RefCell::new(None) });
    FOLDER.with_borrow_mut(|folder| body(folder.get_or_insert_with(|| tempfile::tempdir().unwrap()).path()))
}

/// One of several ways, by the first byte.
fn split(bytes: &[u8], ways: u8) -> Option<(u8, &[u8])> {
    bytes.split_first().map(|(first, rest)| (first % ways, rest))
}

/// A file of weights for [`small`]: as it is, or a header for which the length before it and the numbers behind it are made up.
fn weights(bytes: &[u8]) {
    let Some((way, rest)) = split(bytes, 2) else { return };
    let file = match way {
        0 => rest.to_vec(),
        _ => {
            let numbers = [0; 4 * 1024];
            [&(rest.len() as u64).to_le_bytes(), rest, &numbers[..4 * small().cost().params_total as usize]].concat()
        }
    };
    in_folder(|folder| {
        let folder = folder.join("weights");
        if !folder.is_dir() {
            let device = Device::default();
            let checkpoint = ClipCheckpoint { config: small(), model: small().init(&device) };
            checkpoint.save_open_clip(&folder, Precision::F32).unwrap();
        }
        fs::write(folder.join("open_clip_model.safetensors"), file).unwrap();
        let _ = ClipCheckpoint::load(folder, &Device::default());
    });
}

/// The index of a checkpoint in two shards, which are whole.
fn index(bytes: &[u8]) {
    in_folder(|folder| {
        let folder = folder.join("index");
        if !folder.is_dir() {
            write_shards(&folder);
        }
        fs::write(folder.join("open_clip_model.safetensors.index.json"), bytes).unwrap();
        let _ = ClipCheckpoint::load(folder, &Device::default());
    });
}

/// [`small`] in two shards, `a` and `b`, and no index; returns the one that would fit.
pub(crate) fn write_shards(folder: &Path) -> String {
    use safetensors::SafeTensors;
    let device = Device::default();
    let checkpoint = ClipCheckpoint { config: small(), model: small().init(&device) };
    checkpoint.save_open_clip(folder, Precision::F32).unwrap();
    let whole = folder.join("open_clip_model.safetensors");
    let bytes = fs::read(&whole).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    let (a, b) = tensors.split_at(tensors.len() / 2);
    for (name, part) in [("a", a), ("b", b)] {
        safetensors::serialize_to_file(part.to_vec(), None, &folder.join(name)).unwrap();
    }
    fs::remove_file(whole).unwrap();
    let entry = |name: &'static str| move |(tensor, _): &(String, _)| format!("\"{tensor}\":\"{name}\"");
    let entries: Vec<String> = a.iter().map(entry("a")).chain(b.iter().map(entry("b"))).collect();
    format!("{{\"weight_map\":{{{}}}}}", entries.join(","))
}

/// A file with one tensor of a layer, which no layer is made of.
const SOME_LAYER: &[u8] =
    b"\x58\0\0\0\0\0\0\0{\"model.layers.0.mlp.gate.weight\":{\"dtype\":\"F32\",\"shape\":[1,1],\"data_offsets\":[0,4]}}   \0\0\0\0";

/// The configuration of each layout, of a language model's layers, and what Hugging Face says of images.
fn config(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    // One that was not there when the others were found.
    let way = if first >= 252 { 4 } else { first % 4 };
    in_folder(|folder| {
        let folder = folder.join("config");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let names =
            ["burn_moe_config.json", "open_clip_config.json", "config.json", "preprocessor_config.json", "moevie_config.json"];
        let name = names[way as usize];
        fs::write(folder.join(name), rest).unwrap();
        if way == 3 {
            fs::write(folder.join("config.json"), r#"{"vision_config": {}, "text_config": {}}"#).unwrap();
        }
        if let Ok(config) = ClipCheckpoint::read_config(&folder) {
            let _ = (config.cost(), config.is_sparse());
        }
        if let Ok(checkpoint) = MoeCheckpoint::open(&folder) {
            let _ = checkpoint.config().cost(1);
            fs::write(folder.join("model.safetensors"), SOME_LAYER).unwrap();
            for block in checkpoint.moe_blocks().iter().take(1) {
                assert!(checkpoint.load_layer(*block, &Device::default()).is_err());
            }
        }
    });
}

/// A list of any kind, of which a split is read, or all.
fn lists(bytes: &[u8]) {
    let Some((way, rest)) = split(bytes, 3) else { return };
    let split = [None, Some("test".to_string()), Some("all".to_string())][way as usize].clone();
    let read = in_folder(|folder| {
        let path = folder.join("list");
        fs::write(&path, rest).unwrap();
        CaptionedImages::read(path, &ListOptions { split, ..ListOptions::default() })
    });
    if let Ok(mut list) = read {
        assert!(list.captions.iter().all(|(caption, image)| *image < list.images.len() && !caption.is_empty()));
        list.keep(&[0]);
        assert!(list.images.len() == 1 && !list.captions.is_empty());
    }
}

/// A user's own list; its images are not there.
fn pairs(bytes: &[u8]) {
    let Some((way, rest)) = split(bytes, 2) else { return };
    in_folder(|folder| {
        let path = folder.join(["list.csv", "list.jsonl"][way as usize]);
        fs::write(&path, rest).unwrap();
        if let Ok(mut list) = CaptionedImages::read(path, &ListOptions::default()) {
            list.keep(&(0..list.images.len().min(4)).collect::<Vec<_>>());
            let _ = load_images(list, folder.join("nowhere"), &ImagePreprocessor::new(8), |_| ());
        }
    });
}

/// The pickle of a file of weights for [`small`]: a whole file, or the pickle alone, around which a file is made.
fn pickle(bytes: &[u8]) {
    let Some((way, rest)) = split(bytes, 2) else { return };
    let file = match way {
        0 => rest.to_vec(),
        _ => zipped(rest),
    };
    in_folder(|folder| {
        let folder = folder.join("pickle");
        if !folder.is_dir() {
            let device = Device::default();
            let checkpoint = ClipCheckpoint { config: small(), model: small().init(&device) };
            checkpoint.save_open_clip(&folder, Precision::F32).unwrap();
            fs::remove_file(folder.join("open_clip_model.safetensors")).unwrap();
        }
        fs::write(folder.join("open_clip_pytorch_model.bin"), file).unwrap();
        let _ = ClipCheckpoint::load(folder, &Device::default());
    });
}

/// A file as PyTorch writes it, with storages of zeros.
fn zipped(pickle: &[u8]) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    let mut add = |name: &str, bytes: &[u8]| {
        archive.start_file(name, options).unwrap();
        archive.write_all(bytes).unwrap();
    };
    add("m/data.pkl", pickle);
    add("m/byteorder", b"little");
    add("m/version", b"3\n");
    (0..40).for_each(|storage| add(&format!("m/data/{storage}"), &[0; 256]));
    archive.finish().unwrap().into_inner()
}

/// An image in any format.
fn image(bytes: &[u8]) {
    let preprocessor = ImagePreprocessor::new(16).with_orientation(Orientation::Exif);
    if let Ok(square) = preprocessor.decode(bytes) {
        assert_eq!(square.len(), 3 * 16 * 16);
    }
}

/// Any text.
fn tokenizer(bytes: &[u8]) {
    thread_local!(static TOKENIZER: ClipTokenizer = ClipTokenizer::new());
    let text = String::from_utf8_lossy(bytes);
    let tokens = TOKENIZER.with(|tokenizer| tokenizer.tokenize(&[&text], 77));
    assert!(tokens.ids.len() <= 77 && tokens.ids.iter().all(|id| (0..49408).contains(id)));
}
