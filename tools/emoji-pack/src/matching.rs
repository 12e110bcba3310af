//! Which icon of a vendor shows which concept.
//!
//! Vendors that ship code points are asked by code point. The others are asked by name: every name
//! that a code point is known by *claims* that name for the code point. The sources of names are
//! ranked; where two code points claim a name in the same rank, nobody gets it: a missing picture
//! is better than a wrong one.

use std::collections::{BTreeMap, BTreeSet};

use crate::concepts::Entry;
use crate::error::{Error, Result};
use crate::iconset::{IconSet, char_key};
use crate::slug::{slug, squash};

/// The names that code points are known by, best source first.
#[derive(Debug, Default)]
pub struct NameSources {
    ranks: Vec<BTreeMap<String, BTreeSet<String>>>,
}

impl NameSources {
    /// Adds a rank, weaker than all before it; pairs of a name and a code point.
    pub fn push(&mut self, names: impl IntoIterator<Item = (String, String)>) {
        let mut rank: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (name, code) in names {
            rank.entry(name).or_default().insert(code);
        }
        self.ranks.push(rank);
    }

    /// Decides who owns each name, in the spelling that `spell` gives.
    pub fn claims(&self, spell: fn(&str) -> String) -> Claims {
        let mut owners: BTreeMap<String, (usize, Option<String>)> = BTreeMap::new();
        for (rank, names) in self.ranks.iter().enumerate() {
            let mut spelled: BTreeMap<String, BTreeSet<&String>> = BTreeMap::new();
            for (name, codes) in names {
                spelled.entry(spell(name)).or_default().extend(codes);
            }
            for (name, codes) in spelled {
                if name.is_empty() {
                    continue;
                }
                owners.entry(name).or_insert_with(|| {
                    let mut codes = codes.into_iter();
                    let only = codes.next().filter(|_| codes.next().is_none());
                    (rank, only.cloned())
                });
            }
        }
        Claims { owners, spell }
    }
}

/// The names and their owners, once ranks and disputes are settled.
#[derive(Debug)]
pub struct Claims {
    owners: BTreeMap<String, (usize, Option<String>)>,
    spell: fn(&str) -> String,
}

impl Claims {
    /// The code point that owns a name, and the rank of the claim.
    pub fn owner(&self, name: &str) -> Option<(usize, &str)> {
        let (rank, code) = self.owners.get(&(self.spell)(name))?;
        code.as_deref().map(|code| (*rank, code))
    }
}

/// Hand-made decisions for one vendor: a name to a code point, or to nothing.
#[derive(Debug, Default)]
pub struct Overrides(BTreeMap<String, Option<String>>);

impl Overrides {
    /// Reads a table of `name<TAB>hexcode` lines; `-` for «no concept», `#` starts a remark line.
    pub fn parse(table: &str, text: &str) -> Result<Self> {
        let mut map = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = || Error::BadTableLine { table: table.to_owned(), line: index + 1, text: line.to_owned() };
            let mut fields = line.split('\t');
            let name = fields.next().filter(|name| !name.is_empty());
            let code = fields.next().filter(|code| !code.is_empty());
            let (Some(name), Some(code)) = (name, code) else {
                return Err(bad());
            };
            let code = (code != "-").then(|| char_key(code));
            if map.insert(name.to_owned(), code).is_some() {
                return Err(bad());
            }
        }
        Ok(Self(map))
    }

    /// Fails when the table names an icon or a code point that does not exist.
    pub fn check(&self, set: &IconSet, codes: &BTreeSet<String>) -> Result<()> {
        for (name, code) in &self.0 {
            if !set.has(name) {
                return Err(Error::UnknownOverride { set: set.name.clone(), name: name.clone() });
            }
            if let Some(code) = code
                && !codes.contains(code)
            {
                return Err(Error::UnknownHexcode { set: set.name.clone(), name: name.clone(), hexcode: code.clone() });
            }
        }
        Ok(())
    }
}

