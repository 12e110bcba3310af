//! What the command lines of several examples share: copy what you need.
#![allow(dead_code, unused_imports, reason = "no example needs all of it")]

mod device;

use std::{fs, io, path::Path};

pub(crate) use device::device_by_name;

/// Writes a file beside `path` and renames it into place: whoever stops the program finds the old file or the new one.
pub(crate) fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    let path = path.as_ref();
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"))?;
    let aside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    fs::write(&aside, bytes).and_then(|()| fs::rename(&aside, path)).inspect_err(|_| drop(fs::remove_file(&aside)))
}
