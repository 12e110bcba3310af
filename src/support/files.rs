//! Writing files so that a run killed at any moment leaves the old file or the new one.

use std::{fs, io, io::Write, path::Path};

/// Writes `bytes` beside `path`, flushes them to the disk and renames them into place.
///
/// # Errors
/// Of the file system; `path` is then as it was.
pub(crate) fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    write_aside(path.as_ref(), |error| error, |aside| fs::File::create(aside)?.write_all(bytes))
}

/// Lets `write` make a file beside `path`, gives it the mode of a new file, flushes it to the disk and renames it into place. On an error,
/// nothing is left of it.
pub(crate) fn write_aside<E>(
    path: &Path,
    of_io: impl Fn(io::Error) -> E,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let no_name = || of_io(io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"));
    let name = path.file_name().ok_or_else(no_name)?;
    let aside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let whole = || {
        // What a new file here may be read by; some writers make theirs for the owner alone.
        let permissions = fs::File::create(&aside).and_then(|file| file.metadata()).map_err(&of_io)?.permissions();
        write(&aside)?;
        fs::set_permissions(&aside, permissions)
            .and_then(|()| fs::File::options().write(true).open(&aside)?.sync_all())
            .and_then(|()| fs::rename(&aside, path))
            .map_err(&of_io)
    };
    whole().inspect_err(|_| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&aside);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn files_have_the_mode_of_a_new_file_whoever_writes_them() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| fs::metadata(folder.path().join(name)).unwrap().permissions().mode();
        fs::write(folder.path().join("plain"), "").unwrap();
        // As safetensors writes: another file, for its owner alone, renamed into place.
        let private = |aside: &Path| {
            let file = tempfile::NamedTempFile::new_in(folder.path())?;
            file.persist(aside).map(|_| ()).map_err(|error| error.error)
        };
        write_aside(&folder.path().join("private"), |error| error, private).unwrap();
        write_atomic(folder.path().join("bytes"), b"x").unwrap();
        assert_eq!((mode("private"), mode("bytes")), (mode("plain"), mode("plain")));
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        // A folder in the way: the rename fails, and nothing stays behind.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        fs::write(taken.join("x"), b"").unwrap();
        assert!(write_atomic(&taken, b"new").is_err());
        let mut left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["file", "taken"]);
    }
}
