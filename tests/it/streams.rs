//! Training data that is read while it is needed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Cursor,
    path::{Path, PathBuf},
    sync::{Arc, LazyLock},
};

use burn::tensor::Device;
use burn_moe::{
    clip::{lists::CaptionedImages, preprocess::ImagePreprocessor, tokenizer::ClipTokenizer},
    train::{
        data::{Batch, Pixels},
        stream::{ListedImages, Part, Samples, Stream, StreamConfig, TarShards, TarStream},
    },
};

const SIDE: usize = 8;

/// An image that tells which sample it belongs to.
fn png(number: usize) -> Vec<u8> {
    let pixel = |x, y| image::Rgb([(number * 7) as u8, (16 * x + 3 * y) as u8, (number / 36) as u8]);
    let mut bytes = Cursor::new(Vec::new());
    image::RgbImage::from_fn(12, 10, pixel).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

pub(super) fn tar(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

/// The members of a sample; of even ones the caption stands in a .json.
fn sample(number: usize) -> Vec<(String, Vec<u8>)> {
    let caption = format!("number{number}");
    let caption =
        if number.is_multiple_of(2) { ("json", format!("{{\"key\": 3, \"caption\": \"{caption}\"}}")) } else { ("txt", caption) };
    vec![
        (format!("part/{number:05}.png"), png(number)),
        (format!("part/{number:05}.{}", caption.0), caption.1.into_bytes()),
        (format!("part/{number:05}.cls"), b"7".to_vec()),
    ]
}

/// Shards of so many samples each, numbered through.
fn shards(folder: &Path, lengths: &[usize]) -> Vec<PathBuf> {
    let mut number = 0;
    let shard = |(index, length): (usize, &usize)| {
        let members: Vec<_> = (number..number + length).flat_map(sample).collect();
        number += length;
        let path = folder.join(format!("{index:02}.tar"));
        fs::write(&path, tar(&members)).unwrap();
        path
    };
    lengths.iter().enumerate().map(shard).collect()
}

fn stream(samples: Arc<dyn Samples>, config: StreamConfig) -> Stream {
    Stream::new(samples, ImagePreprocessor::new(SIDE), config).unwrap()
}

/// The pairs of a piece: bytes of the image, and the caption.
fn pairs(batch: &Batch) -> Vec<(Vec<u8>, String)> {
    static TOKENIZER: LazyLock<ClipTokenizer> = LazyLock::new(|| ClipTokenizer::with_vocab_size(1024));
    let Pixels::Bytes { values, .. } = &batch.pixels else { panic!("streams carry bytes") };
    let images = values.chunks(3 * SIDE * SIDE).map(<[u8]>::to_vec);
    let texts = batch.texts.ids.chunks(batch.texts.len);
    let texts = texts.map(|ids| TOKENIZER.decode(&ids.iter().copied().filter(|id| (1..1022).contains(id)).collect::<Vec<_>>()));
    images.zip(texts.map(|text| text.replace(' ', ""))).collect()
}

fn config(batch_size: usize) -> StreamConfig {
    StreamConfig::new(batch_size).with_shuffle(5).with_vocab_size(1024).with_seed(3)
}

/// So many whole batches of this part.
fn batches(stream: &Stream, part: Part, [piece, threads, first]: [usize; 3], count: usize) -> Vec<Vec<(Vec<u8>, String)>> {
    let mut batches = stream.batches(part, piece, threads, first).unwrap();
    let batch = |_| (0..batches.pieces()).flat_map(|_| pairs(&batches.next_piece().unwrap())).collect();
    (0..count).map(batch).collect()
}

#[test]
fn batches_do_not_depend_on_threads_pieces_or_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let samples = Arc::new(TarShards::open(shards(folder.path(), &[4, 1, 6, 2])).unwrap());
    let stream = stream(samples, config(6));
    let expected = batches(&stream, Part::WHOLE, [6, 1, 0], 9);
    // The same as bits, parts of images included.
    assert_eq!(batches(&stream, Part::WHOLE, [4, 3, 0], 9), expected);
    for ranks in [2, 3, 4] {
        let parts: Vec<_> = (0..ranks).map(|rank| batches(&stream, Part { rank, ranks }, [1, 2, 0], 9)).collect();
        let joined: Vec<Vec<_>> = (0..9).map(|step| parts.iter().flat_map(|part| part[step].clone()).collect()).collect();
        assert_eq!(joined, expected, "{ranks} ranks");
    }
    // From the middle of an epoch.
    for first in [1, 2, 5] {
        assert_eq!(batches(&stream, Part::WHOLE, [6, 2, first], 9 - first), expected[first..], "from step {first}");
    }
    // 54 pairs: four epochs of 13, and two more.
    let captions: Vec<&String> = expected.iter().flatten().map(|(_, caption)| caption).collect();
    for epoch in captions.chunks(13).take(4) {
        let all: BTreeSet<String> = (0..13).map(|number| format!("number{number}")).collect();
        assert_eq!(epoch.iter().map(|caption| caption.to_string()).collect::<BTreeSet<_>>(), all);
    }
    // Another part of the image in each epoch.
    let of_three: Vec<_> = expected.iter().flatten().filter(|(_, caption)| caption == "number3").collect();
    assert!(of_three.windows(2).any(|two| two[0].0 != two[1].0));
}

#[test]
fn without_a_crop_images_are_those_of_inference() {
    let folder = tempfile::tempdir().unwrap();
    let samples = Arc::new(TarShards::open(shards(folder.path(), &[5])).unwrap());
    let mut batches = stream(samples, config(5).with_crop(None)).batches(Part::WHOLE, 5, 1, 0).unwrap();
    let batch = batches.next_piece().unwrap();
    let preprocessor = ImagePreprocessor::new(SIDE);
    let numbers = pairs(&batch).into_iter().map(|(_, caption)| caption["number".len()..].parse::<usize>().unwrap());
    let images: Vec<_> = numbers.map(|number| preprocessor.decode(&png(number)).unwrap()).collect();
    let expected = preprocessor.tensor(&images, &Device::default());
    let apart = (batch.images(&Device::default()) - expected).abs().max().into_scalar::<f32>();
    assert!(apart < 1e-6, "{apart}");
}

#[test]
fn what_cannot_be_used_is_left_out_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut members: Vec<_> = (0..3).flat_map(sample).collect();
    members.extend([
        ("a.jpg".to_string(), b"no picture".to_vec()),
        ("a.txt".to_string(), b"a caption".to_vec()),
        ("b.png".to_string(), png(9)),
        ("c.png".to_string(), png(9)),
        ("c.txt".to_string(), b" \n".to_vec()),
        ("d.txt".to_string(), b"no image".to_vec()),
        ("e.png".to_string(), png(9)),
        ("e.json".to_string(), b"{\"url\": 1}".to_vec()),
        ("f.png".to_string(), png(9)),
        ("f.txt".to_string(), b"caf\xe9".to_vec()),
        // Another sample than one that is named up to its first dot.
        ("g.v2-1.png".to_string(), png(9)),
        ("g.v2-1.txt".to_string(), b"dotted".to_vec()),
        ("h.jpe".to_string(), png(3)),
        ("h.json".to_string(), b"\xef\xbb\xbf{\"caption\": \"number3\"}".to_vec()),
        ("h.mask.png".to_string(), png(9)),
        ("i.png".to_string(), png(4)),
        ("i.txt".to_string(), b"\xef\xbb\xbfnumber4".to_vec()),
        // What does not belong to a sample.
        (".hidden.png".to_string(), vec![1]),
        ("README".to_string(), vec![1]),
    ]);
    let path = folder.path().join("some.tar");
    fs::write(&path, tar(&members)).unwrap();
    let stream = stream(Arc::new(TarShards::open(vec![path.clone()]).unwrap()), config(12));
    let mut batches = stream.batches(Part::WHOLE, 4, 2, 0).unwrap();
    let good: BTreeSet<String> =
        (0..batches.pieces()).flat_map(|_| pairs(&batches.next_piece().unwrap())).map(|(_, caption)| caption).collect();
    assert_eq!(good.into_iter().collect::<Vec<_>>(), ["number0", "number1", "number2", "number3", "number4"]);
    let skipped = batches.skipped();
    assert_eq!(skipped.count, 7);
    let reasons: BTreeMap<&str, &str> = skipped
        .first
        .iter()
        .map(|error| (error.sample.strip_prefix(&format!("{}, ", path.display())).unwrap(), error.reason.as_str()))
        .collect();
    assert!(reasons["a"].contains("is no readable image"), "{}", reasons["a"]);
    assert_eq!(reasons["b"], "it has no caption, neither .txt nor .json");
    assert_eq!(reasons["c"], "its caption is empty");
    assert_eq!(reasons["d"], "it has no image");
    assert_eq!(reasons["e"], "its .json has none of `caption`, `captions` and `text`");
    assert_eq!(reasons["f"], "its caption cannot be read: line 1 is no UTF-8: save the file in this encoding");
    assert_eq!(reasons["g"], "it has no image, but files with a dot in their names: a sample is named up to the first dot");
}

