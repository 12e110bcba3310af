//! The settings of a `config.json`, each read by name.

use serde_json::{Map, Value};

/// The largest size that a setting may have: beyond it no model was ever made, and products of three still fit 64 bits.
pub(super) const LARGEST: u64 = 1 << 20;

/// What stands in the file; errors are in words and name the setting.
pub(super) struct Settings(Map<String, Value>);

impl Settings {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err("not the JSON that was expected: no object".into()),
            Err(error) => Err(format!("not the JSON that was expected: {error}")),
        }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// A setting that is there and not `null`.
    pub(super) fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// A size of at least 1 under the first of these names that is there; other names must not contradict.
    pub(super) fn size(&self, names: &[&str]) -> Result<usize, String> {
        let there: Vec<&str> = names.iter().copied().filter(|name| self.value(name).is_some()).collect();
        let Some(first) = there.first() else { return Err(format!("`{}` is missing", names[0])) };
        let size = self.count(first, None)?;
        if size == 0 {
            return Err(format!("`{first}` must be at least 1, got 0"));
        }
        match there.iter().find(|name| self.value(name) != self.value(first)) {
            Some(other) => Err(format!("`{first}` and `{other}` are two names of one setting, and differ")),
            None => Ok(size),
        }
    }

    /// A whole number that is not negative.
    pub(super) fn count(&self, name: &str, default: Option<usize>) -> Result<usize, String> {
        let Some(value) = self.value(name) else { return default.ok_or(format!("`{name}` is missing")) };
        match value.as_u64() {
            Some(count) if count <= LARGEST => Ok(count as usize),
            Some(_) => Err(format!("`{name}` = {value}: at most {LARGEST} is possible")),
            None => Err(format!("`{name}` = {value}: expected a whole number that is not negative")),
        }
    }

    /// A finite number.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64, String> {
        let Some(value) = self.value(name) else { return Ok(default) };
        value.as_f64().filter(|number| number.is_finite()).ok_or(format!("`{name}` = {value}: expected a number"))
    }

    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool, String> {
        let Some(value) = self.value(name) else { return Ok(default) };
        value.as_bool().ok_or(format!("`{name}` = {value}: expected true or false"))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&str>, String> {
        let Some(value) = self.value(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or(format!("`{name}` = {value}: expected text"))
    }

    /// Whether a setting is there and `null`.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_null)
    }

    /// A list of whole numbers, empty if it is not there.
    pub(super) fn list(&self, name: &str) -> Result<Vec<usize>, String> {
        let Some(value) = self.value(name) else { return Ok(Vec::new()) };
        let numbers =
            || value.as_array()?.iter().map(|item| item.as_u64().map(|item| item as usize)).collect::<Option<Vec<usize>>>();
        numbers().ok_or(format!("`{name}` = {value}: expected a list of whole numbers"))
    }

    /// Refuses a setting that has another value than the only one that is known, if it is there.
    pub(super) fn only(&self, name: &str, known: &Value) -> Result<(), String> {
        match self.value(name) {
            Some(value) if value != known => Err(format!("`{name}` = {value} is not supported: expected {known}")),
            _ => Ok(()),
        }
    }
}
