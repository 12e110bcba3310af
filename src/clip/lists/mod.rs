//! Images and captions as data sets publish them, and as people write them.

mod folders;
mod published;
mod table;
mod text;

pub use folders::{ClassifiedImages, ImageFolder};
pub use table::Columns;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};
use text::read_text;

/// Images, and captions that each belong to one of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaptionedImages {
    /// Files, relative to the data set's image folder.
    pub images: Vec<PathBuf>,
    /// Captions with the index of their image; those of an image stand together.
    pub captions: Vec<(String, usize)>,
}

/// What of a list is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// The columns of a table, where they have no usual name.
    pub columns: Columns,
    /// The split (`train`, `val`, `test`, …) of a list that holds several; `all` for every one of them.
    pub split: Option<String>,
}

/// A list that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// The list holds several splits, and none of them is named.
    #[error("{}: the list holds the splits {}: name one of them, or `all`", path.display(), some_of(splits))]
    Splits {
        /// The file.
        path: PathBuf,
        /// Their names, sorted.
        splits: Vec<String>,
    },
    /// The file is of another kind, or names what is not there.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// One image of a list, as it is read.
struct Row {
    image: PathBuf,
    captions: Vec<String>,
    split: Option<String>,
}

impl CaptionedImages {
    /// Reads a list of any of these kinds, which its content tells:
    ///
    /// - a table with a line of names (comma, tab, semicolon or `|` between columns): images in a column called `path`, `filepath`, `image`,
    ///   `file_name` or the like, captions in `caption`, `title`, `text` or the like, in any case, or in those that `options` name. A caption's
    ///   cell may hold a JSON list of captions, and columns may be numbered (`caption_1`, `caption_2`; pandas'
    ///   `caption`, `caption.1`). Kaggle's forms of Flickr8k and
    ///   Flickr30k are such tables;
    /// - JSON lines, or one JSON list, of objects with such fields; a caption may be a text or a list of texts;
    /// - COCO's `captions_*.json`;
    /// - Karpathy and Fei-Fei's `dataset_coco.json`, `dataset_flickr30k.json`, `dataset_flickr8k.json`;
    /// - Flickr30k's `results_20130124.token` and Flickr8k's `Flickr8k.token.txt`: `NAME#NUMBER`, a tab, and a caption in every line.
    ///
    /// Paths may have been written on Windows. Several lines may name one image, which then has several captions. Images are in the order in which they are named first; those without
    /// a caption are left out of published lists. Published lists must name files inside of their folder; paths of a list of your own are as
    /// written.
    ///
    /// # Errors
    /// When the file cannot be read, is no UTF-8 or UTF-16, columns are not found, lines have no image or caption (the first three are named),
    /// or the list has several splits and none is named.
    pub fn read(path: impl AsRef<Path>, options: &ListOptions) -> Result<Self, ListError> {
        let path = path.as_ref();
        let text = read_text(path)?;
        let rows = match published::rows(&text) {
            Some(_) if options.columns != Columns::default() => Err("a published list, which has no columns to name".into()),
            Some(rows) => rows.and_then(|rows| rows.into_iter().map(published::inside).collect()),
            None => table::rows(&text, &options.columns),
        };
        let rows: Vec<Row> = rows.map_err(|reason| format_error(path, reason))?;
        let splits: BTreeSet<String> = rows.iter().filter_map(|row| row.split.clone()).collect();
        if options.split.is_none() && splits.len() > 1 {
            return Err(ListError::Splits { path: path.to_path_buf(), splits: splits.into_iter().collect() });
        }
        let rows = of_split(rows, &splits, options.split.as_deref()).map_err(|reason| format_error(path, reason))?;
        let list = Self::of(rows);
        if list.images.is_empty() {
            return Err(format_error(path, "no image with a caption".into()));
        }
        Ok(list)
    }

    /// The list without the images that are not among the `kept`, and without their captions.
    ///
    /// # Panics
    /// When an index is not below the number of images, or indices do not ascend.
    pub fn keep(&mut self, kept: &[usize]) {
        assert!(kept.is_sorted_by(|a, b| a < b), "images are kept in ascending order, got {kept:?}");
        let place: BTreeMap<usize, usize> = kept.iter().enumerate().map(|(new, old)| (*old, new)).collect();
        self.images = kept.iter().map(|image| self.images[*image].clone()).collect();
        let captions = std::mem::take(&mut self.captions).into_iter();
        self.captions = captions.filter_map(|(caption, image)| Some((caption, *place.get(&image)?))).collect();
    }