#[test]
fn a_batch_without_a_good_sample_ends_the_training() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.tar");
    let members: Vec<_> = (0..4).flat_map(|i| [(format!("{i}.png"), vec![0]), (format!("{i}.txt"), vec![b'x'])]).collect();
    fs::write(&path, tar(&members)).unwrap();
    let bad = stream(Arc::new(TarShards::open(vec![path]).unwrap()), config(4));
    let mut batches = bad.batches(Part::WHOLE, 3, 2, 0).unwrap();
    assert!(batches.next_piece().unwrap().is_empty());
    let error = batches.next_piece().unwrap_err().to_string();
    assert!(error.starts_with("none of 4 samples can be used; the last one: "), "{error}");
    // Another rank may have good ones.
    let mut half = bad.batches(Part { rank: 1, ranks: 2 }, 2, 2, 0).unwrap();
    assert!(half.next_piece().unwrap().is_empty());
}

#[test]
fn a_pipe_gives_what_a_file_gives_once() {
    let folder = tempfile::tempdir().unwrap();
    let paths = shards(folder.path(), &[11]);
    let bytes = fs::read(&paths[0]).unwrap();
    let pipe = |bytes: Vec<u8>| stream(Arc::new(TarStream::new("standard input", Cursor::new(bytes))), config(3));
    let file = stream(Arc::new(TarShards::open(paths).unwrap()), config(3));
    let expected = batches(&file, Part::WHOLE, [3, 2, 0], 3);
    assert_eq!(batches(&pipe(bytes.clone()), Part::WHOLE, [3, 2, 0], 3), expected);
    // A resumed run passes over what was used.
    assert_eq!(batches(&pipe(bytes.clone()), Part::WHOLE, [3, 2, 1], 2), expected[1..]);

    // Joined by `cat`, archives are one.
    let joined = batches(&pipe(bytes.repeat(2)), Part::WHOLE, [3, 2, 0], 7);
    assert_eq!(joined.iter().flatten().map(|(_, caption)| caption).collect::<BTreeSet<_>>().len(), 11);
    let path = folder.path().join("joined.tar");
    fs::write(&path, bytes.repeat(2)).unwrap();
    assert_eq!(batches(&stream(Arc::new(TarShards::open(vec![path]).unwrap()), config(3)), Part::WHOLE, [3, 2, 0], 7), joined);

    let mut over = pipe(bytes.clone()).batches(Part::WHOLE, 3, 2, 3).unwrap();
    let error = over.next_piece().unwrap_err().to_string();
    assert!(error.starts_with("standard input ended after 11 samples, and more are needed"), "{error}");
    let error = pipe(bytes.clone()).batches(Part { rank: 0, ranks: 2 }, 3, 2, 0).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("standard input can only be read by one rank, and there are 2"), "{error}");
    let mut cut = pipe(bytes[..bytes.len() / 2 + 100].to_vec()).batches(Part::WHOLE, 11, 2, 0).unwrap();
    let error = (0..4).find_map(|_| cut.next_piece().err()).unwrap().to_string();
    assert!(error.starts_with("standard input: "), "{error}");
}

