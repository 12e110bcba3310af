//! Every parser on what the fuzzers found (`fuzz/corpus`), with a bound on memory and time.
//!
//! A binary of its own, because the allocator counts for the whole process; one test, for the same reason.

use std::{
    fs,
    io::{Cursor, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use peak_alloc::PeakAlloc;

#[path = "hostile/targets.rs"]
mod targets;

use targets::{TARGETS, Target};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// Bytes that the target took for an input.
fn memory_of(target: &Target, bytes: &[u8], what: &str) -> usize {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let start = Instant::now();
    (target.run)(bytes);
    let peak = MEMORY.peak_usage().saturating_sub(before);
    assert!(start.elapsed() < Duration::from_secs(10), "{} took {:?} on {what}", target.name, start.elapsed());
    assert!(peak <= target.allowance(bytes), "{} took {peak} bytes on {what}, of {}", target.name, bytes.len());
    peak
}

/// A PNG of one colour: the fewest bytes for the most pixels.
fn bomb(width: u32, height: u32, colour: image::ExtendedColorType) -> Vec<u8> {
    let row = usize::from(colour.bits_per_pixel()) / 8 * width as usize;
    let mut png = Cursor::new(Vec::new());
    image::write_buffer_with_format(&mut png, &vec![0; row * height as usize], width, height, colour, image::ImageFormat::Png)
        .unwrap();
    png.into_inner()
}

#[test]
fn what_fuzzers_found_is_taken_in_bounds() {
    for target in &TARGETS {
        let mut files: Vec<PathBuf> = fs::read_dir(corpus(target.name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(files.len() >= 3, "the corpus of {}", target.name);
        let peaks = files.iter().map(|file| memory_of(target, &fs::read(file).unwrap(), &file.display().to_string()));
        println!("{}: {} inputs, at most {:.1} MiB", target.name, files.len(), peaks.max().unwrap_or(0) as f64 / 1048576.0);
    }
    let image = TARGETS.iter().find(|target| target.name == "image").unwrap();
    for (width, height, colour) in [
        (8000, 8000, image::ExtendedColorType::L8),
        (8000, 8000, image::ExtendedColorType::La8),
        (8000, 8000, image::ExtendedColorType::Rgb8),
        (8000, 8000, image::ExtendedColorType::Rgba8),
        (8000, 8000, image::ExtendedColorType::L16),
        (8000, 8000, image::ExtendedColorType::Rgb16),
        (64_000_000, 1, image::ExtendedColorType::L8),
        (1, 250_000, image::ExtendedColorType::Rgba8),
        (60_000, 60_000, image::ExtendedColorType::L8),
    ] {
        // The largest one is claimed and not delivered.
        let png = match u64::from(width) * u64::from(height) > 64_000_000 {
            true => claimed(width, height),
            false => bomb(width, height, colour),
        };
        let peak = memory_of(image, &png, &format!("{width} x {height} {colour:?}"));
        println!("{width} x {height} {colour:?}: {} bytes, {:.1} MiB", png.len(), peak as f64 / 1048576.0);
    }
}

/// A small PNG whose header says that it is large.
fn claimed(width: u32, height: u32) -> Vec<u8> {
    let mut png = bomb(8, 8, image::ExtendedColorType::L8);
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let mut checksum = u32::MAX;
    for byte in &png[12..29] {
        checksum ^= u32::from(*byte);
        for _ in 0..8 {
            checksum = if checksum & 1 == 1 { checksum >> 1 ^ 0xedb8_8320 } else { checksum >> 1 };
        }
    }
    png[29..33].copy_from_slice(&(!checksum).to_be_bytes());
    png
}

/// Writes inputs that the parsers accept, for a fuzzer to start from: `cargo test --release --test hostile -- --ignored`.
#[test]
#[ignore = "writes fuzz/corpus"]
fn seeds() {
    let write = |target: &str, name: &str, parts: &[&[u8]]| {
        fs::create_dir_all(corpus(target)).unwrap();
        let mut file = fs::File::create(corpus(target).join(name)).unwrap();
        parts.iter().for_each(|part| file.write_all(part).unwrap());
    };
    let folder = tempfile::tempdir().unwrap();
    let device = burn::tensor::Device::default();
    let checkpoint = burn_moe::clip::checkpoint::ClipCheckpoint { config: targets::small(), model: targets::small().init(&device) };
    let precision = burn_moe::clip::checkpoint::Precision::F32;
    checkpoint.save_open_clip(folder.path(), precision).unwrap();
    checkpoint.save_hugging_face(folder.path(), precision).unwrap();
    checkpoint.save_sparse(folder.path(), precision).unwrap();
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();

    let weights = read("open_clip_model.safetensors");
    let header = &weights[8..8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize];
    write("weights", "whole", &[&[0], &weights]);
    write("weights", "header", &[&[1], header]);
    write("weights", "cut", &[&[0], &weights[..weights.len() / 2]]);

    let index = targets::write_shards(&tempfile::tempdir().unwrap().path().join("index"));
    write("index", "whole", &[index.as_bytes()]);
    write("index", "elsewhere", &[index.replacen("\"a\"", "\"../a\"", 1).as_bytes()]);
    write("index", "missing", &[index.replacen("\"a\"", "\"c\"", 1).as_bytes()]);

    for (way, name) in
        ["burn_moe_config.json", "open_clip_config.json", "config.json", "preprocessor_config.json"].iter().enumerate()
    {
        write("config", name, &[&[way as u8], &read(name)]);
    }
    let moe_vie =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/moevie/moevie_config.json")).unwrap();
    write("config", "moevie_config.json", &[&[252], moe_vie.as_bytes()]);
    for (name, field) in [("moevie_width", "\"width\": 32"), ("moevie_experts", "\"num_of_expert\": 4")] {
        let key = field.split(':').next().unwrap();
        write("config", name, &[&[252], moe_vie.replacen(field, &format!("{key}: {}", u64::MAX), 1).as_bytes()]);
    }
    for family in burn_moe::language_models::Family::ALL {
        let path = format!("tests/fixtures/lm-{}/config.json", family.model_type());
        let config = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        write("config", family.model_type(), &[&[2], config.as_bytes()]);
        let huge = config.replacen("\"hidden_size\": 32", "\"hidden_size\": 1048576", 1);
        write("config", &format!("{}_huge", family.model_type()), &[&[2], huge.as_bytes()]);
    }
    let coco = r#"{"images": [{"id": 7, "file_name": "b.jpg"}], "annotations": [{"image_id": 7, "caption": "one"}]}"#;
    write("lists", "coco", &[&[0], coco.as_bytes()]);
    let karpathy = r#"{"images": [{"filename": "b.jpg", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]}]}"#;
    write("lists", "karpathy", &[&[1], karpathy.as_bytes()]);
    write("lists", "flickr30k", &[&[2], b"b.jpg#0\tone\nb.jpg#1\ttwo\n"]);
    write("pairs", "csv", &[&[0], b"path,caption\na.png,\"a, \"\"b\"\"\nc\"\nb.png,d\n"]);
    write("pairs", "jsonl", &[&[1], b"{\"path\": \"a.png\", \"caption\": \"b\"}\n\n{\"path\": \"a.png\", \"caption\": \"c\"}\n"]);
    write("pairs", "empty", &[&[1], b"{\"path\": \"a.png\", \"caption\": \" \"}\n"]);
    for colour in [image::ExtendedColorType::L8, image::ExtendedColorType::Rgba8, image::ExtendedColorType::Rgb16] {
        write("image", &format!("{colour:?}.png"), &[&bomb(20, 9, colour)]);
    }
    for format in [image::ImageFormat::Jpeg, image::ImageFormat::WebP] {
        let mut bytes = Cursor::new(Vec::new());
        image::RgbImage::from_fn(24, 17, |x, y| image::Rgb([x as u8 * 9, y as u8 * 11, 70])).write_to(&mut bytes, format).unwrap();
        write("image", format.extensions_str()[0], &[bytes.get_ref()]);
    }
    for name in ["tiny.png", "rgb.webp", "exif6.jpg"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/preprocess").join(name);
        write("image", name, &[&fs::read(path).unwrap()]);
    }
    write("tokenizer", "plain", &[b"a photo of a dog."]);
    write("tokenizer", "entities", &["&amp;amp; &quot;\u{201c}x\u{201d}&#x1F600; it's 12,5 \u{4e2d}\u{6587} \u{130}".as_bytes()]);
    write("tokenizer", "bytes", &[&[0xff, 0xfe, 0, b'a', 0xc3, 0xa9]]);
}
