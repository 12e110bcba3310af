//! Images and captions as data sets publish them, and as people write them.

mod table;

pub use table::Columns;

use std::{
    collections::BTreeMap,
    fs,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

/// Images, and captions that each belong to one of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CaptionedImages {
    /// Files, relative to the data set's image folder.
    pub images: Vec<PathBuf>,
    /// Captions with the index of their image.
    pub captions: Vec<(String, usize)>,
}

/// Images of known classes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClassifiedImages {
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Files.
    pub images: Vec<PathBuf>,
    /// The class of each image.
    pub class_of_image: Vec<usize>,
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
    /// The file is of another kind, or names what is not there.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Deserialize)]
struct Coco {
    images: Vec<CocoImage>,
    annotations: Vec<CocoCaption>,
}

#[derive(Deserialize)]
struct CocoImage {
    id: u64,
    file_name: PathBuf,
}

#[derive(Deserialize)]
struct CocoCaption {
    image_id: u64,
    caption: String,
}

#[derive(Deserialize)]
struct Karpathy {
    images: Vec<KarpathyImage>,
}

#[derive(Deserialize)]
struct KarpathyImage {
    #[serde(default)]
    filepath: PathBuf,
    filename: PathBuf,
    split: String,
    sentences: Vec<KarpathySentence>,
}

#[derive(Deserialize)]
struct KarpathySentence {
    raw: String,
}

impl CaptionedImages {
    /// COCO's `captions_*.json`. Images without a caption are left out.
    ///
    /// # Errors
    /// When the file cannot be read or is of another kind, or a caption names an image that is not there.
    pub fn coco(path: impl AsRef<Path>) -> Result<Self, ListError> {
        let path = path.as_ref();
        let file: Coco = json(path)?;
        let mut captions_of: BTreeMap<u64, Vec<String>> = file.images.iter().map(|image| (image.id, Vec::new())).collect();
        for annotation in file.annotations {
            let Some(captions) = captions_of.get_mut(&annotation.image_id) else {
                return Err(format_error(path, format!("a caption names image {}, which is not there", annotation.image_id)));
            };
            captions.push(annotation.caption);
        }
        Self::of(path, file.images.into_iter().map(|image| (image.file_name, captions_of.remove(&image.id).unwrap_or_default())))
    }

    /// A split (`test`, `val`, …) of Karpathy and Fei-Fei's `dataset_coco.json` or `dataset_flickr30k.json`.
    ///
    /// # Errors
    /// When the file cannot be read or is of another kind, or the split is empty.
    pub fn karpathy(path: impl AsRef<Path>, split: &str) -> Result<Self, ListError> {
        let path = path.as_ref();
        let file: Karpathy = json(path)?;
        let chosen = file.images.into_iter().filter(|image| image.split == split);
        let image = |image: KarpathyImage| {
            (image.filepath.join(image.filename), image.sentences.into_iter().map(|sentence| sentence.raw).collect())
        };
        Self::of(path, chosen.map(image))
    }

    /// Flickr30k's `results_20130124.token`: `NAME#NUMBER`, a tab, and the caption in every line.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is of another kind.
    pub fn flickr30k(path: impl AsRef<Path>) -> Result<Self, ListError> {
        let path = path.as_ref();
        let mut order = Vec::new();
        let mut captions_of: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (index, line) in read(path)?.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let parts = line.split_once('\t').and_then(|(name, caption)| Some((name.rsplit_once('#')?.0, caption)));
            let Some((name, caption)) = parts else {
                return Err(format_error(path, format!("line {}: expected `NAME#NUMBER`, a tab and a caption", index + 1)));
            };
            captions_of.entry(name.to_string()).or_insert_with(|| {
                order.push(name.to_string());
                Vec::new()
            });
            captions_of.get_mut(name).expect("it was put there").push(caption.trim().to_string());
        }
        Self::of(path, order.into_iter().map(|name| (PathBuf::from(&name), captions_of.remove(&name).unwrap_or_default())))
    }

    /// The list without the images that are not among the `kept`, which are indices in ascending order, and without their captions.
    pub fn keep(&mut self, kept: &[usize]) {
        let place: BTreeMap<usize, usize> = kept.iter().enumerate().map(|(new, old)| (*old, new)).collect();
        self.images = kept.iter().map(|image| self.images[*image].clone()).collect();
        let captions = std::mem::take(&mut self.captions).into_iter();
        self.captions = captions.filter_map(|(caption, image)| Some((caption, *place.get(&image)?))).collect();
    }

    /// The image of each caption.
    pub fn image_of_caption(&self) -> Vec<usize> {
        self.captions.iter().map(|(_, image)| *image).collect()
    }

    fn of(path: &Path, images: impl Iterator<Item = (PathBuf, Vec<String>)>) -> Result<Self, ListError> {
        let mut list = Self::default();
        for (file, captions) in images.filter(|(_, captions)| !captions.is_empty()) {
            // A list must not decide which files outside of its folder are read.
            if !file.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(format_error(path, format!("{} is not inside the folder of images", file.display())));
            }
            let image = list.images.len();
            list.images.push(file);
            list.captions.extend(captions.into_iter().map(|caption| (caption, image)));
        }
        if list.images.is_empty() {
            return Err(format_error(path, "no image with a caption".into()));
        }
        Ok(list)
    }
}