#[test]
fn shards_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = shards(folder.path(), &[4]).remove(0);
    let open = |path: &Path| TarShards::open(vec![path.to_path_buf()]);
    let error = open(&folder.path().join("none.tar")).unwrap_err().to_string();
    assert!(error.contains("none.tar: No such file"), "{error}");
    let packed = folder.path().join("packed.tar.gz");
    fs::write(&packed, [0x1f, 0x8b, 8, 0]).unwrap();
    let error = open(&packed).unwrap_err().to_string();
    assert!(error.ends_with("packed.tar.gz: a shard that gzip has packed cannot be read at any place: unpack it"), "{error}");
    let bytes = fs::read(&path).unwrap();
    let next = |path: &Path| {
        let stream = stream(Arc::new(open(path).unwrap()), config(4));
        stream.batches(Part::WHOLE, 4, 2, 0).unwrap().next_piece().unwrap_err().to_string()
    };
    // What cannot be read counts as one sample; those before a cut are good.
    let cut = folder.path().join("cut.tar");
    fs::write(&cut, &bytes[..700]).unwrap();
    assert!(next(&cut).contains("none of 4 samples can be used"), "{}", next(&cut));
    assert!(next(&cut).contains("cut off within part/00000.png"), "{}", next(&cut));
    let other = folder.path().join("other.tar");
    fs::write(&other, vec![b'x'; 2048]).unwrap();
    assert!(next(&other).contains("other.tar, behind sample 0: the shard cannot be read from here on: "), "{}", next(&other));
    let half = folder.path().join("half.tar");
    fs::write(&half, &bytes[..bytes.len() / 2 + 100]).unwrap();
    let half = stream(Arc::new(open(&half).unwrap()), config(4));
    let mut batches = half.batches(Part::WHOLE, 4, 2, 0).unwrap();
    let good: usize = (0..2).map(|_| batches.next_piece().unwrap().len()).sum();
    assert!(good > 0 && batches.skipped().count > 0);
    let error = half.batches(Part { rank: 0, ranks: 5 }, 4, 2, 0).map(|_| ()).unwrap_err().to_string();
    assert_eq!(error, "`batch_size` is 4: a batch needs a pair for each rank");
    let empty = folder.path().join("empty.tar");
    fs::write(&empty, tar(&[])).unwrap();
    assert!(next(&empty).starts_with("the data holds no sample"), "{}", next(&empty));
}

#[test]
fn lists_are_streams_too() {
    let folder = tempfile::tempdir().unwrap();
    (0..4).for_each(|number| fs::write(folder.path().join(format!("{number}.png")), png(number)).unwrap());
    let list = CaptionedImages {
        images: (0..5).map(|number| PathBuf::from(format!("{number}.png"))).collect(),
        captions: (0..10).map(|caption| (format!("number{},text{caption}", caption / 2), caption / 2)).collect(),
    };
    let stream = stream(Arc::new(ListedImages::new(list, folder.path())), config(5));
    let mut batches = stream.batches(Part::WHOLE, 5, 2, 0).unwrap();
    let mut captions = BTreeSet::new();
    for _ in 0..20 {
        captions.extend(pairs(&batches.next_piece().unwrap()).into_iter().map(|(_, caption)| caption));
    }
    let all: BTreeSet<String> = (0..8).map(|caption| format!("number{},text{caption}", caption / 2)).collect();
    assert_eq!(captions, all);
    assert_eq!(batches.skipped().count, 20);
    assert!(batches.skipped().first[0].sample.ends_with("4.png"));
}
