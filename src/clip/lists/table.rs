//! Lists of images and captions that people write themselves: tables and JSON.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};
use serde_json::{Map, Value};

use super::{Row, path_of};

/// What a column of images may be called, in lower case.
const IMAGE: [&str; 10] =
    ["path", "filepath", "file_path", "image", "image_path", "image_name", "file_name", "filename", "file", "img"];
/// What a column of captions may be called; numbers may follow (`caption_1`, `caption 1`, pandas' `caption.1`).
const CAPTION: [&str; 8] = ["caption", "title", "text", "comment", "captions", "sentence", "description", "raw"];
/// What may stand between columns.
const DELIMITERS: [char; 4] = ['\t', ',', ';', '|'];

/// The columns of a list, where they are not called by one of the usual names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// The column of image paths.
    pub image: Option<String>,
    /// The columns of captions; none: those with a usual name.
    pub captions: Vec<String>,
}

/// The places of the columns.
struct Places {
    /// The image's folder, where that has a column of its own.
    folder: Option<usize>,
    image: usize,
    captions: Vec<usize>,
    split: Option<usize>,
}

impl Columns {
    /// The places of the columns among these names; `kind` is what errors call them.
    fn places(&self, names: &[String], kind: &str) -> Result<Places, String> {
        let places = self.find(names).ok_or_else(|| format!("{kind} are {}", self.not_among(names)))?;
        // Of usual names of captions, all are read.
        let named = if self.captions.is_empty() { &[][..] } else { &places.captions };
        let chosen = [Some(places.image), places.folder, places.split];
        let mut chosen = chosen.into_iter().flatten().chain(named.iter().copied()).map(|place| &names[place]);
        match chosen.find(|name| names.iter().filter(|other| other == name).count() > 1) {
            None => Ok(places),
            Some(name) => Err(format!("`{name}` is there twice among {kind}: keep one of them")),
        }
    }

    fn find(&self, names: &[String]) -> Option<Places> {
        let place = |name: &str| names.iter().position(|found| found == name);
        let image = match &self.image {
            Some(image) => place(&plain(image)),
            None => IMAGE.iter().find_map(|usual| place(usual)),
        }?;
        let captions = match &self.captions[..] {
            [] => {
                // One of the usual names, or all of its numbered ones.
                let of = |usual: &str| {
                    let numbered = |name: &str| {
                        let rest = name.strip_prefix(usual).map(|rest| rest.trim_start_matches(['_', ' ', '.', '-', '#']));
                        rest.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()))
                    };
                    (0..names.len()).filter(|column| numbered(&names[*column])).collect::<Vec<usize>>()
                };
                CAPTION.iter().map(|usual| of(usual)).find(|found| !found.is_empty())?
            }
            given => given.iter().map(|name| place(&plain(name))).collect::<Option<Vec<usize>>>()?,
        };
        // As in Karpathy's lists, which others made tables of.
        let folder = match (place("filepath"), place("filename")) {
            (Some(folder), Some(name)) if self.image.is_none() => Some((folder, name)),
            _ => None,
        };
        let image = folder.map_or(image, |(_, name)| name);
        Some(Places { folder: folder.map(|(folder, _)| folder), image, captions, split: place("split") })
    }

    /// What is said of a list with other `names`.
    fn not_among(&self, names: &[String]) -> String {
        let shown: Vec<String> =
            names.iter().take(8).map(|name| format!("`{}`", name.chars().take(40).collect::<String>())).collect();
        let image = self.image.as_ref().map_or_else(|| format!("one of {}", IMAGE.join(", ")), |name| format!("`{name}`"));
        let captions = match &self.captions[..] {
            [] => format!("one of {}", CAPTION.join(", ")),
            given => format!("`{}`", given.join("`, `")),
        };
        format!("{}; expected {image} for the image and {captions} for the caption", shown.join(", "))
    }
}

/// A column's name without blanks, quotes and capitals.
fn plain(name: &str) -> String {
    name.trim().trim_matches('"').trim().to_lowercase()
}

impl Places {
    /// A row from the texts of its columns; `at` says where it is.
    fn row(&self, at: &str, texts: impl Fn(usize) -> Result<Vec<String>, String>) -> Result<Row, String> {
        let texts = |place: usize| texts(place).map_err(|reason| format!("{at}: {reason}"));
        let one = |place: usize| Ok::<_, String>(texts(place)?.into_iter().next().unwrap_or_default());
        let image = one(self.image)?;
        let captions: Vec<Vec<String>> = self.captions.iter().map(|place| texts(*place)).collect::<Result<_, _>>()?;
        let captions: Vec<String> = captions.into_iter().flatten().filter(|text| !text.is_empty()).collect();
        if image.is_empty() || captions.is_empty() {
            return Err(format!("{at}: no {}", if image.is_empty() { "image" } else { "caption" }));
        }
        let folder = self.folder.map(one).transpose()?.unwrap_or_default();
        let (image, folder) = (path_of(&image), path_of(&folder));
        // Some lists have the whole path where others have the folder.
        let image = if folder.ends_with(&image) { folder } else { folder.join(image) };
        Ok(Row { image, captions, split: self.split.map(one).transpose()?.filter(|split| !split.is_empty()) })
    }
}

