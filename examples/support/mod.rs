//! What the command lines of several examples share: copy what you need.
#![allow(dead_code, unused_imports, reason = "no example needs all of it")]

mod device;

use std::{fs, io, path::Path};

pub(crate) use device::device_by_name;

/// Writes a file beside `path` and renames it into place: whoever stops the program finds the old file or the new one.
pub(crate) fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    let path = path.as_ref();
    let aside = path.with_extension("tmp");
    fs::write(&aside, bytes)?;
    fs::rename(&aside, path)
}
