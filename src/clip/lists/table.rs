//! Lists of images and captions that people write themselves: tables and JSON.

use serde_json::{Map, Value};

use super::{Row, path_of};

/// What a column of images may be called, in lower case.
const IMAGE: [&str; 10] =
    ["path", "filepath", "file_path", "image", "image_path", "image_name", "file_name", "filename", "file", "img"];
/// What a column of captions may be called; numbers may follow.
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
    fn places(&self, names: &[String]) -> Option<Places> {
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
                        let rest = name.strip_prefix(usual).map(|rest| rest.trim_start_matches(['_', ' ']));
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
    fn row(&self, at: &str, texts: impl Fn(usize) -> Vec<String>) -> Result<Row, String> {
        let one = |place: usize| texts(place).into_iter().next().unwrap_or_default();
        let image = one(self.image);
        let captions: Vec<String> = self.captions.iter().flat_map(|place| texts(*place)).filter(|text| !text.is_empty()).collect();
        if captions.iter().any(|text| is_list_of_python(text)) {
            return Err(format!("{at}: captions as a list of Python; write them as a JSON list, with double quotes"));
        }
        if image.is_empty() || captions.is_empty() {
            return Err(format!("{at}: no {}", if image.is_empty() { "image" } else { "caption" }));
        }
        let (image, folder) = (path_of(&image), path_of(&self.folder.map(one).unwrap_or_default()));
        // Some lists have the whole path where others have the folder.
        let image = if folder.ends_with(&image) { folder } else { folder.join(image) };
        Ok(Row { image, captions, split: self.split.map(one).filter(|split| !split.is_empty()) })
    }
}

/// The rows of a list of one's own; all of its first bad lines in the error.
pub(super) fn rows(text: &str, columns: &Columns) -> Result<Vec<Row>, String> {
    let rows = match text.trim_start().chars().next() {
        Some('{') => json_lines(text, columns),
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
    let header = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let names = |delimiter: char| -> Vec<String> { header.split(delimiter).map(plain).collect() };
    let fits = DELIMITERS.into_iter().find_map(|delimiter| Some((delimiter, columns.places(&names(delimiter))?)));
    let Some((delimiter, places)) = fits else {
        let most = DELIMITERS.into_iter().map(names).max_by_key(Vec::len).unwrap_or_default();
        return Err(format!("the columns of its first line are {}", columns.not_among(&most)));
    };
    let count = names(delimiter).len();
    let text = without_blanks_behind(delimiter, text)?;
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
        places.row(&format!("line {line}"), |place| of_cell(record.get(place).unwrap_or_default()))
    };
    Ok(reader.records().map(row).collect())
}

/// Whether a caption is what Python's `str` makes of a list of texts.
fn is_list_of_python(text: &str) -> bool {
    (text.starts_with("['") || text.starts_with("[\"")) && text.ends_with(']') && serde_json::from_str::<Value>(text).is_err()
}

/// The texts of a cell: one, or those of a JSON list.
fn of_cell(cell: &str) -> Vec<String> {
    let list: Option<Vec<String>> = cell.starts_with('[').then(|| serde_json::from_str(cell).ok()).flatten();
    list.map_or_else(|| vec![cell.to_string()], |list| list.iter().map(|text| text.trim().to_string()).collect())
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
    let objects: Vec<Map<String, Value>> =
        serde_json::from_str(text).map_err(|error| format!("not the JSON that was expected: {error}"))?;
    Ok(objects.iter().enumerate().map(|(index, object)| of_object(&format!("entry {}", index + 1), object, columns)).collect())
}

fn of_object(at: &str, object: &Map<String, Value>, columns: &Columns) -> Result<Row, String> {
    let names: Vec<String> = object.keys().map(|name| plain(name)).collect();
    let places = columns.places(&names).ok_or_else(|| format!("{at}: its fields are {}", columns.not_among(&names)))?;
    let values: Vec<&Value> = object.values().collect();
    places.row(at, |place| match values.get(place) {
        Some(Value::String(text)) => vec![text.trim().to_string()],
        Some(Value::Array(texts)) => texts.iter().filter_map(Value::as_str).map(|text| text.trim().to_string()).collect(),
        _ => Vec::new(),
    })
}