/// The rows of a list of one's own; all of its first bad lines in the error.
pub(super) fn rows(text: &str, columns: &Columns) -> Result<Vec<Row>, String> {
    let rows = match text.trim_start().chars().next() {
        None => return Err("an empty file".into()),
        Some('{') => match serde_json::from_str::<Map<String, Value>>(text) {
            // One object of several lines.
            Ok(object) if text.trim().contains('\n') => {
                let names: Vec<String> = object.keys().take(8).map(|name| format!("`{name}`")).collect();
                let expected = "expected a JSON list of objects, or an object in every line";
                return Err(format!("one JSON object, with the fields {}: {expected}", names.join(", ")));
            }
            _ => json_lines(text, columns),
        },
        Some('[') => json_list(text, columns)?,
        _ => table(text, columns)?,
    };
    let bad: Vec<&String> = rows.iter().filter_map(|row| row.as_ref().err()).collect();
    if !bad.is_empty() {
        let first: Vec<&str> = bad.iter().take(3).map(|reason| reason.as_str()).collect();
        let more = if bad.len() > 3 { format!("; and {} more", bad.len() - 3) } else { String::new() };
        return Err(format!("{}{more}", first.join("; ")));
    }
    Ok(rows.into_iter().flatten().collect())
}

fn table(text: &str, columns: &Columns) -> Result<Vec<Result<Row, String>>, String> {
    let first = |text: &str| text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_lowercase();
    // Excel's word for what stands between columns; an empty line in its place keeps the numbers of the others.
    let is_excels = first(text).strip_prefix("sep=").is_some_and(|delimiter| delimiter.chars().count() <= 1);
    let text = if is_excels { text.trim_start().trim_start_matches(|c| c != '\n') } else { text };
    let header = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let names = |delimiter: char| -> Vec<String> {
        let line = without_blanks_behind(delimiter, header).unwrap_or_else(|_| header.to_string());
        let record = reader(delimiter, &line).into_records().next().and_then(Result::ok).unwrap_or_default();
        record.iter().map(plain).collect()
    };
    let fits = DELIMITERS.into_iter().find_map(|delimiter| columns.find(&names(delimiter)).map(|_| delimiter));
    let delimiter = fits.or_else(|| DELIMITERS.into_iter().max_by_key(|delimiter| names(*delimiter).len())).unwrap_or(',');
    let names = names(delimiter);
    let places = columns.places(&names, "the columns of its first line")?;
    let text = without_blanks_behind(delimiter, text)?;
    let row = |record: Result<csv::StringRecord, csv::Error>| {
        let record = match record {
            Ok(record) => record,
            Err(error) => return Some(Err(error.to_string())),
        };
        let line = record.position().map_or(0, csv::Position::line);
        let mut cells: Vec<&str> = record.iter().collect();
        // Spreadsheets write rows of nothing, and empty cells behind the last one.
        if cells.iter().all(|cell| cell.is_empty()) {
            return None;
        }
        while cells.len() > names.len() && cells.last().is_some_and(|cell| cell.is_empty()) {
            cells.pop();
        }
        // In Kaggle's Flickr30k, one row lacks the separator between the number of a caption (`comment_number`) and the caption (`comment`).
        let is_kaggles = matches!(&names[..], [.., number, caption] if *number == format!("{caption}_number"));
        if delimiter == '|' && is_kaggles && cells.len() + 1 == names.len() {
            let numbered = cells.last().and_then(|cell| cell.split_once(' '));
            if let Some((number, caption)) = numbered.filter(|(number, _)| number.bytes().all(|byte| byte.is_ascii_digit())) {
                cells.pop();
                cells.extend([number, caption.trim()]);
            }
        }
        if cells.len() != names.len() {
            return Some(Err(format!("line {line}: {} columns, but the first line has {}", cells.len(), names.len())));
        }
        Some(places.row(&format!("line {line}"), |place| of_cell(cells[place])))
    };
    let is_empty =
        |record: &Result<csv::StringRecord, csv::Error>| record.as_ref().is_ok_and(|cells| cells.iter().all(str::is_empty));
    Ok(reader(delimiter, &text).into_records().skip_while(is_empty).skip(1).filter_map(row).collect())
}

