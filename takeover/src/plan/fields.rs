//! A TOML table read key by key. What is wrong is collected with its line; what nobody asked for is named at the end.

use super::{TEXT_BYTES_MAX, WORDS_MAX};
use std::cell::RefCell;
use std::fmt;
use std::time::Duration;
use toml::Spanned;
use toml::de::{DeTable, DeValue};
use varve_common::point::age_of;

/// Something wrong in the plan's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Finding {
    /// From 1.
    pub(super) line: usize,
    /// What is wrong, with the key's name.
    pub(super) what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

/// The text, and what was found wrong in it.
pub(super) struct Findings<'t> {
    text: &'t str,
    found: RefCell<Vec<Finding>>,
}

impl<'t> Findings<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, found: RefCell::default() }
    }

    /// The line of a place in the text.
    pub(super) fn line(&self, at: usize) -> usize {
        let before = self.text.as_bytes().get(..at).unwrap_or(self.text.as_bytes());
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    pub(super) fn add(&self, line: usize, what: impl Into<String>) {
        self.found.borrow_mut().push(Finding { line, what: what.into() });
    }

    /// What was found, in the order of the text.
    pub(super) fn into_sorted(self) -> Vec<Finding> {
        let mut found = self.found.into_inner();
        found.sort_by_key(|finding| finding.line);
        found
    }
}

struct Field<'i> {
    key: String,
    line: usize,
    value: DeValue<'i>,
}

/// The keys of one table that were not asked for yet.
pub(super) struct Fields<'f, 'i> {
    findings: &'f Findings<'f>,
    /// "step 3 'data'": begins every finding.
    pub(super) of: String,
    pub(super) line: usize,
    fields: Vec<Field<'i>>,
    asked: Vec<&'static str>,
    there: Vec<&'static str>,
}

/// A value and its line.
pub(super) type At<T> = (T, usize);

impl<'f, 'i> Fields<'f, 'i> {
    pub(super) fn new(findings: &'f Findings<'f>, of: &str, line: usize, table: DeTable<'i>) -> Self {
        let field = |(key, value): (Spanned<std::borrow::Cow<'i, str>>, Spanned<DeValue<'i>>)| Field {
            line: findings.line(key.span().start),
            key: key.into_inner().into_owned(),
            value: value.into_inner(),
        };
        let fields = table.into_iter().map(field).collect();
        Self { findings, of: of.to_owned(), line, fields, asked: Vec::new(), there: Vec::new() }
    }

    pub(super) fn wrong(&self, line: usize, what: impl fmt::Display) {
        let of = if self.of.is_empty() { String::new() } else { format!("{}: ", self.of) };
        self.findings.add(line, format!("{of}{what}"));
    }

