//! What the command lines of several examples share: copy what you need.
#![allow(dead_code, unused_imports, reason = "no example needs all of it")]

mod args;
mod device;

use std::{
    error::Error,
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

pub(crate) use args::{ImageArgs, ListArgs, ModelArgs, Stored};
use burn_moe::clip::{lists::ImageFolder, tokenizer::ClipTokenizer};
pub(crate) use device::device_by_name;
use indicatif::{ProgressBar, ProgressStyle};

/// Writes a file beside `path` and renames it into place: whoever stops the program finds the old file or the new one.
pub(crate) fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
    let path = path.as_ref();
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path has no file name"))?;
    let aside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    fs::write(&aside, bytes).and_then(|()| fs::rename(&aside, path)).inspect_err(|_| drop(fs::remove_file(&aside)))
}

/// The files that say that a folder holds a checkpoint, one for each layout, in the order in which they are looked for.
const CONFIGS: [&str; 4] = ["burn_moe_config.json", "open_clip_config.json", "moevie_config.json", "config.json"];

/// Removes what says that a folder holds a checkpoint of a layout that would be read in place of the one that was written over it.
pub(crate) fn remove_layouts_before(folder: &Path, written: &str) -> Result<(), Box<dyn Error>> {
    for path in CONFIGS.into_iter().take_while(|name| *name != written).map(|name| folder.join(name)) {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(format!("{}: {error}", path.display()).into()),
            _ => {}
        }
    }
    Ok(())
}

/// Refuses a folder that holds a checkpoint, so that none is lost.
pub(crate) fn refuse_checkpoint(folder: &Path, overwrite: bool) -> Result<(), Box<dyn Error>> {
    match CONFIGS.into_iter().find(|name| !overwrite && folder.join(name).exists()) {
        Some(name) => {
            let folder = folder.display();
            Err(format!("{folder} holds a checkpoint ({name}): take another --out, or write over it with --overwrite").into())
        }
        None => Ok(()),
    }
}

/// Makes the folder that a file goes into, and refuses a path that no file can be written to, before the work for it is done.
pub(crate) fn prepare_file(path: &Path) -> Result<(), Box<dyn Error>> {
    let bad = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    if path.is_dir() {
        return Err(bad(&"it is a folder, and a file is to be written").into());
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|error| bad(&error))?;
    // Written and removed: permissions alone do not tell.
    let trial = folder.join(format!(".{}.tmp", std::process::id()));
    fs::write(&trial, b"").and_then(|()| fs::remove_file(&trial)).map_err(|error| bad(&error))?;
    Ok(())
}

/// The emoji pack's languages of these codes; the code `all` names every one.
#[cfg(feature = "train")]
pub(crate) fn languages_by_code(codes: &[String]) -> Result<Vec<burn_moe::train::data::Language>, Box<dyn Error>> {
    use burn_moe::train::data::Language;

    let named = |code: &String| {
        let found = Language::ALL.into_iter().find(|language| language.code() == code);
        found.ok_or_else(|| {
            format!("`{code}` is no language of the emoji pack: it has {}, or all", Language::ALL.map(|l| l.code()).join(", "))
                .into()
        })
    };
    if codes == ["all"] {
        return Ok(Language::ALL.to_vec());
    }
    codes.iter().map(named).collect()
}

/// The emoji pack's vendor of this name, among those.
#[cfg(feature = "train")]
pub(crate) fn vendor_by_name(
    name: &str,
    among: &[burn_moe::train::data::EmojiVendor],
) -> Result<burn_moe::train::data::EmojiVendor, Box<dyn Error>> {
    among.iter().copied().find(|vendor| vendor.name() == name).ok_or_else(|| {
        let names: Vec<_> = among.iter().map(|vendor| vendor.name()).collect();
        format!("`{name}` is no vendor for this: expected one of {}", names.join(", ")).into()
    })
}

/// The images of a folder; says what else it holds.
pub(crate) fn images_in(folder: &Path, recursive: bool) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let ImageFolder { images, others } = ImageFolder::read(folder, recursive)?;
    report_passed_over(&others);
    if images.is_empty() {
        return Err(format!("{} holds no image that can be read", folder.display()).into());
    }
    Ok(images)
}

/// The first two names that CLIP's tokenizer reads alike, in words: no model tells their classes apart.
pub(crate) fn equal_names(names: &[String]) -> Option<String> {
    let first = ClipTokenizer::new().same_text(names);
    let place = (0..names.len()).find(|place| first[*place] != *place)?;
    Some(format!("{} and {} are the same name, \"{}\"", first[place] + 1, place + 1, names[place]))
}

/// Says what was passed over in a folder.
pub(crate) fn report_passed_over(others: &[PathBuf]) {
    let (folders, files): (Vec<_>, Vec<_>) = others.iter().partition(|path| path.is_dir());
    let of = |what: &str, paths: &[&PathBuf]| {
        if let Some(first) = paths.first() {
            eprintln!("passed over {} {what}, such as {}", paths.len(), first.display());
        }
    };
    of("files that are no PNG, JPEG, WebP, GIF, BMP or TIFF", &files);
    of("subfolders", &folders);
}

/// A progress bar with a rate and the time that is left; it shows nothing where the output is no terminal.
pub(crate) fn progress(what: &'static str, count: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} {per_sec} {elapsed} of {duration}");
    ProgressBar::new(count as u64).with_style(style.expect("a template that indicatif reads")).with_prefix(what)
}

/// The link to a file, for a page: what a URL cannot hold is percent-encoded, byte by byte.
pub(crate) fn file_url(path: &Path) -> String {
    let encoded = path.to_string_lossy().replace('\\', "/").bytes().fold(String::new(), |url, byte| match byte {
        b'/' | b'-' | b'_' | b'.' | b'~' => url + &char::from(byte).to_string(),
        byte if byte.is_ascii_alphanumeric() => url + &char::from(byte).to_string(),
        byte => url + &format!("%{byte:02X}"),
    });
    // Windows: `C:` has no slash in front.
    let root = if encoded.starts_with('/') { "" } else { "/" };
    format!("file://{root}{}", encoded.replace("%3A", ":"))
}

/// Runs a program. An error is printed as a sentence with its causes, and the status is then 1.
pub(crate) fn run(program: impl FnOnce() -> Result<(), Box<dyn Error>>) -> ExitCode {
    match program() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

/// The error's text, and that of each cause which does not repeat it.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Says which images were skipped: all of them, or the first ten and how many more. With `strict`, or when none was `kept`, it is an error.
pub(crate) fn report_skipped<E: Error>(skipped: &[E], kept: usize, strict: bool) -> Result<(), Box<dyn Error>> {
    if skipped.is_empty() {
        return Ok(());
    }
    match skipped.len() {
        1 => eprintln!("1 image was skipped:"),
        count => eprintln!("{count} images were skipped:"),
    }
    skipped.iter().take(10).for_each(|error| eprintln!("  {}", with_causes(error)));
    if skipped.len() > 10 {
        eprintln!("  and {} more", skipped.len() - 10);
    }
    if kept == 0 {
        return Err("no image can be read".into());
    }
    if strict { Err("images were skipped, and --strict forbids it".into()) } else { Ok(()) }
}
