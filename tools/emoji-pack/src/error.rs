//! The errors of the packer; each names the thing that it is about.

use std::path::PathBuf;

/// Everything that can go wrong while the pack is made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{} is not the JSON that was expected: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("cannot turn {what} into JSON: {source}")]
    ToJson { what: String, source: serde_json::Error },
    #[error("{package}: the licence is {found:?}, but {expected:?} was expected")]
    Licence { package: String, expected: String, found: String },
    #[error("icon set {set}: alias {name:?} leads to {parent:?}, which does not exist")]
    DanglingAlias { set: String, name: String, parent: String },
    #[error("icon set {set}: the aliases of {name:?} are nested too deeply or form a ring")]
    AliasRing { set: String, name: String },
    #[error("icon set {set}: icon {name:?} asks for a rotation, which is not supported")]
    Rotation { set: String, name: String },
    #[error("icon set {set}: icon {name:?} has an empty or negative view box {width} x {height}")]
    ViewBox { set: String, name: String, width: f32, height: f32 },
    #[error("icon set {set}: icon {name:?} is no valid SVG: {source}")]
    Svg { set: String, name: String, source: resvg::usvg::Error },
    #[error("icon set {set}: no picture buffer of {size} x {size} could be made for {name:?}")]
    Pixmap { set: String, name: String, size: u32 },
    #[error("these labels are shared by more than one concept: {}", labels.join("; "))]
    DuplicateLabels { labels: Vec<String> },
    #[error("these hexcodes are shared by more than one concept: {}", hexcodes.join("; "))]
    DuplicateHexcodes { hexcodes: Vec<String> },
    #[error("the name table for {set} names {name:?}, which the set does not have")]
    UnknownOverride { set: String, name: String },
    #[error("the name table for {set} maps {name:?} to {hexcode}, which emojibase does not have")]
    UnknownHexcode { set: String, name: String, hexcode: String },
    #[error("line {line} of the name table {table} is not `name<TAB>hexcode<TAB>reason`: {text:?}")]
    BadTableLine { table: String, line: usize, text: String },
    #[error("the picture of sheet {sheet} has {found} bytes, but {expected} were expected")]
    SheetSize { sheet: String, expected: usize, found: usize },
    #[error("sheet {sheet} could not be encoded as PNG: {source}")]
    Encode { sheet: String, source: image::ImageError },
    #[error("sheet {sheet} could not be packed tighter: {source}")]
    Optimise { sheet: String, source: oxipng::PngError },
    #[error("{package}: the field {field} is missing")]
    MissingField { package: String, field: &'static str },
    #[error("the pack has {found} bytes, more than the {limit} that are allowed")]
    TooBig { found: u64, limit: u64 },
}

/// The result type of the packer.
pub type Result<T> = std::result::Result<T, Error>;