fn reader(delimiter: char, text: &str) -> csv::Reader<&[u8]> {
    csv::ReaderBuilder::new()
        .delimiter(delimiter as u8)
        // Captions of Kaggle's `|` lists have lone quotes.
        .quoting(delimiter != '|')
        .flexible(true)
        .has_headers(false)
        .trim(csv::Trim::All)
        .from_reader(text.as_bytes())
}

/// The texts of a cell: one, or those of a JSON list.
fn of_cell(cell: &str) -> Result<Vec<String>, String> {
    let list: Option<Value> = cell.starts_with('[').then(|| serde_json::from_str(cell).ok()).flatten();
    // What Python's `str` makes of a list of texts.
    let is_list_of_python = (cell.starts_with("['") || cell.starts_with("[\"")) && cell.ends_with(']');
    match list {
        Some(list) => of_value(&list),
        None if is_list_of_python => Err("captions as a list of Python; write them as a JSON list, with double quotes".into()),
        None => Ok(vec![cell.to_string()]),
    }
}

/// The texts of a JSON value: one, or those of a list.
fn of_value(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(text) => Ok(vec![text.trim().to_string()]),
        Value::Array(texts) if texts.iter().all(Value::is_string) => {
            Ok(texts.iter().filter_map(Value::as_str).map(|text| text.trim().to_string()).collect())
        }
        Value::Array(texts) => {
            let other = texts.iter().find(|text| !text.is_string()).unwrap_or(value);
            Err(format!("{} is in a list of texts: expected a text", shown(other)))
        }
        other => Err(format!("{} is no text: expected one, or a list of them", shown(other))),
    }
}

/// The beginning of a value.
fn shown(value: &Value) -> String {
    value.to_string().chars().take(60).collect()
}

/// The text without the blanks at the beginning of fields: a quote behind them opens a quoted field, too.
///
/// # Errors
/// When a quoted field does not end, or goes on behind its end: rows would be lost in it.
fn without_blanks_behind(delimiter: char, text: &str) -> Result<String, String> {
    #[derive(Clone, Copy, PartialEq)]
    enum At {
        Start,
        Plain,
        Quoted,
        /// Behind a quote that closes, unless another one follows.
        Closed,
    }
    let mut out = String::with_capacity(text.len());
    let mut at = At::Start;
    let (mut line, mut opened) = (1, 1);
    for c in text.chars() {
        let is_quote = c == '"' && delimiter != '|';
        let ends = c == delimiter || c == '\n' || c == '\r';
        at = match at {
            At::Start if c == ' ' => continue,
            At::Start if is_quote => {
                opened = line;
                At::Quoted
            }
            At::Closed if is_quote => At::Quoted,
            At::Quoted if is_quote => At::Closed,
            At::Quoted => At::Quoted,
            At::Closed if c == ' ' => continue,
            At::Closed if !ends => {
                return Err(format!("line {line}: a quoted field goes on behind its end; write a quote inside of it twice"));
            }
            _ if ends => At::Start,
            _ => At::Plain,
        };
        line += usize::from(c == '\n');
        out.push(c);
    }
    match at {
        At::Quoted => Err(format!("line {opened}: a quote opens a field that does not end")),
        _ => Ok(out),
    }
}

fn json_lines(text: &str, columns: &Columns) -> Vec<Result<Row, String>> {
    let row = |(index, line): (usize, &str)| {
        let at = format!("line {}", index + 1);
        let object = serde_json::from_str(line).map_err(|error| format!("{at}: not the JSON that was expected: {error}"))?;
        of_object(&at, &object, columns)
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect()
}

fn json_list(text: &str, columns: &Columns) -> Result<Vec<Result<Row, String>>, String> {
    let objects: Vec<Fields> = serde_json::from_str(text).map_err(|error| format!("not the JSON that was expected: {error}"))?;
    Ok(objects.iter().enumerate().map(|(index, object)| of_object(&format!("entry {}", index + 1), object, columns)).collect())
}

fn of_object(at: &str, Fields(fields): &Fields, columns: &Columns) -> Result<Row, String> {
    let names: Vec<String> = fields.iter().map(|(name, _)| plain(name)).collect();
    let places = columns.places(&names, "its fields").map_err(|reason| format!("{at}: {reason}"))?;
    places.row(at, |place| {
        let (name, value) = &fields[place];
        match value {
            // A split may be counted.
            Value::Number(number) if places.split == Some(place) => Ok(vec![number.to_string()]),
            value => of_value(value).map_err(|reason| format!("`{name}`: {reason}")),
        }
    })
}

/// An object in which each name is there once: of two values, a reader would take one without a word.
struct Fields(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Each;

        impl<'de> Visitor<'de> for Each {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of an image and its captions")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields: Vec<(String, Value)> = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.iter().any(|(other, _)| *other == name) {
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
                    }
                    fields.push((name, value));
                }
                Ok(Fields(fields))
            }
        }

        deserializer.deserialize_map(Each)
    }
}
