//! Licences, notices and the README of the pack.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::iconset::read_json;
use crate::pack::{LANGUAGES, TEST_VENDOR, VENDORS};
use crate::sheet::{PER_ROW, TILE};

/// Where a part of the pack comes from.
#[derive(Debug)]
pub struct Source {
    /// The vendor's name in the pack, or the name of the data package.
    pub short: &'static str,
    pub npm: &'static str,
    pub title: &'static str,
    pub author: &'static str,
    pub copyright: &'static str,
    pub upstream: &'static str,
    /// The licence that the npm package must state.
    pub licence: &'static str,
    pub licence_file: &'static str,
    /// What else the reader must know.
    pub remark: &'static str,
}

const APACHE_FILE: &str = "LICENSE-APACHE-2.0.txt";
const CC_BY_FILE: &str = "LICENSE-CC-BY-4.0.txt";
const MIT_FLUENT_FILE: &str = "LICENSE-MIT-fluent-emoji-flat.txt";
const MIT_EMOJIBASE_FILE: &str = "LICENSE-MIT-emojibase-data.txt";
const FLUENT_COPYRIGHT: &str = "Copyright (c) Microsoft Corporation.";

/// All sources of the pack.
pub const SOURCES: [Source; 7] = [
    Source {
        short: "noto",
        npm: "@iconify-json/noto",
        title: "Noto Emoji",
        author: "Google Inc. and the Noto Emoji contributors",
        copyright: "Copyright 2013 Google, Inc. All Rights Reserved.",
        upstream: "https://github.com/googlefonts/noto-emoji",
        licence: "Apache-2.0",
        licence_file: APACHE_FILE,
        remark: "",
    },
    Source {
        short: "noto-v1",
        npm: "@iconify-json/noto-v1",
        title: "Noto Emoji, first version",
        author: "Google Inc. and the Noto Emoji contributors",
        copyright: "Copyright 2013 Google, Inc. All Rights Reserved.",
        upstream: "https://github.com/googlefonts/noto-emoji",
        licence: "Apache-2.0",
        licence_file: APACHE_FILE,
        remark: "",
    },
    Source {
        short: "fxemoji",
        npm: "@iconify-json/fxemoji",
        title: "FxEmojis (Firefox OS Emoji)",
        author: "Mozilla (Mozilla Foundation)",
        copyright: "Copyright 2015, Mozilla Foundation",
        upstream: "https://github.com/mozilla/fxemoji",
        licence: "Apache-2.0",
        licence_file: APACHE_FILE,
        remark: "The npm package states Apache-2.0. The licence file of the upstream project states \
                 Apache-2.0 for its code and Creative Commons Attribution 4.0 International for its \
                 drawings. This notice meets the terms of both; the text of the second is in \
                 `LICENSE-CC-BY-4.0.txt`, and the work comes without any warranty.",
    },
    Source {
        short: "fluent-emoji-flat",
        npm: "@iconify-json/fluent-emoji-flat",
        title: "Fluent Emoji, flat style",
        author: "Microsoft Corporation",
        copyright: FLUENT_COPYRIGHT,
        upstream: "https://github.com/microsoft/fluentui-emoji",
        licence: "MIT",
        licence_file: MIT_FLUENT_FILE,
        remark: "",
    },
    Source {
        short: "emojione",
        npm: "@iconify-json/emojione",
        title: "EmojiOne 2 (EmojiTwo)",
        author: "Ranks.com (EmojiOne 2.2) and the EmojiTwo community",
        copyright: "Emoji artwork is provided by EmojiTwo (https://crissov.github.io/emojitwo/), originally \
                    released as EmojiOne 2.2 (https://www.emojione.com) by Ranks.com (http://www.ranks.com) with \
                    contributions from the EmojiTwo community.",
        upstream: "https://github.com/EmojiTwo/emojitwo",
        licence: "CC-BY-4.0",
        licence_file: CC_BY_FILE,
        remark: "The work comes without any warranty (section 5 of the licence). Neither Ranks.com nor \
                 the EmojiTwo community endorses this pack.",
    },
    Source {
        short: "twemoji",
        npm: "@iconify-json/twemoji",
        title: "Twemoji (Twitter Emoji)",
        author: "Twitter, Inc and other contributors; now kept by the jdecked/twemoji contributors",
        copyright: "Copyright (c) 2014-2021 Twitter, Inc and other contributors; Copyright (c) 2022-present Jason Sofonia & Justine De Caires",
        upstream: "https://github.com/jdecked/twemoji",
        licence: "CC-BY-4.0",
        licence_file: CC_BY_FILE,
        remark: "The work comes without any warranty (section 5 of the licence). Its authors do not \
                 endorse this pack.",
    },
    Source {
        short: "emojibase-data",
        npm: "emojibase-data",
        title: "Emojibase data",
        author: "Miles Johnson",
        copyright: "Copyright (c) 2017-2019 Miles Johnson",
        upstream: "https://github.com/milesj/emojibase",
        licence: "MIT",
        licence_file: MIT_EMOJIBASE_FILE,
        remark: "",
    },
];