impl ClassifiedImages {
    /// A folder of class folders, as ImageNet is laid out; classes and images are sorted by name, and classes have the names of their
    /// folders.
    ///
    /// # Errors
    /// When a folder cannot be read, there is no class, or a class has no image.
    pub fn folders(folder: impl AsRef<Path>) -> Result<Self, ListError> {
        let folder = folder.as_ref();
        let mut found = Self::default();
        for class in entries(folder)?.into_iter().filter(|path| path.is_dir() && !is_hidden(path)) {
            let images = images_in(&class)?;
            if images.is_empty() {
                return Err(format_error(&class, "a class without an image: remove the folder, or put images in".into()));
            }
            for image in images {
                found.images.push(image);
                found.class_of_image.push(found.classes.len());
            }
            found.classes.push(class.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        if found.classes.is_empty() {
            return Err(format_error(folder, "no folder of a class".into()));
        }
        Ok(found)
    }
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

/// The PNG, JPEG and WebP files of a folder, by their names' endings, sorted. Names that begin with a dot are passed over.
///
/// # Errors
/// When the folder cannot be read.
pub fn images_in(folder: impl AsRef<Path>) -> Result<Vec<PathBuf>, ListError> {
    Ok(entries(folder.as_ref())?.into_iter().filter(|path| is_image(path)).collect())
}

/// The files and folders of a folder that [`images_in`] passes over, but for those whose names begin with a dot, sorted.
///
/// # Errors
/// When the folder cannot be read.
pub fn others_in(folder: impl AsRef<Path>) -> Result<Vec<PathBuf>, ListError> {
    Ok(entries(folder.as_ref())?.into_iter().filter(|path| !is_image(path) && !is_hidden(path)).collect())
}

fn is_image(path: &Path) -> bool {
    let ending = path.extension().and_then(|ending| ending.to_str()).map(str::to_lowercase);
    // What macOS writes beside each photo (`._photo.jpg`) has its ending, too.
    let is_named = matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg" | "jpe" | "jfif" | "webp"));
    is_named && !is_hidden(path) && path.is_file()
}

/// What a folder holds, sorted.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, ListError> {
    let io = |source| ListError::Io { path: folder.to_path_buf(), source };
    let entries = fs::read_dir(folder).map_err(io)?.collect::<Result<Vec<_>, _>>().map_err(io)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.sort();
    Ok(paths)
}

/// A text without its byte order mark.
fn read(path: &Path) -> Result<String, ListError> {
    let bytes = fs::read(path).map_err(|source| ListError::Io { path: path.to_path_buf(), source })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
        format_error(path, format!("line {line} is no UTF-8: save the file in this encoding"))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(text) => text.to_string(),
        None => text,
    })
}

