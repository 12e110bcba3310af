//! Tar shards as webdataset reads them: members that follow each other and have the same name up to the first dot are one sample.

use std::{
    collections::{HashMap, VecDeque},
    fs::File,
    hash::{Hash, Hasher},
    io::{self, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use super::{Sample, SampleError, SampleId, Samples};
use crate::{
    support::{hash::StableHasher, text::decode},
    train::data::DataError,
};

/// Endings of images.
const IMAGES: [&str; 10] = ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"];
/// Samples whose places in their shards are kept in memory.
const KEPT_PLACES: usize = 1 << 19;
/// Samples of a stream that are read ahead.
const AHEAD: usize = 16;
/// The largest member that is read.
const LARGEST: u64 = 256 << 20;

/// Tar files on a disk. Members of a sample are its image (jpg, png, webp, …) and its caption: a `.txt`, or else `caption`, `captions` or `text`
/// of a `.json`, one or several; others are passed over.
///
/// Only headers are read before a sample is needed, so that memory does not grow with the shards.
#[derive(Debug)]
pub struct TarShards {
    paths: Vec<PathBuf>,
    sizes: Vec<u64>,
    places: Mutex<Places>,
}

/// A tar archive that is read once, from its beginning to its end, as from a pipe. Only one rank can read it, and there is no second epoch. The
/// samples of the shuffle window wait in memory: take a smaller one than for files.
#[derive(Debug)]
pub struct TarStream {
    name: String,
    state: Mutex<StreamState>,
}

/// What a member of a sample is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Image,
    Text,
    Json,
    /// An image or a caption by its last ending, with another dot before that one.
    Dotted,
}

/// The members of a sample: where they are, or what they hold.
#[derive(Clone, Debug)]
struct Members<M> {
    key: String,
    image: Option<M>,
    text: Option<M>,
    json: Option<M>,
    /// Why there is nothing to read: a shard that is damaged from here on.
    damaged: Option<String>,
    /// Whether there are members that were passed over for a dot in their names.
    has_dotted: bool,
}

/// First byte and length of a member.
#[derive(Clone, Copy, Debug)]
struct Extent {
    start: u64,
    len: u64,
}

/// What is known of where samples are.
#[derive(Debug, Default)]
struct Places {
    shards: HashMap<usize, Arc<Vec<Members<Extent>>>>,
    /// The shard that was read longest ago first.
    read: VecDeque<usize>,
}

#[derive(Debug)]
struct StreamState {
    receiver: mpsc::Receiver<Result<Members<Vec<u8>>, io::Error>>,
    /// Samples that came so far.
    came: usize,
    has_ended: bool,
    waiting: HashMap<usize, Members<Vec<u8>>>,
}

impl<M> Members<M> {
    fn new(key: String) -> Self {
        Self { key, image: None, text: None, json: None, damaged: None, has_dotted: false }
    }

    fn put(&mut self, kind: Kind, member: M) {
        match kind {
            Kind::Image => self.image = Some(member),
            Kind::Text => self.text = Some(member),
            Kind::Json => self.json = Some(member),
            Kind::Dotted => self.has_dotted = true,
        }
    }

    /// The sample, whose members `read` turns into bytes.
    fn sample(self, mut read: impl FnMut(M) -> Result<Vec<u8>, String>) -> Result<Sample, String> {
        if let Some(reason) = self.damaged {
            return Err(reason);
        }
        let dotted = match self.has_dotted {
            true => ", but files with a dot in their names: a sample is named up to the first dot",
            false => "",
        };
        let image = self.image.ok_or(format!("it has no image{dotted}"))?;
        let text_of = |bytes| decode(bytes).map_err(|reason| format!("its caption cannot be read: {reason}"));
        let mut captions = match (self.text, self.json) {
            (Some(text), _) => vec![text_of(read(text)?)?],
            (None, Some(json)) => captions_in(&text_of(read(json)?)?)?,
            (None, None) => return Err(format!("it has no caption, neither .txt nor .json{dotted}")),
        };
        captions.retain(|caption| !caption.trim().is_empty());
        if captions.is_empty() {
            return Err("its caption is empty".into());
        }
        Ok(Sample { name: self.key, image: read(image)?, captions })
    }
}

/// The captions in a JSON object: one, as img2dataset writes it, or several.
fn captions_in(json: &str) -> Result<Vec<String>, String> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Texts {
        One(String),
        Several(Vec<String>),
    }
    let object: serde_json::Value = serde_json::from_str(json).map_err(|error| format!("its .json cannot be read: {error}"))?;
    let texts = |field: &&str| serde_json::from_value(object.get(field)?.clone()).ok();
    match ["caption", "captions", "text"].iter().find_map(texts) {
        Some(Texts::One(caption)) => Ok(vec![caption]),
        Some(Texts::Several(captions)) => Ok(captions),
        None => Err("its .json has none of `caption`, `captions` and `text`".into()),
    }
}

