//! Lists as data sets publish them.

use std::{collections::BTreeMap, fmt, path::Component};

use serde::Deserialize;

use super::{Row, path_of};

/// COCO's file, or Karpathy's, which has no captions apart from its images.
#[derive(Deserialize)]
struct Images {
    images: Vec<Image>,
    annotations: Option<Vec<CocoCaption>>,
}

#[derive(Deserialize)]
struct Image {
    id: Option<Id>,
    file_name: Option<String>,
    filename: Option<String>,
    #[serde(default)]
    filepath: String,
    split: Option<String>,
    #[serde(default)]
    sentences: Vec<Sentence>,
}

#[derive(Deserialize)]
struct Sentence {
    raw: String,
}

#[derive(Deserialize)]
struct CocoCaption {
    image_id: Id,
    caption: Option<String>,
}

/// A number, or a text.
#[derive(Deserialize, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[serde(untagged)]
enum Id {
    Number(u64),
    Text(String),
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

/// The images of a published list; `None` when the text is of another kind.
pub(super) fn rows(text: &str) -> Option<Result<Vec<Row>, String>> {
    let first = text.lines().find(|line| !line.trim().is_empty())?;
    match first.trim_start().starts_with('{') {
        true => has_images(text).then(|| json(text)),
        false => numbered(first).is_some().then(|| flickr(text)),
    }
}

/// Whether a text has a field `images` that is a list of objects, which COCO's and Karpathy's files have, and JSON lines have not.
fn has_images(text: &str) -> bool {
    let rest = |(at, key): (usize, &str)| -> Option<char> {
        let list = text[at + key.len()..].trim_start().strip_prefix(':')?.trim_start().strip_prefix('[')?;
        list.trim_start().chars().next()
    };
    text.match_indices("\"images\"").any(|found| matches!(rest(found), Some('{' | ']')))
}

/// A row whose file is inside of the folder of images: a list must not decide which others are read.
pub(super) fn inside(row: Row) -> Result<Row, String> {
    if row.image.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
        Ok(row)
    } else {
        Err(format!("{} is not inside the folder of images", row.image.display()))
    }
}

fn json(text: &str) -> Result<Vec<Row>, String> {
    let file: Images = serde_json::from_str(text).map_err(|error| format!("not the JSON that was expected: {error}"))?;
    match file.annotations {
        Some(captions) => coco(file.images, captions),
        None => file.images.into_iter().map(karpathy).collect(),
    }
}

fn coco(mut images: Vec<Image>, captions: Vec<CocoCaption>) -> Result<Vec<Row>, String> {
    let id = |image: &Image| image.id.clone().ok_or("an image without `id`");
    let (mut captions_of, mut files) = (BTreeMap::new(), BTreeMap::new());
    for image in &images {
        let id = id(image)?;
        captions_of.insert(id.clone(), Vec::new());
        let file = image.file_name.clone();
        if files.insert(id.clone(), file.clone()).is_some_and(|other| other != file) {
            return Err(format!("two images have the `id` {id}: captions could belong to either"));
        }
    }
    // One that is named twice is one.
    images.retain(|image| image.id.as_ref().is_some_and(|id| files.remove(id).is_some()));
    if !captions.is_empty() && captions.iter().all(|annotation| annotation.caption.is_none()) {
        return Err("its annotations have no `caption`, as those of `instances_….json`: take `captions_….json`".into());
    }
    for (place, CocoCaption { image_id, caption }) in captions.into_iter().enumerate() {
        let own = captions_of.get_mut(&image_id).ok_or_else(|| format!("a caption names image {image_id}, which is not there"))?;
        let caption =
            caption.ok_or_else(|| format!("annotation {} (of image {image_id}) has no `caption`: remove it", place + 1))?;
        own.push(caption.trim().to_string());
    }
    let row = |image: Image| {
        let captions = captions_of.remove(&id(&image)?).unwrap_or_default();
        Ok(Row { image: path_of(&image.file_name.ok_or("an image without `file_name`")?), captions, split: None })
    };
    images.into_iter().map(row).collect()
}

fn karpathy(image: Image) -> Result<Row, String> {
    let name = image.filename.ok_or("an image without `filename`, and no `annotations`")?;
    let captions = image.sentences.into_iter().map(|sentence| sentence.raw.trim().to_string()).collect();
    Ok(Row { image: path_of(&image.filepath).join(path_of(&name)), captions, split: image.split })
}

/// `NAME#NUMBER`, a tab and a caption.
fn numbered(line: &str) -> Option<(&str, &str)> {
    let (name, caption) = line.split_once('\t')?;
    let (name, number) = name.trim().rsplit_once('#')?;
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then_some((name, caption))
}

fn flickr(text: &str) -> Result<Vec<Row>, String> {
    let row = |(index, line): (usize, &str)| {
        let (name, caption) =
            numbered(line).ok_or_else(|| format!("line {}: expected `NAME#NUMBER`, a tab and a caption", index + 1))?;
        Ok(Row { image: path_of(name), captions: vec![caption.trim().to_string()], split: None })
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect()
}
