//! The whole run: read the packages, match, draw, write.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use resvg::usvg;
use serde::Serialize;

use crate::Args;
use crate::concepts::{Caption, Entry, check_unique, is_concept, read_entries};
use crate::error::{Error, Result};
use crate::iconset::{IconSet, char_key, read_json};
use crate::matching::{Overrides, match_icons, name_sources};
use crate::notice::{self, Figures, SOURCES};
use crate::sheet::{self, Tile};

/// The vendors, in the order in which the pack names them.
pub const VENDORS: [&str; 6] = ["noto", "noto-v1", "fxemoji", "fluent-emoji-flat", "emojione", "twemoji"];
/// The vendor that is kept for the test gallery.
pub const TEST_VENDOR: &str = "twemoji";
/// The vendor that writes its names in one word.
const ONE_WORD_VENDOR: &str = "fxemoji";
/// The other languages of the pack: emojibase's in Latin letters, whose words take few tokens of CLIP's tokenizer. Regional variants and Vietnamese
/// are left out.
pub const LANGUAGES: [&str; 15] = ["da", "de", "es", "et", "fi", "fr", "hu", "it", "lt", "ms", "nb", "nl", "pl", "pt", "sv"];
/// The most that the pack may weigh.
const SIZE_LIMIT: u64 = 12 * 1024 * 1024;

/// The hand-made tables, one a vendor.
const TABLES: [(&str, &str); 6] = [
    ("noto", include_str!("../tables/noto.tsv")),
    ("noto-v1", include_str!("../tables/noto-v1.tsv")),
    ("fxemoji", include_str!("../tables/fxemoji.tsv")),
    ("fluent-emoji-flat", include_str!("../tables/fluent-emoji-flat.tsv")),
    ("emojione", include_str!("../tables/emojione.tsv")),
    ("twemoji", include_str!("../tables/twemoji.tsv")),
];

/// One line of `captions.jsonl`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    hexcode: &'a str,
    label: &'a str,
    tags: &'a [String],
    group: u8,
    subgroup: u8,
    tiles: BTreeMap<&'a str, usize>,
}

/// One line of `captions-multilingual.jsonl`.
#[derive(Debug, Serialize)]
struct MultiLine<'a> {
    hexcode: &'a str,
    #[serde(flatten)]
    languages: BTreeMap<&'a str, Caption>,
}

