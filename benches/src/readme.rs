//! The table's place in README.md.

use std::io::{Error, ErrorKind, Result};
use std::path::Path;

const FROM: &str = "<!-- the newest table: varve-bench --readme -->";
const TO: &str = "<!-- end of the table -->";

/// Replaces what stands between the marks.
pub fn insert(path: &Path, table: &str) -> Result<()> {
    let text = std::fs::read_to_string(path)?;
    let (head, rest) = text.split_once(FROM).ok_or_else(|| missing(FROM))?;
    let (_, tail) = rest.split_once(TO).ok_or_else(|| missing(TO))?;
    std::fs::write(path, format!("{head}{FROM}\n{table}\n{TO}{tail}"))
}

fn missing(mark: &str) -> Error {
    Error::new(ErrorKind::InvalidData, format!("no line '{mark}'"))
}
