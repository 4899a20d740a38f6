//! A TOML document whose values have their key, and report the expected type.

use std::collections::{BTreeMap, HashSet};
use std::hash::Hash;
use std::ops::RangeInclusive;

use toml::Spanned;
use toml::de::DeValue;

/// A problem of a value.
pub(super) struct InvalidValue {
    /// The key, down to an entry of a table.
    pub(super) key: String,
    /// The place in the text, in bytes.
    pub(super) offset: usize,
    /// The problem, with the fix.
    pub(super) what: String,
}

/// A value, or everything that is wrong with it.
pub(super) type Parsed<T> = Result<T, Vec<InvalidValue>>;

/// One value of the document.
pub(super) struct TomlValue<'a, 'i> {
    /// The full key, such as `dns.listen`.
    pub(super) key: String,
    /// The value and its place.
    pub(super) value: &'a Spanned<DeValue<'i>>,
}

impl TomlValue<'_, '_> {
    /// The problem of this value.
    pub(super) fn fault<T>(&self, what: impl Into<String>) -> Parsed<T> {
        let offset = self.value.span().start;
        Err(vec![InvalidValue { key: self.key.clone(), offset, what: what.into() }])
    }

    /// The problem that the value is of another type than `expected`, which is the fix where that has none of
    /// its own.
    pub(super) fn unexpected<T>(&self, expected: &str, fix: Option<&str>) -> Parsed<T> {
        let fix = fix.map(|fix| format!("; {fix}")).unwrap_or_default();
        self.fault(format!("expected {expected}, found {}{fix}", kind(self.value.get_ref())))
    }

    /// A string or a number as a message has it.
    fn written(&self) -> String {
        match self.value.get_ref() {
            DeValue::String(text) => format!("'{text}'"),
            DeValue::Integer(integer) => integer.to_string(),
            value => kind(value).to_owned(),
        }
    }

    /// Whether it is an array.
    pub(super) fn is_list(&self) -> bool {
        self.value.get_ref().is_array()
    }

    /// `true` or `false`.
    pub(super) fn flag(&self) -> Parsed<bool> {
        match self.value.get_ref().as_bool() {
            Some(flag) => Ok(flag),
            None => self.unexpected("true or false", None),
        }
    }

    /// A string, as `parse` understands it.
    pub(super) fn text<T>(&self, parse: impl Fn(&str) -> Result<T, String>) -> Parsed<T> {
        match self.value.get_ref().as_str() {
            Some(text) => parse(text).or_else(|what| self.fault(what)),
            None => self.unexpected("a string", Some("write one in quotes")),
        }
    }

    /// An integer within a range.
    pub(super) fn integer<T: TryFrom<i64>>(&self, range: RangeInclusive<i64>) -> Parsed<T> {
        let Some(integer) = self.value.get_ref().as_integer() else {
            let is_quoted = self.value.get_ref().is_str();
            return self.unexpected("an integer", is_quoted.then_some("write one without quotes"));
        };
        let number = i64::from_str_radix(integer.as_str(), integer.radix()).ok();
        match number.filter(|number| range.contains(number)).and_then(|n| T::try_from(n).ok()) {
            Some(number) => Ok(number),
            None => self.fault(format!(
                "{integer} is out of range; write a number from {} to {}",
                range.start(),
                range.end()
            )),
        }
    }

    /// An array that isn't empty, as [`TomlValue::list_or_none`].
    pub(super) fn list<T: Eq + Hash>(
        &self,
        read: impl Fn(&TomlValue) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        match self.value.get_ref().as_array() {
            Some(array) if array.is_empty() => self.fault("is empty; write at least one element"),
            _ => self.list_or_none(read),
        }
    }

    /// An array without duplicates, each element as `read` understands it.
    pub(super) fn list_or_none<T: Eq + Hash>(
        &self,
        read: impl Fn(&TomlValue) -> Parsed<T>,
    ) -> Parsed<Vec<T>> {
        let Some(array) = self.value.get_ref().as_array() else {
            return self.unexpected("an array", Some("write a list in brackets"));
        };
        let (mut elements, mut read_values, mut faults) = (Vec::new(), Vec::new(), Vec::new());
        for value in array.iter() {
            let element = TomlValue { key: self.key.clone(), value };
            match read(&element) {
                Ok(element_read) => {
                    elements.push(element_read);
                    read_values.push(element);
                }
                Err(more) => faults.extend(more),
            }
        }
        let mut seen = HashSet::new();
        for (element, value) in elements.iter().zip(&read_values) {
            if !seen.insert(element) {
                let twice: Parsed<()> =
                    value.fault(format!("duplicate element {}; remove one", value.written()));
                faults.extend(twice.err().into_iter().flatten());
            }
        }
        faults.sort_by_key(|fault| fault.offset);
        if faults.is_empty() { Ok(elements) } else { Err(faults) }
    }

    /// A number from 0 to 1, in thousandths.
    pub(super) fn fraction(&self) -> Parsed<u16> {
        let text = match self.value.get_ref() {
            DeValue::Float(float) => float.as_str(),
            DeValue::Integer(integer) if integer.radix() == 10 => integer.as_str(),
            _ => return self.unexpected("a number from 0 to 1", None),
        };
        match text.parse::<f64>() {
            Ok(number) if (0.0..=1.0).contains(&number) => Ok((number * 1_000.0).round() as u16),
            _ => self.fault(format!("{text} is out of range; write a number from 0 to 1")),
        }
    }

    /// The entries of a table, each with its name.
    pub(super) fn entries(&self) -> Parsed<Vec<(String, TomlValue<'_, '_>)>> {
        let Some(table) = self.value.get_ref().as_table() else {
            return self.unexpected("a table", Some("write { NAME = VALUE }"));
        };
        let entries = table.iter().map(|(name, value)| {
            let name = name.get_ref().to_string();
            (name.clone(), TomlValue { key: format!("{}.{name}", self.key), value })
        });
        Ok(entries.collect())
    }

    /// A table with keys that the operator chooses, each key and each value as the two functions
    /// understand it.
    pub(super) fn table<T>(
        &self,
        parse_key: impl Fn(&str) -> Result<String, String>,
        read: impl Fn(&TomlValue) -> Parsed<T>,
    ) -> Parsed<BTreeMap<String, T>> {
        let Some(table) = self.value.get_ref().as_table() else {
            return self.unexpected("a table", Some("write { NAME = VALUE }"));
        };
        let (mut entries, mut faults) = (BTreeMap::new(), Vec::new());
        for (key, value) in table {
            let entry = TomlValue { key: format!("{}.{}", self.key, key.get_ref()), value };
            let name = parse_key(key.get_ref()).or_else(|what| entry.fault(what));
            match (name, read(&entry)) {
                (Ok(name), Ok(_)) if entries.contains_key(&name) => {
                    let twice: Parsed<()> =
                        entry.fault(format!("duplicate entry '{name}'; remove one"));
                    faults.extend(twice.err().into_iter().flatten());
                }
                (Ok(name), Ok(read)) => {
                    entries.insert(name, read);
                }
                (name, read) => {
                    faults.extend(name.err().into_iter().flatten());
                    faults.extend(read.err().into_iter().flatten());
                }
            }
        }
        if faults.is_empty() { Ok(entries) } else { Err(faults) }
    }
}

/// A value's type, with its article.
pub(super) fn kind(value: &DeValue) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}
