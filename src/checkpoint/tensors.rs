//! Tensors on disk, read one at a time: a safetensors file, one that PyTorch pickled, or shards of either.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensorError, tensor::Metadata};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor},
};

use super::{
    CheckpointError,
    pickle::{Pickle, is_pickle},
};
use crate::support::content::other_kind;

/// A header longer than this belongs to no file: that of a ViT-L/14 has 60 kB, that of Qwen3-235B as one file 5 MB.
const LONGEST_HEADER: u64 = 16 << 20;

/// An index longer than this belongs to no model: that of DeepSeek-V3, with its 256 experts in 58 blocks, has 9 MB.
const LONGEST_INDEX: u64 = 16 << 20;

/// More shards than any model has.
const MOST_SHARDS: usize = 1024;

/// The tensors of one file, or of the shards that an index names.
pub(crate) struct TensorFiles {
    /// What errors name: the file, or the index.
    pub(crate) path: PathBuf,
    files: Vec<TensorFile>,
    /// Which file a tensor is in.
    file_of: BTreeMap<String, usize>,
}

/// What a file says of a tensor.
pub(crate) struct StoredInfo<'a> {
    pub(crate) path: &'a Path,
    pub(crate) dtype: Dtype,
    pub(crate) shape: &'a [usize],
}

struct TensorFile {
    path: PathBuf,
    content: Content,
}

enum Content {
    Safetensors(Safetensors),
    Pickle(Pickle),
}

struct Safetensors {
    source: Source,
    metadata: Metadata,
    /// Where the first tensor begins.
    start: u64,
}

/// Where the bytes of a safetensors file are.
enum Source {
    File(File),
    Memory(Vec<u8>),
}

impl Source {
    fn len(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Memory(bytes) => Ok(bytes.len() as u64),
        }
    }

    /// `len` bytes from `start` on.
    fn read(&self, start: u64, len: usize) -> io::Result<Vec<u8>> {
        match self {
            Self::File(file) => {
                let (mut file, mut bytes) = (file, vec![0; len]);
                file.seek(SeekFrom::Start(start))?;
                file.read_exact(&mut bytes)?;
                Ok(bytes)
            }
            Self::Memory(bytes) => {
                let start = usize::try_from(start).unwrap_or(usize::MAX);
                let range = start..start.saturating_add(len);
                bytes.get(range).map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
            }
        }
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TensorFiles {
    /// Opens `NAME` or, if there is none, the shards that `NAME.index.json` names.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::open_for(path, |_| true)
    }

    /// The same without the shards in which the index names no tensor that is wanted.
    pub(crate) fn open_for(path: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Self, CheckpointError> {
        let index = index_of(path);
        if path.is_file() || !index.is_file() {
            return Ok(Self::of_one(TensorFile::open(path)?));
        }
        let bad = |reason: String| CheckpointError::ConfigFile { path: index.clone(), reason };
        let text = read_text(&index, LONGEST_INDEX)?;
        let mut weight_map = serde_json::from_str::<Index>(&text).map_err(|error| bad(error.to_string()))?.weight_map;
        let wanted: BTreeSet<String> =
            weight_map.iter().filter(|(tensor, _)| is_wanted(tensor)).map(|(_, shard)| shard.clone()).collect();
        weight_map.retain(|_, shard| wanted.contains(shard));
        let names: BTreeSet<&String> = weight_map.values().collect();
        if names.len() > MOST_SHARDS {
            return Err(bad(format!("{} shards: at most {MOST_SHARDS} are read", names.len())));
        }
        let mut files = Vec::new();
        for name in &names {
            // Shards lie beside their index: a path from elsewhere must not decide what is read.
            if Path::new(name).file_name().is_none_or(|file| file != name.as_str()) {
                return Err(bad(format!("`{name}` is no name of a file")));
            }
            files.push(TensorFile::open(&index.with_file_name(name))?);
        }
        let place: BTreeMap<&String, usize> = names.iter().enumerate().map(|(place, name)| (*name, place)).collect();
        // Everything that is in the shards, so that what the index does not name is not passed over.
        let mut file_of = BTreeMap::new();
        for (place, file) in files.iter().enumerate() {
            file_of.extend(file.names().into_iter().map(|tensor| (tensor, place)));
        }
        for (tensor, name) in &weight_map {
            if files[place[name]].info(tensor).is_none() {
                return Err(bad(format!("`{tensor}` should be in {name}, but is not")));
            }
            file_of.insert(tensor.clone(), place[name]);
        }
        Ok(Self { path: index, files, file_of })
    }

    /// The tensors of a safetensors file in memory, which errors call `name`.
    pub(crate) fn in_memory(name: &Path, bytes: Vec<u8>) -> Result<Self, CheckpointError> {
        let content = Content::Safetensors(Safetensors::open(Source::Memory(bytes), name)?);
        Ok(Self::of_one(TensorFile { path: name.to_path_buf(), content }))
    }

    fn of_one(file: TensorFile) -> Self {
        let file_of = file.names().into_iter().map(|name| (name, 0)).collect();
        Self { path: file.path.clone(), files: vec![file], file_of }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    /// What the file of a tensor that is there says of it.
    pub(crate) fn info(&self, name: &str) -> StoredInfo<'_> {
        self.files[self.file_of[name]].info(name).expect("it was found when the file was opened")
    }

    /// The bytes of a tensor that is there, or of its `part`-th third.
    pub(crate) fn read(&self, name: &str, part: Option<usize>) -> Result<Vec<u8>, CheckpointError> {
        match part {
            None => self.read_share(name, [0, 1]),
            Some(part) => self.read_share(name, [part, 3]),
        }
    }

    /// The bytes of the `part`-th of `parts` shares of a tensor that is there; those of a pickle are all read for it.
    pub(crate) fn read_share(&self, name: &str, [part, parts]: [usize; 2]) -> Result<Vec<u8>, CheckpointError> {
        let TensorFile { path, content } = &self.files[self.file_of[name]];
        let share = |len: usize| len / parts * part..len / parts * (part + 1);
        match content {
            Content::Safetensors(content) => {
                let (start, end) = content.metadata.info(name).expect("it was found when the file was opened").data_offsets;
                let range = share(end - start);
                let from = content.start + (start + range.start) as u64;
                content.source.read(from, range.len()).map_err(CheckpointError::io(path))
            }
            Content::Pickle(content) => {
                let bytes = content.read(path, name)?;
                let range = share(bytes.len());
                Ok(if parts > 1 { bytes[range].to_vec() } else { bytes })
            }
        }
    }
}

/// The text of a file that should not be long.
pub(crate) fn read_text(path: &Path, longest: u64) -> Result<String, CheckpointError> {
    let bad = |reason: String| CheckpointError::ConfigFile { path: path.to_path_buf(), reason };
    let file = File::open(path).map_err(CheckpointError::io(path))?;
    let mut bytes = Vec::new();
    file.take(longest + 1).read_to_end(&mut bytes).map_err(CheckpointError::io(path))?;
    if let Some(kind) = other_kind(&bytes) {
        return Err(bad(format!("it is {kind}")));
    }
    if bytes.len() as u64 > longest {
        return Err(bad(format!("more than {longest} bytes: too long for what it should be")));
    }
    let text = String::from_utf8(bytes).map_err(|_| bad("it is no UTF-8: save the file in this encoding".into()))?;
    // Some editors put a byte order mark in front.
    Ok(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_string))
}