    /// Keeps the images of a split that is published as a file of names, one in every line (`Flickr_8k.testImages.txt`): file names, with or
    /// without their ending.
    ///
    /// # Errors
    /// When the file cannot be read, or names images that are not in the list (the first three are named); the list is then as it was.
    pub fn keep_named(&mut self, names: impl AsRef<Path>) -> Result<(), ListError> {
        let path = names.as_ref();
        let mut names: BTreeSet<String> = lines_in(path)?.iter().map(|name| path_of(name).to_string_lossy().into_owned()).collect();
        let text = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
        let mut named = BTreeSet::new();
        let mut kept = Vec::new();
        for (index, image) in self.images.iter().enumerate() {
            let forms = [image.to_string_lossy().into_owned(), text(image.file_name()), text(image.file_stem())];
            if let Some(name) = forms.into_iter().find(|name| names.contains(name)) {
                named.insert(name);
                kept.push(index);
            }
        }
        names.retain(|name| !named.contains(name));
        if !names.is_empty() {
            let first: Vec<&str> = names.iter().take(3).map(String::as_str).collect();
            let dots = if names.len() > 3 { ", …" } else { "" };
            let reason = format!("{} names are not in the list of images: {}{dots}", names.len(), first.join(", "));
            return Err(format_error(path, reason));
        }
        self.keep(&kept);
        Ok(())
    }

    /// The image of each caption.
    pub fn image_of_caption(&self) -> Vec<usize> {
        self.captions.iter().map(|(_, image)| *image).collect()
    }

    fn of(rows: Vec<Row>) -> Self {
        let mut list = Self::default();
        let mut place: BTreeMap<PathBuf, usize> = BTreeMap::new();
        for Row { image, mut captions, .. } in rows {
            captions.retain(|caption| !caption.is_empty());
            if captions.is_empty() {
                continue;
            }
            let index = *place.entry(image).or_insert_with_key(|image| {
                list.images.push(image.clone());
                list.images.len() - 1
            });
            list.captions.extend(captions.into_iter().map(|caption| (caption, index)));
        }
        list.captions.sort_by_key(|(_, image)| *image);
        list
    }
}

/// A path of a list, which may have been written on Windows, without parts that change nothing: `./a.jpg` and `a.jpg` are one image.
fn path_of(text: &str) -> PathBuf {
    let path = if cfg!(windows) { text.to_string() } else { text.replace('\\', "/") };
    Path::new(&path).components().filter(|part| *part != Component::CurDir).collect()
}

/// The rows of the split that is asked for.
fn of_split(rows: Vec<Row>, splits: &BTreeSet<String>, split: Option<&str>) -> Result<Vec<Row>, String> {
    match split {
        None | Some("all") => Ok(rows),
        Some(split) if splits.is_empty() => Err(format!("the list names no splits, and `{split}` is asked for")),
        Some(split) if !splits.contains(split) => Err(format!("no split `{split}`: the list holds {}", some_of(splits))),
        Some(split) => Ok(rows.into_iter().filter(|row| row.split.as_deref() == Some(split)).collect()),
    }
}

/// Names in short: the first eight.
fn some_of<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    names.into_iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// A text in every line: labels, captions. Blanks at the ends of lines, a byte order mark and empty lines at the end do not count.
///
/// # Errors
/// When the file cannot be read, is no UTF-8 or UTF-16, holds no text, or has an empty line before its last one.
pub fn lines_in(path: impl AsRef<Path>) -> Result<Vec<String>, ListError> {
    let path = path.as_ref();
    let lines: Vec<String> = read_text(path)?.trim_end().lines().map(|line| line.trim().to_string()).collect();
    match lines.iter().position(String::is_empty) {
        None if lines.is_empty() => Err(format_error(path, "an empty file: a text is expected in every line".into())),
        Some(line) => Err(format_error(path, format!("line {} is empty: every line is a text", line + 1))),
        None => Ok(lines),
    }
}

fn format_error(path: &Path, reason: String) -> ListError {
    ListError::Format { path: path.to_path_buf(), reason }
}