/// The name of a sample, and what its member is; `None` for members that do not matter.
fn member_of(path: &Path) -> Option<(String, Kind)> {
    let name = path.file_name()?.to_str()?;
    let (stem, ending) = name.split_once('.')?;
    let ending = ending.to_lowercase();
    let kind = match ending.as_str() {
        "txt" => Kind::Text,
        "json" => Kind::Json,
        image if IMAGES.contains(&image) => Kind::Image,
        dotted => match dotted.rsplit_once('.') {
            Some((_, last)) if IMAGES.contains(&last) || ["txt", "json"].contains(&last) => Kind::Dotted,
            _ => return None,
        },
    };
    // Also what a file manager leaves behind.
    let is_hidden = stem.is_empty();
    (!is_hidden).then(|| (path.with_file_name(stem).to_string_lossy().into_owned(), kind))
}

/// Groups members as they come.
struct Groups<M>(Option<Members<M>>);

impl<M> Groups<M> {
    /// The sample before, if this member begins another one.
    fn put(&mut self, key: String, kind: Kind, member: M) -> Option<Members<M>> {
        let ended = self.0.take_if(|open| open.key != key);
        self.0.get_or_insert_with(|| Members::new(key)).put(kind, member);
        ended
    }
}

impl TarShards {
    /// Tar files that must be there; what they hold is read later.
    ///
    /// # Errors
    /// When one of them is not there, or is compressed.
    pub fn open(paths: Vec<PathBuf>) -> Result<Self, DataError> {
        let mut sizes = Vec::with_capacity(paths.len());
        for path in &paths {
            let io = |source| DataError::Io { path: path.clone(), source };
            let mut file = File::open(path).map_err(io)?;
            let mut start = [0; 2];
            let is_packed = file.read(&mut start).map_err(io)? == 2 && start == [0x1f, 0x8b];
            if is_packed {
                let reason = "a shard that gzip has packed cannot be read at any place: unpack it".into();
                return Err(DataError::Shard { path: path.clone(), reason });
            }
            sizes.push(file.metadata().map_err(io)?.len());
        }
        Ok(Self { paths, sizes, places: Mutex::default() })
    }

    /// Where the samples of a shard are.
    fn places(&self, shard: usize) -> Result<Arc<Vec<Members<Extent>>>, DataError> {
        let known = lock(&self.places).shards.get(&shard).cloned();
        if let Some(found) = known {
            return Ok(found);
        }
        let bad = |error: io::Error| DataError::Shard { path: self.paths[shard].clone(), reason: error.to_string() };
        let found = Arc::new(scan(&self.paths[shard], self.sizes[shard]).map_err(bad)?);
        let mut places = lock(&self.places);
        if places.shards.insert(shard, found.clone()).is_none() {
            places.read.push_back(shard);
        }
        let mut kept: usize = places.shards.values().map(|samples| samples.len()).sum();
        while kept > KEPT_PLACES
            && places.read.len() > 1
            && let Some(oldest) = places.read.pop_front()
        {
            kept -= places.shards.remove(&oldest).map_or(0, |samples| samples.len());
        }
        Ok(found)
    }
}

/// An archive that goes on behind its end, as several do that were joined by `cat`.
fn joined<R: Read>(file: R) -> tar::Archive<R> {
    let mut archive = tar::Archive::new(file);
    archive.set_ignore_zeros(true);
    archive
}

/// Reads the headers of a tar file. Where it is damaged, the samples before stay, and what follows counts as one that cannot be used.
fn scan(path: &Path, size: u64) -> io::Result<Vec<Members<Extent>>> {
    let file = io::BufReader::with_capacity(1 << 13, File::open(path)?);
    let mut samples = Vec::new();
    if let Err(error) = scan_into(&mut samples, file, size) {
        let damaged = Some(format!("the shard cannot be read from here on: {error}"));
        samples.push(Members { damaged, ..Members::new(format!("behind sample {}", samples.len())) });
    }
    Ok(samples)
}

fn scan_into(samples: &mut Vec<Members<Extent>>, file: impl Read + Seek, size: u64) -> io::Result<()> {
    let mut archive = joined(file);
    let mut groups = Groups(None);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let extent = Extent { start: entry.raw_file_position(), len: entry.size() };
        if extent.start.checked_add(extent.len).is_none_or(|end| end > size) {
            return Err(io::Error::other(format!("it is cut off within {}", entry.path()?.display())));
        }
        if let Some((key, kind)) = member_of(&entry.path()?) {
            samples.extend(groups.put(key, kind, extent));
        }
    }
    samples.extend(groups.0);
    Ok(())
}