/// What `package.json` tells.
#[derive(Debug, Deserialize)]
pub struct Package {
    version: Option<String>,
    license: Option<String>,
}

/// What `info.json` of an icon set tells.
#[derive(Debug, Deserialize)]
struct Info {
    license: InfoLicence,
}

#[derive(Debug, Deserialize)]
struct InfoLicence {
    spdx: String,
}

/// The figures of a pack.
#[derive(Debug, Default)]
pub struct Figures {
    pub concepts: usize,
    pub without_picture: usize,
    pub test_pairs: usize,
    pub images: BTreeMap<&'static str, usize>,
    pub twins: BTreeMap<&'static str, usize>,
    pub sizes: BTreeMap<String, usize>,
}

impl Figures {
    fn training_images(&self) -> usize {
        let training = self.images.iter();
        let training = training.filter(|(vendor, _)| **vendor != TEST_VENDOR);
        training.map(|(_, count)| count).sum()
    }
}

/// Reads the version of every package and checks that its licence is the one that is known.
pub fn check_packages(sources: &Path) -> Result<BTreeMap<&'static str, String>> {
    let mut versions = BTreeMap::new();
    for source in &SOURCES {
        let folder = sources.join(source.short);
        let package: Package = read_json(&folder.join("package.json"))?;
        let missing = |field| Error::MissingField { package: source.npm.to_owned(), field };
        let version = package.version.ok_or_else(|| missing("version"))?;
        let mut stated = vec![package.license.ok_or_else(|| missing("license"))?];
        let info = folder.join("info.json");
        if info.exists() {
            stated.push(read_json::<Info>(&info)?.license.spdx);
        }
        for found in stated {
            if found != source.licence {
                return Err(Error::Licence { package: source.npm.to_owned(), expected: source.licence.to_owned(), found });
            }
        }
        versions.insert(source.short, version);
    }
    Ok(versions)
}

/// The full licence texts, each once.
pub fn licence_texts(sources: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    #[derive(Deserialize)]
    struct Spdx {
        #[serde(rename = "licenseText")]
        text: String,
    }
    let mut files = Vec::new();
    for (id, file) in [("Apache-2.0", APACHE_FILE), ("CC-BY-4.0", CC_BY_FILE)] {
        let path = sources.join(format!("spdx-license-list/licenses/{id}.json"));
        let text = read_json::<Spdx>(&path)?.text;
        files.push((file.to_owned(), tidy(&text)));
    }
    let path = sources.join("emojibase-data/LICENSE");
    let mit = std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
    let fluent: Vec<&str> = mit
        .lines()
        .map(|line| match line.starts_with("Copyright (c)") {
            true => FLUENT_COPYRIGHT,
            false => line,
        })
        .collect();
    files.push((MIT_FLUENT_FILE.to_owned(), tidy(&fluent.join("\n"))));
    files.push((MIT_EMOJIBASE_FILE.to_owned(), tidy(&mit)));
    Ok(files)
}

/// Takes spaces off the line ends and ends the text with one newline.
fn tidy(text: &str) -> Vec<u8> {
    let lines: Vec<&str> = text.trim().lines().map(str::trim_end).collect();
    (lines.join("\n") + "\n").into_bytes()
}

/// The notice of one source.
pub fn notice(source: &Source, version: &str) -> String {
    let Source { short, npm, title, author, copyright, upstream, licence, licence_file, remark } = source;
    let what = if VENDORS.contains(short) {
        format!(
            "The drawings were rasterised to {TILE} x {TILE} px over white and packed in a sprite sheet, \
             `{short}.png`. Drawings without a concept in this pack (skin tones, flags of places and \
             others) were left out."
        )
    } else {
        format!(
            "Labels, tags, groups and order of the emoji were taken from it, in English for \
             `captions.jsonl` and in {} for `captions-multilingual.jsonl`. Skin tones, components and \
             flags of places were left out.",
            LANGUAGES.join(", ")
        )
    };
    let mut text = format!(
        "# {title}\n\n\
         - Author: {author}\n\
         - Copyright: {copyright}\n\
         - Licence: {licence}, full text in `{licence_file}`\n"
    );
    if *licence == "CC-BY-4.0" {
        text.push_str("- Licence on the web: https://creativecommons.org/licenses/by/4.0/legalcode\n");
    }
    let _ = writeln!(text, "- Upstream: {upstream}");
    let _ = writeln!(text, "- Taken from: npm package `{npm}`, version {version}");
    let _ = writeln!(text, "\n## Changes\n\n{what}");
    if !remark.is_empty() {
        let _ = writeln!(text, "\n## Remarks\n\n{remark}");
    }
    text
}

