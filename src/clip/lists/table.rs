//! Lists of images and captions that people write themselves: tables and JSON lines.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{CaptionedImages, ListError, format_error, read};

/// What a column of images may be called, in lower case.
const IMAGE: [&str; 10] =
    ["path", "filepath", "file_path", "image", "image_path", "image_name", "file_name", "filename", "file", "img"];
/// What a column of captions may be called.
const CAPTION: [&str; 6] = ["caption", "title", "text", "comment", "captions", "sentence"];
/// What may stand between columns.
const DELIMITERS: [char; 4] = ['\t', ',', ';', '|'];

/// The columns of a list, where they are not called by one of the usual names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// The column of image paths.
    pub image: Option<String>,
    /// The column of captions.
    pub caption: Option<String>,
}

impl Columns {
    /// The places of the image and the caption among `names`.
    fn places(&self, names: &[String]) -> Option<(usize, usize)> {
        let place = |given: &Option<String>, usual: &[&str]| match given {
            Some(given) => names.iter().position(|name| name == &plain(given)),
            None => usual.iter().find_map(|usual| names.iter().position(|name| name == usual)),
        };
        Some((place(&self.image, &IMAGE)?, place(&self.caption, &CAPTION)?))
    }

    fn expected(&self) -> String {
        let one_of = |given: &Option<String>, usual: &[&str]| match given {
            Some(given) => format!("`{given}`"),
            None => format!("one of {}", usual.join(", ")),
        };
        format!("expected {} for the image and {} for the caption", one_of(&self.image, &IMAGE), one_of(&self.caption, &CAPTION))
    }
}

/// A column's name without blanks, quotes and capitals.
fn plain(name: &str) -> String {
    name.trim().trim_matches('"').trim().to_lowercase()
}

/// One line of a list: its number from 1, the image and the caption.
type Row = (u64, String, String);

impl CaptionedImages {
    /// A list of your own: a table with a line of names (comma, tab, semicolon or `|` between columns), or JSON lines. Images are in a column
    /// called `path`, `filepath`, `image`, `file_name` or the like, captions in `caption`, `title`, `text` or the like, in any case, or in the
    /// `columns` that you name. Several lines may name one image, which then has several captions. Images are in the order in which they are named
    /// first; their paths are as written.
    ///
    /// # Errors
    /// When the file is no UTF-8, the columns are not found, or lines have no image or caption; the first three such lines are named, with their
    /// number.
    pub fn table(path: impl AsRef<Path>, columns: &Columns) -> Result<Self, ListError> {
        let path = path.as_ref();
        let text = read(path)?;
        let rows = if text.trim_start().starts_with('{') { json_lines(&text, columns) } else { table(&text, columns) };
        let mut bad = Vec::new();
        let mut place: BTreeMap<PathBuf, usize> = BTreeMap::new();
        let mut list = Self::default();
        for row in rows.map_err(|reason| format_error(path, reason))? {
            match row {
                Ok((line, image, caption)) if image.is_empty() || caption.is_empty() => {
                    let what = if image.is_empty() { "no image" } else { "no caption" };
                    bad.push(format!("line {line}: {what}"));
                }
                Ok((_, image, caption)) => {
                    let image = PathBuf::from(image);
                    let place = *place.entry(image.clone()).or_insert(list.images.len());
                    if place == list.images.len() {
                        list.images.push(image);
                    }
                    list.captions.push((caption, place));
                }
                Err(reason) => bad.push(reason),
            }
        }
        if !bad.is_empty() {
            let more = if bad.len() > 3 { format!("; and {} more lines", bad.len() - 3) } else { String::new() };
            return Err(format_error(path, format!("{}{more}", bad[..bad.len().min(3)].join("; "))));
        }
        if list.images.is_empty() {
            return Err(format_error(path, "no image with a caption".into()));
        }
        // Captions of an image stand together, as in the other lists.
        list.captions.sort_by_key(|(_, image)| *image);
        Ok(list)
    }
}

fn table(text: &str, columns: &Columns) -> Result<Vec<Result<Row, String>>, String> {
    let header = text.lines().next().unwrap_or_default();
    let names = |delimiter: char| -> Vec<String> { header.split(delimiter).map(plain).collect() };
    let fits = DELIMITERS.into_iter().find_map(|delimiter| Some((delimiter, columns.places(&names(delimiter))?)));
    let Some((delimiter, (image, caption))) = fits else {
        let most = DELIMITERS.into_iter().map(names).max_by_key(Vec::len).unwrap_or_default();
        let shown: Vec<String> =
            most.iter().take(8).map(|name| format!("`{}`", name.chars().take(40).collect::<String>())).collect();
        return Err(format!("the columns of its first line are {}; {}", shown.join(", "), columns.expected()));
    };
    let count = names(delimiter).len();
    let text = without_blanks_behind(delimiter, text);
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter as u8)
        // Captions of Kaggle's `|` lists have lone quotes.
        .quoting(delimiter != '|')
        .flexible(true)
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes());
    let row = |record: Result<csv::StringRecord, csv::Error>| {
        let record = record.map_err(|error| error.to_string())?;
        let line = record.position().map_or(0, csv::Position::line);
        if record.len() != count {
            return Err(format!("line {line}: {} columns, but the first line has {count}", record.len()));
        }
        let field = |place: usize| record.get(place).unwrap_or_default().to_string();
        Ok((line, field(image), field(caption)))
    };
    Ok(reader.records().map(row).collect())
}

/// The text without the blanks at the beginning of fields: a quote behind them opens a quoted field, too.
fn without_blanks_behind(delimiter: char, text: &str) -> String {
    #[derive(Clone, Copy)]
    enum At {
        Start,
        Plain,
        Quoted,
        /// Behind a quote that closes, unless another one follows.
        Closed,
    }
    let mut out = String::with_capacity(text.len());
    let mut at = At::Start;
    for c in text.chars() {
        let is_quote = c == '"' && delimiter != '|';
        at = match at {
            At::Start if c == ' ' => continue,
            At::Start | At::Closed if is_quote => At::Quoted,
            At::Quoted if is_quote => At::Closed,
            At::Quoted => At::Quoted,
            _ if c == delimiter || c == '\n' => At::Start,
            _ => At::Plain,
        };
        out.push(c);
    }
    out
}

fn json_lines(text: &str, columns: &Columns) -> Result<Vec<Result<Row, String>>, String> {
    let row = |(index, line): (usize, &str)| {
        let number = index as u64 + 1;
        let object: serde_json::Map<String, Value> =
            serde_json::from_str(line).map_err(|error| format!("line {number}: not the JSON that was expected: {error}"))?;
        let names: Vec<String> = object.keys().map(|name| plain(name)).collect();
        let Some((image, caption)) = columns.places(&names) else {
            return Err(format!("line {number}: its fields are {}; {}", names.join(", "), columns.expected()));
        };
        let field = |place: usize| object.values().nth(place).and_then(Value::as_str).unwrap_or_default().trim().to_string();
        Ok((number, field(image), field(caption)))
    };
    Ok(text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect())
}
