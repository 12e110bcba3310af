//! Writing files so that a run killed at any moment leaves the old file or the new one.

use std::{fs, io, io::Write, path::Path};

/// Writes `bytes` beside `path`, flushes them to the disk and renames them into place.
///
/// # Errors
/// Of the file system; `path` is then as it was.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    write_aside(path.as_ref(), |error| error, |aside| fs::File::create(aside)?.write_all(bytes))
}

/// Lets `write` make a file beside `path`, flushes it to the disk and renames it into place. On an error nothing is left of it.
pub(crate) fn write_aside<E>(
    path: &Path,
    of_io: impl Fn(io::Error) -> E,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let no_name = || of_io(io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"));
    let name = path.file_name().ok_or_else(no_name)?;
    let aside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let whole = || {
        write(&aside)?;
        fs::File::options()
            .write(true)
            .open(&aside)
            .and_then(|file| file.sync_all())
            .and_then(|()| fs::rename(&aside, path))
            .map_err(&of_io)
    };
    whole().inspect_err(|_| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&aside);
    })
}
