//! Icon sets in the Iconify JSON form: icons, aliases, code points, and the SVG of an icon.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// How many aliases may follow one another before it is called a ring.
const MAX_ALIAS_DEPTH: usize = 8;

/// One icon, or the changes that an alias makes to its parent.
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawIcon {
    body: Option<String>,
    parent: Option<String>,
    left: Option<f32>,
    top: Option<f32>,
    width: Option<f32>,
    height: Option<f32>,
    #[serde(default)]
    rotate: u8,
    #[serde(default)]
    h_flip: bool,
    #[serde(default)]
    v_flip: bool,
    #[serde(default)]
    hidden: bool,
}

#[derive(Debug, Deserialize)]
struct RawSet {
    icons: BTreeMap<String, RawIcon>,
    #[serde(default)]
    aliases: BTreeMap<String, RawIcon>,
    left: Option<f32>,
    top: Option<f32>,
    width: Option<f32>,
    height: Option<f32>,
}

/// An icon with every alias followed.
#[derive(Debug, Clone, PartialEq)]
pub struct Icon {
    /// The name of the icon that holds the body.
    pub root: String,
    pub left: f32,
    pub top: f32,
    pub width: f32,
    pub height: f32,
    pub h_flip: bool,
    pub v_flip: bool,
}

/// An icon set.
#[derive(Debug)]
pub struct IconSet {
    pub name: String,
    raw: RawSet,
    /// Code points (lower case, without FE0F) to icon names; empty for sets that ship none.
    pub chars: BTreeMap<String, String>,
}

/// Reads a JSON file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_owned(), source })
}

/// A hexcode in the form of `chars.json`: lower case, variation selectors left out.
pub fn char_key(hexcode: &str) -> String {
    hexcode.to_lowercase().split('-').filter(|part| *part != "fe0f").collect::<Vec<_>>().join("-")
}

impl IconSet {
    /// Reads `icons.json` and, where it exists, `chars.json` of an unpacked npm package.
    pub fn read(name: &str, folder: &Path) -> Result<Self> {
        let raw: RawSet = read_json(&folder.join("icons.json"))?;
        let chars_path = folder.join("chars.json");
        let chars: BTreeMap<String, String> = if chars_path.exists() {
            read_json::<BTreeMap<String, String>>(&chars_path)?.into_iter().map(|(code, icon)| (char_key(&code), icon)).collect()
        } else {
            BTreeMap::new()
        };
        Ok(Self { name: name.to_owned(), raw, chars })
    }

    /// The names of the icons that have a body of their own and are shown.
    pub fn icon_names(&self) -> impl Iterator<Item = &str> {
        let shown = self.raw.icons.iter().filter(|(_, icon)| !icon.hidden);
        shown.map(|(name, _)| name.as_str())
    }

    /// The names of the aliases that are shown.
    pub fn alias_names(&self) -> impl Iterator<Item = &str> {
        let shown = self.raw.aliases.iter().filter(|(_, icon)| !icon.hidden);
        shown.map(|(name, _)| name.as_str())
    }

    /// Whether the set has an icon or an alias of this name.
    pub fn has(&self, name: &str) -> bool {
        self.raw.icons.contains_key(name) || self.raw.aliases.contains_key(name)
    }

    /// Follows the aliases of a name down to the icon with the body.
    pub fn resolve(&self, name: &str) -> Result<Icon> {
        let mut chain: Vec<&RawIcon> = Vec::new();
        let mut at = name;
        let root = loop {
            if let Some(icon) = self.raw.icons.get(at) {
                chain.push(icon);
                break at;
            }
            let Some(alias) = self.raw.aliases.get(at) else {
                return Err(Error::DanglingAlias { set: self.name.clone(), name: name.to_owned(), parent: at.to_owned() });
            };
            if chain.len() >= MAX_ALIAS_DEPTH {
                return Err(Error::AliasRing { set: self.name.clone(), name: name.to_owned() });
            }
            chain.push(alias);
            at = alias.parent.as_deref().unwrap_or("");
        };
        // the value nearest to the asked name counts
        let first = |field: fn(&RawIcon) -> Option<f32>, set: Option<f32>, other: f32| {
            chain.iter().find_map(|icon| field(icon)).or(set).unwrap_or(other)
        };
        let icon = Icon {
            root: root.to_owned(),
            left: first(|icon| icon.left, self.raw.left, 0.0),
            top: first(|icon| icon.top, self.raw.top, 0.0),
            width: first(|icon| icon.width, self.raw.width, 16.0),
            height: first(|icon| icon.height, self.raw.height, 16.0),
            h_flip: chain.iter().fold(false, |flip, icon| flip ^ icon.h_flip),
            v_flip: chain.iter().fold(false, |flip, icon| flip ^ icon.v_flip),
        };
        if chain.iter().any(|icon| icon.rotate % 4 != 0) {
            return Err(Error::Rotation { set: self.name.clone(), name: name.to_owned() });
        }
        if !(icon.width > 0.0 && icon.height > 0.0) {
            return Err(Error::ViewBox { set: self.name.clone(), name: name.to_owned(), width: icon.width, height: icon.height });
        }
        Ok(icon)
    }