    /// The value as it is.
    pub(super) fn raw(&mut self, key: &'static str) -> Option<At<DeValue<'i>>> {
        self.asked.push(key);
        let place = self.fields.iter().position(|field| field.key == key)?;
        let field = self.fields.swap_remove(place);
        self.there.push(key);
        Some((field.value, field.line))
    }

    fn typed<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        take: impl FnOnce(&DeValue<'i>) -> Option<T>,
    ) -> Option<At<T>> {
        let (value, line) = self.raw(key)?;
        let taken = take(&value);
        if taken.is_none() {
            self.wrong(line, format_args!("{key} is {wanted}, not of the type {}", value.type_str()));
        }
        Some((taken?, line))
    }

    fn present<T>(&self, key: &'static str, value: Option<T>) -> Option<T> {
        // A value that is there and wrong was reported as such.
        if value.is_none() && !self.was_there(key) {
            self.wrong(self.line, format_args!("the key '{key}' is missing"));
        }
        value
    }

    /// A text without control characters, not empty.
    pub(super) fn text(&mut self, key: &'static str) -> Option<At<String>> {
        let (text, line) = self.typed(key, "a text", |value| value.as_str().map(str::to_owned))?;
        match text_fault(&text) {
            None => Some((text, line)),
            Some(fault) => {
                self.wrong(line, format_args!("{key} {fault}"));
                None
            }
        }
    }

    pub(super) fn required_text(&mut self, key: &'static str) -> Option<At<String>> {
        let text = self.text(key);
        self.present(key, text)
    }

    pub(super) fn flag(&mut self, key: &'static str) -> Option<At<bool>> {
        self.typed(key, "true or false", |value| value.as_bool())
    }

    pub(super) fn number(&mut self, key: &'static str) -> Option<At<i64>> {
        self.typed(key, "a whole number", |value| {
            let number = value.as_integer()?;
            i64::from_str_radix(number.as_str(), number.radix()).ok()
        })
    }

    /// Whether the key was asked for and is there, right or wrong.
    pub(super) fn was_there(&self, key: &str) -> bool {
        self.there.contains(&key)
    }

    /// One of some words.
    pub(super) fn one_of<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)]) -> Option<At<T>> {
        let (text, line) = self.text(key)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            self.wrong(line, format_args!("{key} is one of {}, not '{text}'", known.join(", ")));
        }
        Some((found?, line))
    }

    /// `90s`, `1m30s`, `500ms`.
    pub(super) fn duration(&mut self, key: &'static str, least: Duration, most: Duration) -> Option<Duration> {
        let (text, line) = self.text(key)?;
        match age_of(&text) {
            Ok(time) if (least..=most).contains(&time) => Some(time),
            Ok(_) => {
                self.wrong(line, format_args!("{key} '{text}' is not from {least:?} to {}h", most.as_secs() / 3600));
                None
            }
            Err(why) => {
                self.wrong(line, format_args!("{key} '{text}' is no time such as 90s, 1m30s or 500ms: {why}"));
                None
            }
        }
    }

    /// An array of texts.
    pub(super) fn texts(&mut self, key: &'static str) -> Option<At<Vec<String>>> {
        let array = self.typed(key, "an array of texts", |value| {
            value.as_array()?.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        });
        let (texts, line) = array?;
        if texts.len() > WORDS_MAX {
            self.wrong(line, format_args!("{key} has more than {WORDS_MAX} entries"));
            return None;
        }
        Some((texts, line))
    }

    /// A program with its arguments: an array is taken word by word, a text is for `/bin/sh -c`.
    pub(super) fn words(&mut self, key: &'static str) -> Option<At<Vec<String>>> {
        let is_text = self.fields.iter().any(|field| field.key == key && field.value.is_str());
        let (words, line) = if is_text {
            let (script, line) = self.typed(key, "a command", |value| value.as_str().map(str::to_owned))?;
            if script.trim().is_empty() || script.contains('\0') || script.len() > TEXT_BYTES_MAX {
                self.wrong(line, format_args!("{key} is empty, too long or holds a zero"));
                return None;
            }
            (vec!["/bin/sh".to_owned(), "-c".to_owned(), script], line)
        } else {
            self.texts(key)?
        };
        let bad = words.iter().any(|word| word.contains('\0') || word.len() > TEXT_BYTES_MAX);
        if bad || words.first().is_some_and(|program| program.is_empty()) {
            self.wrong(line, format_args!("{key} has an empty program, a word that is too long, or a zero in it"));
            return None;
        }
        if let Some(program) = words.first()
            && !program.starts_with('/')
            && !program.starts_with('{')
        {
            self.wrong(line, format_args!("{key}: say where the program '{program}' is, with an absolute path"));
            return None;
        }
        Some((words, line))
    }

    /// A program that must be there.
    pub(super) fn some_words(&mut self, key: &'static str) -> Option<At<Vec<String>>> {
        let (words, line) = self.words(key)?;
        if words.is_empty() {
            self.wrong(line, format_args!("{key} names no program"));
            return None;
        }
        Some((words, line))
    }

    pub(super) fn required_words(&mut self, key: &'static str) -> Option<At<Vec<String>>> {
        let words = self.some_words(key);
        self.present(key, words)
    }

    /// Names every key that was not asked for.
    pub(super) fn finish(self) {
        for field in &self.fields {
            let known = self.asked.join(", ");
            self.wrong(field.line, format_args!("there is no key '{}' here; there are {known}", field.key));
        }
    }
}

fn text_fault(text: &str) -> Option<String> {
    if text.is_empty() {
        return Some("is empty".to_owned());
    }
    if text.len() > TEXT_BYTES_MAX {
        return Some(format!("has more than {TEXT_BYTES_MAX} bytes"));
    }
    text.chars().any(char::is_control).then(|| "holds a control character".to_owned())
}