/// What a JSON file of at most `longest` bytes holds.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, longest: u64) -> Result<T, CheckpointError> {
    serde_json::from_str(&read_text(path, longest)?).map_err(|error| {
        let reason = format!("not the JSON that was expected: {error}");
        CheckpointError::ConfigFile { path: path.to_path_buf(), reason }
    })
}

/// The index that stands for a file in shards.
pub(crate) fn index_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.index.json"))
}

/// A name that a header has twice, of which a reader would take one or the other.
fn named_twice(header: &[u8]) -> Option<String> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Option<String>;

        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("tensors by name")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut seen = BTreeSet::new();
            let mut twice = None;
            while let Some((name, _)) = map.next_entry::<String, IgnoredAny>()? {
                if !seen.insert(name.clone()) {
                    twice = Some(name);
                }
            }
            Ok(twice)
        }
    }
    // What is no JSON has its own error.
    serde_json::Deserializer::from_slice(header).deserialize_map(Names).ok().flatten()
}

impl TensorFile {
    /// A file of either kind, which its content tells.
    fn open(path: &Path) -> Result<Self, CheckpointError> {
        let mut start = Vec::new();
        let file = File::open(path).map_err(CheckpointError::io(path))?;
        file.take(512).read_to_end(&mut start).map_err(CheckpointError::io(path))?;
        let content = match is_pickle(&start) {
            true => Content::Pickle(Pickle::open(path, &start)?),
            false => {
                let other = if start.is_empty() { Some("empty".to_string()) } else { other_kind(&start) };
                // The length in front of a safetensors file's header may begin as other files do.
                if let Some(kind) = other.filter(|_| start.get(8) != Some(&b'{')) {
                    return Err(CheckpointError::NotWeights { path: path.to_path_buf(), kind });
                }
                let file = File::open(path).map_err(CheckpointError::io(path))?;
                Content::Safetensors(Safetensors::open(Source::File(file), path)?)
            }
        };
        Ok(Self { path: path.to_path_buf(), content })
    }

    fn names(&self) -> Vec<String> {
        match &self.content {
            Content::Safetensors(content) => content.metadata.offset_keys(),
            Content::Pickle(content) => content.names().cloned().collect(),
        }
    }

    fn info(&self, name: &str) -> Option<StoredInfo<'_>> {
        let (dtype, shape) = match &self.content {
            Content::Safetensors(content) => content.metadata.info(name).map(|info| (info.dtype, &info.shape[..])),
            Content::Pickle(content) => content.info(name),
        }?;
        Some(StoredInfo { path: &self.path, dtype, shape })
    }
}

impl Safetensors {
    /// `path` is what errors name.
    fn open(source: Source, path: &Path) -> Result<Self, CheckpointError> {
        let bad = CheckpointError::safetensors(path);
        let size = source.len().map_err(CheckpointError::io(path))?;
        if size < 8 {
            return Err(bad(SafeTensorError::HeaderTooSmall));
        }
        let length = source.read(0, 8).map_err(CheckpointError::io(path))?;
        let length = u64::from_le_bytes(length.try_into().expect("eight bytes were read"));
        if length > size - 8 {
            return Err(bad(SafeTensorError::InvalidHeaderLength));
        }
        if length > LONGEST_HEADER {
            return Err(bad(SafeTensorError::HeaderTooLarge));
        }
        let header = source.read(8, length as usize).map_err(CheckpointError::io(path))?;
        // Reading it checks that tensors follow each other without gaps and have the sizes that their shapes say.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|error| bad(SafeTensorError::InvalidHeaderDeserialization(error)))?;
        if let Some(tensor) = named_twice(&header) {
            return Err(CheckpointError::Duplicate { path: path.to_path_buf(), tensor });
        }
        let start = 8 + length;
        if start + metadata.data_len() as u64 != size {
            return Err(bad(SafeTensorError::MetadataIncompleteBuffer));
        }
        Ok(Self { source, metadata, start })
    }
}