/// The figures in a few lines, for the terminal.
pub fn summary(figures: &Figures) -> String {
    let mut text = format!("concepts: {} ({} more have no training picture)\n", figures.concepts, figures.without_picture);
    for vendor in VENDORS {
        let images = figures.images.get(vendor).copied().unwrap_or_default();
        let twins = figures.twins.get(vendor).copied().unwrap_or_default();
        let _ = writeln!(text, "{vendor}: {images} images, {twins} the same as another");
    }
    let _ = writeln!(text, "training images: {}", figures.training_images());
    let _ = writeln!(text, "test pairs: {}", figures.test_pairs);
    text
}

/// The README of the pack.
pub fn readme(figures: &Figures, versions: &BTreeMap<&'static str, String>) -> String {
    let mut text = String::from(
        "# Emoji pack\n\n\
         Small pictures of emoji by six vendors, with captions: the training and test data of \
         burn-moe.\nThis folder is made by `tools/emoji-pack`; do not edit it by hand.\n\n\
         ## Figures\n\n",
    );
    let _ = writeln!(
        text,
        "- {} concepts\n- {} training images (five vendors)\n- {} test pairs (Twemoji, never trained on)\n",
        figures.concepts,
        figures.training_images(),
        figures.test_pairs
    );
    text.push_str("| vendor | use | images | npm package | licence |\n| --- | --- | ---: | --- | --- |\n");
    for source in SOURCES.iter().filter(|s| VENDORS.contains(&s.short)) {
        let _ = writeln!(
            text,
            "| {} | {} | {} | `{}@{}` | {} |",
            source.short,
            if source.short == TEST_VENDOR { "test" } else { "training" },
            figures.images.get(source.short).copied().unwrap_or_default(),
            source.npm,
            versions[source.short],
            source.licence,
        );
    }
    let _ = write!(
        text,
        "\nCaptions: `emojibase-data@{}` (MIT). Each source has its `NOTICE-*.md`; the full licence \
         texts are in the `LICENSE-*.txt` files. The npm package of fxemoji states Apache-2.0, while its \
         upstream project states CC-BY-4.0 for the drawings; `NOTICE-fxemoji.md` meets both.\n\n",
        versions["emojibase-data"]
    );
    let _ = write!(
        text,
        "## What is a concept\n\n\
         A concept is a top-level entry of emojibase's English list: no skin tones, no components \
         (regional indicators, tones and hair styles on their own), no flags of countries and regions (their label is only a \
         place's name, and many of them look alike at {TILE} px). Flags with a meaning of their own, \
         such as the chequered flag, stay. A concept needs at least one training picture; {} had none \
         and were left out. Labels and hexcodes are unique; the packer fails when they are not. The \
         concepts stand in emojibase's order.\n\n\
         noto, fluent-emoji-flat and twemoji are matched by code point. noto-v1, fxemoji and emojione \
         ship no code points and are matched by name: label, the other vendors' names and aliases, the \
         Unicode name and the CLDR name, in this order; a name that two concepts claim with equal \
         right is given to neither. The tables in `tools/emoji-pack/tables/` correct what names alone \
         get wrong.\n\n",
        figures.without_picture
    );
    let _ = write!(
        text,
        "## Format\n\n\
         - `captions.jsonl`: one JSON object a line per concept: `hexcode`, `label` and `tags` \
         (English), `group` and `subgroup` (emojibase's numbers) and `tiles`: for each vendor that has \
         the concept the index of its tile.\n\
         - `captions-multilingual.jsonl`: one object a line per concept: `hexcode` and, for each of \
         {}, an object with `label` and `tags`.\n\
         - `<vendor>.png`: RGB, 8 bits, no alpha (drawn over white). Tiles of {TILE} x {TILE} px, \
         {PER_ROW} a row, row-major: tile `i` has its upper left corner at \
         `x = i % {PER_ROW} * {TILE}`, `y = i / {PER_ROW} * {TILE}`. Places after the last tile are white.\n\n\
         Each drawing fills its tile with its own view box, centred, its shape kept; it is drawn at 4 \
         times the size and averaged down.\n\n",
        LANGUAGES.join(", ")
    );
    text.push_str("| file | bytes |\n| --- | ---: |\n");
    for (name, size) in &figures.sizes {
        let _ = writeln!(text, "| {name} | {size} |");
    }
    text.push_str(
        "\n## How to rebuild\n\n\
         ```sh\ntools/emoji-pack/build.sh\n```\n\n\
         It fetches the pinned npm packages, checks their SHA-256 sums, and writes this folder anew. It \
         needs `npm` and `cargo`; the same packages give the same bytes.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vendor_has_a_source() {
        for vendor in VENDORS {
            assert!(SOURCES.iter().any(|source| source.short == vendor), "{vendor}");
        }
    }

    #[test]
    fn a_notice_names_what_it_must() {
        for source in &SOURCES {
            let text = notice(source, "9.8.7");
            for part in [source.npm, source.copyright, source.upstream, "9.8.7", source.licence_file] {
                assert!(text.contains(part), "{}: {part}", source.short);
            }
        }
    }

    #[test]
    fn licence_text_is_tidied() {
        assert_eq!(tidy("\n a \nb\n\n"), b"a\nb\n");
    }
}