    /// The whole SVG document of an icon.
    pub fn svg(&self, icon: &Icon) -> String {
        let body = self.raw.icons.get(&icon.root).and_then(|raw| raw.body.as_deref()).unwrap_or("");
        wrap_svg(icon, body)
    }
}

/// Puts an icon's body into an SVG document with the icon's view box and flips.
pub fn wrap_svg(icon: &Icon, body: &str) -> String {
    let Icon { left, top, width, height, .. } = icon;
    let (sx, tx) = if icon.h_flip { (-1, 2.0 * left + width) } else { (1, 0.0) };
    let (sy, ty) = if icon.v_flip { (-1, 2.0 * top + height) } else { (1, 0.0) };
    let inner = if icon.h_flip || icon.v_flip {
        format!("<g transform=\"matrix({sx} 0 0 {sy} {tx} {ty})\">{body}</g>")
    } else {
        body.to_owned()
    };
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" xmlns:xlink=\"http://www.w3.org/1999/xlink\" \
         width=\"{width}\" height=\"{height}\" viewBox=\"{left} {top} {width} {height}\">{inner}</svg>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(json: &str) -> IconSet {
        IconSet { name: "test".into(), raw: serde_json::from_str(json).expect("test JSON"), chars: BTreeMap::new() }
    }

    #[test]
    fn a_hexcode_loses_its_variation_selectors() {
        assert_eq!(char_key("1F441-FE0F-200D-1F5E8-FE0F"), "1f441-200d-1f5e8");
        assert_eq!(char_key("2764"), "2764");
    }

    #[test]
    fn an_icon_takes_the_size_of_its_set() {
        let set = set(r#"{"icons":{"a":{"body":"<g/>","left":-2}},"width":36,"height":30}"#);
        let icon = set.resolve("a").expect("icon a");
        assert_eq!((icon.left, icon.top), (-2.0, 0.0));
        assert_eq!((icon.width, icon.height), (36.0, 30.0));
        let svg = set.svg(&icon);
        assert!(svg.contains("viewBox=\"-2 0 36 30\""), "{svg}");
        assert!(svg.ends_with("><g/></svg>"), "{svg}");
    }

    #[test]
    fn an_alias_is_followed_and_flipped() {
        let set = set(r#"{"icons":{"a":{"body":"<g/>"}},"width":10,"height":10,
                "aliases":{"b":{"parent":"a","hFlip":true},"c":{"parent":"b"}}}"#);
        let icon = set.resolve("c").expect("alias c");
        assert_eq!(icon.root, "a");
        assert!(icon.h_flip && !icon.v_flip);
        assert!(set.svg(&icon).contains("matrix(-1 0 0 1 10 0)"));
    }

    #[test]
    fn a_lost_or_ringed_alias_is_an_error() {
        let set = set(r#"{"icons":{},"aliases":{"a":{"parent":"b"},"b":{"parent":"a"},"c":{"parent":"z"}}}"#);
        assert!(matches!(set.resolve("a"), Err(Error::AliasRing { .. })));
        assert!(matches!(set.resolve("c"), Err(Error::DanglingAlias { .. })));
    }

    #[test]
    fn a_rotation_or_an_empty_box_is_an_error() {
        let set = set(r#"{"icons":{"a":{"body":"","rotate":1},"b":{"body":"","width":0}}}"#);
        assert!(matches!(set.resolve("a"), Err(Error::Rotation { .. })));
        assert!(matches!(set.resolve("b"), Err(Error::ViewBox { .. })));
    }
}