/// Makes the pack.
pub fn run(args: &Args) -> Result<()> {
    let emojibase = args.sources.join("emojibase-data");
    let packages = notice::check_packages(&args.sources)?;

    let all = read_entries(&emojibase, "en")?;
    let mut concepts: Vec<&Entry> = all.iter().filter(|entry| is_concept(entry)).collect();
    concepts.sort_by_key(|entry| (entry.order, entry.hexcode.as_str()));
    check_unique(&concepts)?;

    let mut sets: BTreeMap<&str, IconSet> = BTreeMap::new();
    for vendor in VENDORS {
        sets.insert(vendor, IconSet::read(vendor, &args.sources.join(vendor))?);
    }
    let unicode_names = read_json(&emojibase.join("meta/unicode-names.json"))?;
    let cldr = read_json(&emojibase.join("en/shortcodes/cldr.json"))?;
    let with_codes: Vec<&IconSet> = sets.values().filter(|set| !set.chars.is_empty()).collect();
    let sources = name_sources(&all, &unicode_names, &cldr, &with_codes)?;

    let codes: BTreeSet<String> = all.iter().map(|entry| char_key(&entry.hexcode)).collect();
    let mut matches: BTreeMap<&str, BTreeMap<String, String>> = BTreeMap::new();
    for (vendor, table) in TABLES {
        let set = &sets[vendor];
        let overrides = Overrides::parse(vendor, table)?;
        overrides.check(set, &codes)?;
        let one_word = vendor == ONE_WORD_VENDOR;
        matches.insert(vendor, match_icons(set, &sources, one_word, &overrides)?);
    }

    // a concept needs a picture to train on
    let all_concepts = concepts.len();
    concepts.retain(|entry| {
        let code = char_key(&entry.hexcode);
        let mut train = VENDORS.iter().filter(|vendor| **vendor != TEST_VENDOR);
        train.any(|vendor| matches[vendor].contains_key(&code))
    });

    let mut figures = Figures { concepts: concepts.len(), without_picture: all_concepts - concepts.len(), ..Figures::default() };
    let mut tiles: BTreeMap<&str, BTreeMap<String, usize>> = BTreeMap::new();
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    let mut report = String::from("vendor\thexcode\tlabel\ticon\ttile\n");
    let options = usvg::Options::default();
    for vendor in VENDORS {
        let set = &sets[vendor];
        let mut pictures: Vec<Tile> = Vec::new();
        let mut seen: BTreeMap<Tile, &str> = BTreeMap::new();
        let indices = tiles.entry(vendor).or_default();
        for entry in &concepts {
            let code = char_key(&entry.hexcode);
            let Some(name) = matches[vendor].get(&code) else {
                continue;
            };
            let picture = sheet::draw(set, name, &set.resolve(name)?, &options)?;
            if let Some(twin) = seen.insert(picture.clone(), &entry.label) {
                eprintln!("{vendor}: {:?} looks just like {twin:?}", entry.label);
                *figures.twins.entry(vendor).or_default() += 1;
            }
            report.push_str(&format!("{vendor}\t{}\t{}\t{name}\t{}\n", entry.hexcode, entry.label, pictures.len()));
            indices.insert(entry.hexcode.clone(), pictures.len());
            pictures.push(picture);
        }
        figures.images.insert(vendor, pictures.len());
        let file = format!("{vendor}.png");
        let png = sheet::encode(&file, &pictures, !args.fast)?;
        files.push((file, png));
    }

    let mut captions = String::new();
    for entry in &concepts {
        let line = Line {
            hexcode: &entry.hexcode,
            label: &entry.label,
            tags: &entry.tags,
            group: entry.group.unwrap_or_default(),
            subgroup: entry.subgroup.unwrap_or_default(),
            tiles: VENDORS.iter().filter_map(|vendor| Some((*vendor, *tiles[vendor].get(&entry.hexcode)?))).collect(),
        };
        figures.test_pairs += usize::from(line.tiles.contains_key(TEST_VENDOR));
        push_json(&mut captions, &line, &entry.hexcode)?;
    }
    files.push(("captions.jsonl".to_owned(), captions.into_bytes()));

    let mut by_language: BTreeMap<&str, BTreeMap<String, Caption>> = BTreeMap::new();
    for language in LANGUAGES {
        let entries = read_entries(&emojibase, language)?.into_iter();
        let captions = entries.map(|entry| {
            let Entry { label, tags, .. } = entry;
            (entry.hexcode, Caption { label, tags })
        });
        by_language.insert(language, captions.collect());
    }
    let mut multilingual = String::new();
    for entry in &concepts {
        let languages =
            by_language.iter().filter_map(|(language, map)| Some((*language, map.get(&entry.hexcode)?.clone()))).collect();
        let line = MultiLine { hexcode: &entry.hexcode, languages };
        push_json(&mut multilingual, &line, &entry.hexcode)?;
    }
    files.push(("captions-multilingual.jsonl".to_owned(), multilingual.into_bytes()));

    files.extend(notice::licence_texts(&args.sources)?);
    for source in &SOURCES {
        files.push((format!("NOTICE-{}.md", source.short), notice::notice(source, &packages[source.short]).into_bytes()));
    }
    let sizes = files.iter();
    figures.sizes = sizes.map(|(name, data)| (name.clone(), data.len())).collect();
    files.push(("README.md".to_owned(), notice::readme(&figures, &packages).into_bytes()));

    let total: u64 = files.iter().map(|(_, data)| data.len() as u64).sum();
    if total > SIZE_LIMIT {
        return Err(Error::TooBig { found: total, limit: SIZE_LIMIT });
    }
    std::fs::create_dir_all(&args.out).map_err(|source| Error::Write { path: args.out.clone(), source })?;
    for (name, data) in &files {
        write_whole(&args.out.join(name), data)?;
    }
    if let Some(path) = &args.matches {
        write_whole(path, report.as_bytes())?;
    }
    print!("{}", notice::summary(&figures));
    println!("total bytes: {total}");
    Ok(())
}

/// Adds a value as one JSON line.
fn push_json(out: &mut String, value: &impl Serialize, what: &str) -> Result<()> {
    let line = serde_json::to_string(value).map_err(|source| Error::ToJson { what: what.to_owned(), source })?;
    out.push_str(&line);
    out.push('\n');
    Ok(())
}

/// Writes a file under a temporary name and then gives it its own.
fn write_whole(path: &Path, data: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let failed = |source| Error::Write { path: path.to_owned(), source };
    std::fs::write(&temporary, data).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vendor_has_a_table_that_reads() {
        for vendor in VENDORS {
            let table = TABLES.iter().find(|(name, _)| *name == vendor);
            let (name, text) = table.expect(vendor);
            Overrides::parse(name, text).expect(vendor);
        }
    }

    #[test]
    fn a_file_is_written_whole_and_no_other_stays() {
        let folder = std::env::temp_dir().join(format!("emoji-pack-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("folder");
        let path = folder.join("a.txt");
        write_whole(&path, b"one").expect("first");
        write_whole(&path, b"two").expect("second");
        assert_eq!(std::fs::read(&path).expect("read"), b"two");
        assert_eq!(std::fs::read_dir(&folder).expect("list").count(), 1);
        std::fs::remove_dir_all(&folder).expect("clean");
        assert!(matches!(write_whole(&path, b"x"), Err(Error::Write { .. })));
    }

    #[test]
    fn a_value_is_one_line() {
        let mut out = String::new();
        let languages = BTreeMap::from([("de", Caption { label: "Hund".into(), tags: vec!["Tier".into()] })]);
        let line = MultiLine { hexcode: "1F415", languages };
        push_json(&mut out, &line, "1F415").expect("JSON");
        let expected = r#"{"hexcode":"1F415","de":{"label":"Hund","tags":["Tier"]}}"#;
        assert_eq!(out, format!("{expected}\n"));
    }
}