/// Collects every name that the emojibase entries and the vendors with code points know.
pub fn name_sources(
    entries: &[Entry],
    unicode_names: &BTreeMap<String, String>,
    cldr: &BTreeMap<String, String>,
    vendors: &[&IconSet],
) -> Result<NameSources> {
    let mut sources = NameSources::default();
    let labels = entries.iter();
    sources.push(labels.map(|entry| (slug(&entry.label), char_key(&entry.hexcode))));

    let known: BTreeSet<String> = entries.iter().map(|e| char_key(&e.hexcode)).collect();
    let mut direct = Vec::new();
    let mut through_alias = Vec::new();
    for vendor in vendors {
        let mut by_root: BTreeMap<String, BTreeSet<&String>> = BTreeMap::new();
        for (code, name) in vendor.chars.iter().filter(|(code, _)| known.contains(*code)) {
            direct.push((name.clone(), code.clone()));
            let icon = vendor.resolve(name)?;
            if !icon.h_flip && !icon.v_flip {
                by_root.entry(icon.root).or_default().insert(code);
            }
        }
        for name in vendor.alias_names() {
            let icon = vendor.resolve(name)?;
            let Some(codes) = by_root.get(&icon.root).filter(|codes| codes.len() == 1) else {
                continue;
            };
            if !icon.h_flip && !icon.v_flip {
                let codes = codes.iter().map(|code| (*code).clone());
                through_alias.extend(codes.map(|code| (name.to_owned(), code)));
            }
        }
    }
    sources.push(direct);
    sources.push(through_alias);
    let unicode = unicode_names.iter();
    let unicode = unicode.map(|(code, name)| (slug(name), char_key(code)));
    sources.push(unicode.filter(|(_, code)| known.contains(code)));
    let cldr = cldr.iter();
    let cldr = cldr.map(|(code, name)| (slug(name), char_key(code)));
    sources.push(cldr.filter(|(_, code)| known.contains(code)));
    Ok(sources)
}

/// Finds the icon of each code point in a vendor's set; code points in the form of `char_key`.
pub fn match_icons(
    set: &IconSet,
    sources: &NameSources,
    one_word: bool,
    overrides: &Overrides,
) -> Result<BTreeMap<String, String>> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    if !set.chars.is_empty() {
        for (code, name) in &set.chars {
            if set.has(name) && !overrides.0.contains_key(name) {
                found.insert(code.clone(), name.clone());
            }
        }
    } else {
        let claims = sources.claims(if one_word { squash } else { |name| slug(name) });
        let mut used_roots: BTreeSet<String> = BTreeSet::new();
        // icons first; an alias may then only show what no icon of its own shows
        for aliases in [false, true] {
            let mut best: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
            let names: Vec<&str> = if aliases { set.alias_names().collect() } else { set.icon_names().collect() };
            for name in names {
                if overrides.0.contains_key(name) {
                    continue;
                }
                let Some((rank, code)) = claims.owner(name) else {
                    continue;
                };
                if found.contains_key(code) || used_roots.contains(&set.resolve(name)?.root) {
                    continue;
                }
                let candidate = (rank, name);
                let kept = best.entry(code).or_insert(candidate);
                *kept = (*kept).min(candidate);
            }
            let mut roots = BTreeMap::<String, (usize, &str, &str)>::new();
            for (code, (rank, name)) in best {
                let candidate = (rank, code, name);
                let kept = roots.entry(set.resolve(name)?.root).or_insert(candidate);
                *kept = (*kept).min(candidate);
            }
            for (root, (_, code, name)) in roots {
                used_roots.insert(root);
                found.insert(code.to_owned(), name.to_owned());
            }
        }
    }
    for (name, code) in &overrides.0 {
        if let Some(code) = code {
            found.insert(code.clone(), name.clone());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        let list = list.iter();
        list.map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    #[test]
    fn the_better_rank_owns_a_name() {
        let mut sources = NameSources::default();
        sources.push(pairs(&[("satellite", "1f6f0")]));
        sources.push(pairs(&[("satellite", "1f4e1"), ("satellite-antenna", "1f4e1")]));
        let claims = sources.claims(slug);
        assert_eq!(claims.owner("satellite"), Some((0, "1f6f0")));
        assert_eq!(claims.owner("Satellite antenna"), Some((1, "1f4e1")));
        assert_eq!(claims.owner("dish"), None);
    }

    #[test]
    fn a_disputed_name_belongs_to_nobody() {
        let mut sources = NameSources::default();
        sources.push(pairs(&[("dog", "1f415"), ("dog", "1f436")]));
        sources.push(pairs(&[("dog", "1f415")]));
        assert_eq!(sources.claims(slug).owner("dog"), None);
        let mut sources = NameSources::default();
        sources.push(pairs(&[("sun-set", "1"), ("sunset", "2")]));
        assert_eq!(sources.claims(slug).owner("sunset"), Some((0, "2")));
        assert_eq!(sources.claims(squash).owner("sunset"), None);
    }

    #[test]
    fn a_table_is_read_and_bad_lines_are_named() {
        let table = Overrides::parse("t", "# remark\n\ndog\t1F436\nfox\t-\tnot a fox\n");
        let table = table.expect("good table");
        assert_eq!(table.0["dog"].as_deref(), Some("1f436"));
        assert_eq!(table.0["fox"], None);
        for bad in ["dog", "dog\t", "\t1F436", "dog\t1F436\ndog\t1F415"] {
            let error = Overrides::parse("t", bad).expect_err(bad);
            assert!(matches!(error, Error::BadTableLine { .. }), "{error}");
        }
    }
}
