//! Folders of images.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use image::ImageFormat;

use super::{ListError, format_error};

/// What a folder holds, sorted. Names that begin with a dot are passed over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageFolder {
    /// Its images: files with the usual endings of PNG, JPEG, WebP, GIF, BMP and TIFF, and others that begin as such a file does.
    pub images: Vec<PathBuf>,
    /// What else it holds: files of other kinds, and folders that were not asked for or are links.
    pub others: Vec<PathBuf>,
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
    /// What else the folders hold, as in [`ImageFolder`].
    pub others: Vec<PathBuf>,
}

impl ImageFolder {
    /// Reads a folder, and its `subfolders` if that is asked for.
    ///
    /// # Errors
    /// When a folder cannot be read.
    pub fn read(folder: impl AsRef<Path>, subfolders: bool) -> Result<Self, ListError> {
        let mut found = Self::default();
        let mut folders = vec![folder.as_ref().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for path in entries(&folder)? {
                if is_image(&path) {
                    found.images.push(path);
                } else if subfolders && path.is_dir() && !path.is_symlink() {
                    folders.push(path);
                } else {
                    found.others.push(path);
                }
            }
        }
        found.images.sort();
        found.others.sort();
        Ok(found)
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
        let (classes, others): (Vec<PathBuf>, Vec<PathBuf>) = entries(folder)?.into_iter().partition(|path| path.is_dir());
        found.others = others;
        for class in classes {
            let ImageFolder { images, others } = ImageFolder::read(&class, false)?;
            if images.is_empty() {
                return Err(format_error(&class, "a class without an image: remove the folder, or put images in".into()));
            }
            found.class_of_image.resize(found.class_of_image.len() + images.len(), found.classes.len());
            found.images.extend(images);
            found.others.extend(others);
            found.classes.push(class.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
        if found.classes.is_empty() {
            return Err(format_error(folder, "no folder of a class".into()));
        }
        Ok(found)
    }
}

fn is_image(path: &Path) -> bool {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
    match ending.as_deref() {
        _ if !path.is_file() => false,
        Some("png" | "jpg" | "jpeg" | "jpe" | "jfif" | "webp" | "gif" | "bmp" | "tif" | "tiff") => true,
        _ => begins_as_an_image(path),
    }
}

/// For names without a usual ending. TIFF is left out: cameras' raw files begin as it does.
fn begins_as_an_image(path: &Path) -> bool {
    let mut start = Vec::new();
    let is_read = File::open(path).is_ok_and(|file| file.take(16).read_to_end(&mut start).is_ok());
    let kinds = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif];
    is_read && image::guess_format(&start).is_ok_and(|kind| kinds.contains(&kind))
}

/// What a folder holds, sorted, without the names that begin with a dot: macOS writes `._photo.jpg` beside each photo.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, ListError> {
    let io = |source| ListError::Io { path: folder.to_path_buf(), source };
    let entries = fs::read_dir(folder).map_err(io)?.collect::<Result<Vec<_>, _>>().map_err(io)?;
    let mut paths: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
    paths.retain(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names, relative to the folder.
    fn names(folder: &Path, paths: &[PathBuf]) -> Vec<String> {
        paths.iter().map(|path| path.strip_prefix(folder).unwrap().display().to_string()).collect()
    }

    #[test]
    fn images_are_told_by_name_or_content_and_subfolders_are_read_on_request() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let png: &[u8] = b"\x89PNG\r\n\x1a\n and so on";
        for (name, bytes) in [
            ("a.JPG", b"" as &[u8]),
            ("b.tiff", b""),
            ("c", png),
            ("c.jpg_large", png),
            ("d.txt", b"text"),
            ("raw.dng", b"II*\0 and so on"),
            ("._a.JPG", b""),
            ("sub/e.gif", b""),
            ("sub/deep/f.bmp", b""),
            (".hidden/g.png", b""),
        ] {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let found = ImageFolder::read(folder, false).unwrap();
        assert_eq!(names(folder, &found.images), ["a.JPG", "b.tiff", "c", "c.jpg_large"]);
        assert_eq!(names(folder, &found.others), ["d.txt", "raw.dng", "sub"]);
        #[cfg(unix)]
        std::os::unix::fs::symlink(folder, folder.join("sub/loop")).unwrap();
        let found = ImageFolder::read(folder, true).unwrap();
        assert_eq!(names(folder, &found.images), ["a.JPG", "b.tiff", "c", "c.jpg_large", "sub/deep/f.bmp", "sub/e.gif"]);
        #[cfg(unix)]
        assert_eq!(names(folder, &found.others), ["d.txt", "raw.dng", "sub/loop"]);
    }

    #[test]
    fn classes_are_folders() {
        let folder = tempfile::tempdir().unwrap();
        let files = [("dog", "2.png"), ("cat", "1.png"), ("dog", "1.JPG"), ("dog", "._1.JPG"), (".ipynb_checkpoints", "1.png")];
        for (class, file) in files {
            fs::create_dir_all(folder.path().join(class)).unwrap();
            fs::write(folder.path().join(class).join(file), "").unwrap();
        }
        fs::write(folder.path().join("dog/notes.txt"), "x").unwrap();
        let found = ClassifiedImages::folders(folder.path()).unwrap();
        assert_eq!(found.classes, ["cat", "dog"]);
        assert_eq!(found.class_of_image, [0, 1, 1]);
        assert_eq!(names(folder.path(), &found.others), ["dog/notes.txt"]);
        assert!(found.images[1].ends_with("dog/1.JPG"));
        assert!(ClassifiedImages::folders(folder.path().join("cat")).unwrap_err().to_string().ends_with("no folder of a class"));
        fs::create_dir(folder.path().join("empty")).unwrap();
        let error = ClassifiedImages::folders(folder.path()).unwrap_err().to_string();
        assert!(error.contains("empty: a class without an image"), "{error}");
    }
}
