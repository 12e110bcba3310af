//! Turns emoji icon packages from npm into the training pack of burn-moe.
//!
//! `build.sh` beside this crate fetches the pinned packages and runs this program.

mod concepts;
mod error;
mod iconset;
mod matching;
mod notice;
mod pack;
mod sheet;
mod slug;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Packs emoji icon packages into sprite sheets and captions.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Args {
    /// The folder with the unpacked npm packages, each in a folder `<short name>`
    #[arg(long)]
    sources: PathBuf,
    /// The folder that the pack is written to
    #[arg(long)]
    out: PathBuf,
    /// Skip the slow tight packing of the sheets (for trials)
    #[arg(long)]
    fast: bool,
    /// Also write which icon was taken for which concept, as TSV
    #[arg(long)]
    matches: Option<PathBuf>,
}

fn main() -> ExitCode {
    match pack::run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("emoji-pack: {error}");
            ExitCode::FAILURE
        }
    }
}
