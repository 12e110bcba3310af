//! Sources by their names.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{ListedImages, Samples, TarShards, TarStream, expand_braces};
use crate::{
    clip::lists::{CaptionedImages, ImageFolder, ListOptions},
    support::text::decode,
    train::data::DataError,
};

/// Opens what a command line names: tar files (`shards/{000..012}.tar`, several names together), `-` for a tar archive on standard input, a folder
/// of tar files, a folder of images with a caption in a `.txt` beside each, or a list of any kind that [`CaptionedImages::read`] knows.
///
/// # Errors
/// When there is no such file, a name cannot be understood, or names of several kinds stand together.
pub fn open_samples<N: AsRef<str>>(names: &[N], options: &ListOptions) -> Result<Arc<dyn Samples>, DataError> {
    let unclear = |reason: String| DataError::Name { reason };
    let mut paths = Vec::new();
    for name in names {
        paths.extend(expand_braces(name.as_ref()).map_err(unclear)?.into_iter().map(PathBuf::from));
    }
    if let [only] = &paths[..] {
        if only.as_os_str() == "-" {
            return Ok(Arc::new(TarStream::new("standard input", std::io::stdin())));
        }
        if only.is_dir() {
            return of_folder(only);
        }
        if !is_tar(only) {
            let list = CaptionedImages::read(only, options)?;
            return Ok(Arc::new(ListedImages::new(list, only.parent().unwrap_or(Path::new("")))));
        }
    }
    match paths.iter().find(|path| !is_tar(path)) {
        None if paths.is_empty() => Err(unclear("no data is named".into())),
        None => Ok(Arc::new(TarShards::open(paths)?)),
        Some(other) => Err(unclear(format!("{} is no .tar: only tar files can be named together with others", other.display()))),
    }
}

/// Whether a name is that of a tar file, packed or not: `.tar`, `.tar.gz` or `.tgz`, in capitals too.
pub fn is_tar(path: impl AsRef<Path>) -> bool {
    let name = path.as_ref().to_string_lossy().to_lowercase();
    [".tar", ".tar.gz", ".tgz"].iter().any(|ending| name.ends_with(ending))
}

fn of_folder(folder: &Path) -> Result<Arc<dyn Samples>, DataError> {
    let io = |source| DataError::Io { path: folder.to_path_buf(), source };
    let mut shards: Vec<PathBuf> = fs::read_dir(folder).map_err(io)?.flatten().map(|entry| entry.path()).collect();
    shards.retain(|path| is_tar(path));
    shards.sort();
    if !shards.is_empty() {
        return Ok(Arc::new(TarShards::open(shards)?));
    }
    let (mut list, mut unreadable) = (CaptionedImages::default(), BTreeMap::new());
    for path in ImageFolder::read(folder, true)?.images {
        let image = list.images.len();
        // Without a caption that can be read, it is a sample that cannot be used, and is named when its turn comes.
        match caption_beside(&path) {
            Some(Ok(caption)) => list.captions.push((caption, image)),
            Some(Err(reason)) => drop(unreadable.insert(image, reason)),
            None => {}
        }
        list.images.push(path.strip_prefix(folder).map(Path::to_path_buf).unwrap_or(path));
    }
    if list.captions.is_empty() {
        let reason = match unreadable.into_values().next() {
            Some(first) => format!("{} holds no caption that can be read; {first}", folder.display()),
            None => format!("{} holds neither tar files nor images with a .txt of the same name", folder.display()),
        };
        return Err(DataError::Name { reason });
    }
    Ok(Arc::new(ListedImages::new(list, folder).with_unreadable(unreadable)))
}

/// The caption in the `.txt` or `.TXT` beside an image, if there is one.
fn caption_beside(image: &Path) -> Option<Result<String, String>> {
    let path = ["txt", "TXT"].map(|ending| image.with_extension(ending)).into_iter().find(|path| path.is_file())?;
    let text = fs::read(&path).map_err(|error| error.to_string()).and_then(decode);
    Some(text.map_err(|reason| format!("{}: {reason}", path.display())))
}