/// A text in every line: labels, captions. Blanks at the ends of lines, a byte order mark and empty lines at the end do not count.
///
/// # Errors
/// When the file cannot be read, is no UTF-8, or has an empty line before its last one.
pub fn lines_in(path: impl AsRef<Path>) -> Result<Vec<String>, ListError> {
    let path = path.as_ref();
    let lines: Vec<String> = read(path)?.trim_end().lines().map(|line| line.trim().to_string()).collect();
    match lines.iter().position(String::is_empty) {
        Some(line) => Err(format_error(path, format!("line {} is empty: every line is a text", line + 1))),
        None => Ok(lines),
    }
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, ListError> {
    serde_json::from_str(&read(path)?).map_err(|error| format_error(path, format!("not the JSON that was expected: {error}")))
}

fn format_error(path: &Path, reason: String) -> ListError {
    ListError::Format { path: path.to_path_buf(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list");
        fs::write(&path, text).unwrap();
        (folder, path)
    }

    fn two_images() -> CaptionedImages {
        let captions = [("one", 0), ("two", 0), ("three", 1)].map(|(caption, image)| (caption.to_string(), image));
        CaptionedImages { images: vec!["b.jpg".into(), "a.jpg".into()], captions: captions.to_vec() }
    }

    #[test]
    fn all_three_kinds_of_lists_say_the_same() {
        let (_a, coco) = written(
            r#"{"images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 1, "file_name": "none.jpg"}],
            "annotations": [{"image_id": 7, "caption": "one", "id": 1}, {"image_id": 3, "caption": "three"}, {"image_id": 7, "caption": "two"}]}"#,
        );
        assert_eq!(CaptionedImages::coco(coco).unwrap(), two_images());
        let (_b, karpathy) = written(
            r#"{"images": [{"filename": "b.jpg", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
            {"filename": "c.jpg", "split": "train", "sentences": [{"raw": "no"}]},
            {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "three"}]}], "dataset": "x"}"#,
        );
        assert_eq!(CaptionedImages::karpathy(&karpathy, "test").unwrap(), two_images());
        let error = CaptionedImages::karpathy(&karpathy, "val").unwrap_err().to_string();
        assert!(error.ends_with("no image with a caption"), "{error}");
        let (_c, flickr) = written("b.jpg#0\tone\nb.jpg#1\ttwo\n\na.jpg#0\tthree \n");
        assert_eq!(CaptionedImages::flickr30k(flickr).unwrap(), two_images());
    }

    #[test]
    fn lists_of_another_kind_are_named() {
        let (_a, path) = written("b.jpg one");
        assert!(
            CaptionedImages::flickr30k(&path)
                .unwrap_err()
                .to_string()
                .ends_with("line 1: expected `NAME#NUMBER`, a tab and a caption")
        );
        assert!(CaptionedImages::coco(&path).unwrap_err().to_string().contains("not the JSON that was expected"));
        let (_b, path) = written(r#"{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}"#);
        assert!(CaptionedImages::coco(&path).unwrap_err().to_string().ends_with("a caption names image 5, which is not there"));
        let (_c, path) = written("../secret.jpg#0\tx");
        assert!(CaptionedImages::flickr30k(&path).unwrap_err().to_string().ends_with("is not inside the folder of images"));
    }

    #[test]
    fn classes_are_folders() {
        let folder = tempfile::tempdir().unwrap();
        let files = [("dog", "2.png"), ("cat", "1.png"), ("dog", "1.JPG"), ("dog", "._1.JPG"), (".ipynb_checkpoints", "1.png")];
        for (class, file) in files {
            fs::create_dir_all(folder.path().join(class)).unwrap();
            fs::write(folder.path().join(class).join(file), "").unwrap();
        }
        let found = ClassifiedImages::folders(folder.path()).unwrap();
        assert_eq!(found.classes, ["cat", "dog"]);
        assert_eq!(found.class_of_image, [0, 1, 1]);
        let others = others_in(folder.path()).unwrap();
        assert_eq!(others, ["cat", "dog"].map(|class| folder.path().join(class)));
        assert!(found.images[1].ends_with("dog/1.JPG"));
        assert!(ClassifiedImages::folders(folder.path().join("cat")).unwrap_err().to_string().ends_with("no folder of a class"));
        fs::create_dir(folder.path().join("empty")).unwrap();
        let error = ClassifiedImages::folders(folder.path()).unwrap_err().to_string();
        assert!(error.contains("empty: a class without an image"), "{error}");
    }
}