impl Samples for TarShards {
    fn shards(&self) -> usize {
        self.paths.len()
    }

    fn has(&self, id: SampleId) -> Result<bool, DataError> {
        Ok(id.place < self.places(id.shard)?.len())
    }

    fn read(&self, id: SampleId) -> Result<Sample, SampleError> {
        let path = &self.paths[id.shard];
        let places = self.places(id.shard);
        let places = places.map_err(|error| SampleError { sample: path.display().to_string(), reason: error.to_string() })?;
        let Some(mut members) = places.get(id.place).cloned() else {
            let reason = format!("it has no sample {} any more: did the file change?", id.place);
            return Err(SampleError { sample: path.display().to_string(), reason });
        };
        members.key = format!("{}, {}", path.display(), members.key);
        let sample = members.key.clone();
        let read = |extent: Extent| {
            let mut bytes = vec![0; length(extent.len)?];
            let mut file = File::open(path).map_err(|error| error.to_string())?;
            let found = file.seek(SeekFrom::Start(extent.start)).and_then(|_| file.read_exact(&mut bytes));
            found.map(|()| bytes).map_err(|error| error.to_string())
        };
        members.sample(read).map_err(|reason| SampleError { sample, reason })
    }

    fn fingerprint(&self) -> String {
        // Wherever they are.
        let names: Vec<&[u8]> = self.paths.iter().map(|path| path.file_name().unwrap_or_default().as_encoded_bytes()).collect();
        let mut hasher = StableHasher::default();
        (names, &self.sizes).hash(&mut hasher);
        format!("{} shards, {:016x}", self.paths.len(), hasher.finish())
    }
}

fn length(len: u64) -> Result<usize, String> {
    if len > LARGEST { Err(format!("a member of {len} bytes is not read")) } else { Ok(len as usize) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TarStream {
    /// Reads `archive` on a thread of its own; `name` stands for it in errors.
    pub fn new(name: impl Into<String>, archive: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = mpsc::sync_channel(AHEAD);
        thread::spawn(move || {
            if let Err(error) = send_all(archive, &sender) {
                // Nobody listens any more: nothing is left to do.
                let _ = sender.send(Err(error));
            }
        });
        let state = StreamState { receiver, came: 0, has_ended: false, waiting: HashMap::new() };
        Self { name: name.into(), state: Mutex::new(state) }
    }
}

fn send_all(archive: impl Read, sender: &mpsc::SyncSender<io::Result<Members<Vec<u8>>>>) -> io::Result<()> {
    let mut archive = joined(archive);
    let mut groups = Groups(None);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let member = member_of(&entry.path()?);
        if let Some((key, kind)) = member.filter(|_| entry.header().entry_type().is_file()) {
            // The sample is then one without this member.
            let Ok(len) = length(entry.size()) else { continue };
            let mut bytes = Vec::with_capacity(len);
            entry.read_to_end(&mut bytes)?;
            if bytes.len() < len {
                return Err(io::Error::other("it ends within a member"));
            }
            if let Some(sample) = groups.put(key, kind, bytes)
                && sender.send(Ok(sample)).is_err()
            {
                return Ok(());
            }
        }
    }
    if let Some(sample) = groups.0 {
        let _ = sender.send(Ok(sample));
    }
    Ok(())
}

impl Samples for TarStream {
    fn shards(&self) -> usize {
        1
    }

    fn has(&self, id: SampleId) -> Result<bool, DataError> {
        let mut state = lock(&self.state);
        if state.has_ended && id.place == 0 {
            return Err(DataError::StreamEnded { name: self.name.clone(), samples: state.came });
        }
        while !state.has_ended && state.came <= id.place {
            match state.receiver.recv() {
                Ok(Ok(sample)) => {
                    let place = state.came;
                    state.waiting.insert(place, sample);
                    state.came += 1;
                }
                Ok(Err(error)) => {
                    return Err(DataError::Shard { path: self.name.clone().into(), reason: error.to_string() });
                }
                Err(_) => state.has_ended = true,
            }
        }
        Ok(id.place < state.came)
    }

    fn read(&self, id: SampleId) -> Result<Sample, SampleError> {
        let members = lock(&self.state).waiting.remove(&id.place);
        let Some(mut members) = members else {
            let sample = format!("{}, sample {}", self.name, id.place);
            return Err(SampleError { sample, reason: "it was read before, and can be read only once".into() });
        };
        members.key = format!("{}, {}", self.name, members.key);
        let sample = members.key.clone();
        members.sample(Ok).map_err(|reason| SampleError { sample, reason })
    }

    fn pass(&self, id: SampleId) {
        lock(&self.state).waiting.remove(&id.place);
    }

    fn is_for_one_rank(&self) -> bool {
        true
    }

    fn fingerprint(&self) -> String {
        self.name.clone()
    }
}
