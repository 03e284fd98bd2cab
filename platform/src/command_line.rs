//! The kernel's command line: `key=value` words, for example `scenario=default seed=0x5eed`.
//!
//! A word without `=` is a key with an empty value. Of a key given twice, the last word counts, so that what a user
//! appends wins over what the tool gave. Nothing here knows which keys exist: [`CommandLine::unknown`] lets the user of
//! the keys refuse a misspelt one.

use alloc::string::{String, ToString};
use core::fmt;

/// The longest command line that is kept, in bytes.
pub const MAX_LEN_BYTES: usize = 4096;

/// A command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    text: String,
}

impl CommandLine {
    /// Takes over the text that a boot loader handed over, up to [`MAX_LEN_BYTES`].
    ///
    /// Bytes that are not UTF-8 become the replacement character.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let bytes = &bytes[..bytes.len().min(MAX_LEN_BYTES)];
        Self { text: String::from_utf8_lossy(bytes).trim().to_string() }
    }

    /// The whole text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The words, each as key and value.
    pub fn words(&self) -> impl Iterator<Item = (&str, &str)> {
        self.text.split_whitespace().map(|word| word.split_once('=').unwrap_or((word, "")))
    }

    /// The value of `key`, if the key is there.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.words().filter(|(k, _)| *k == key).last().map(|(_, value)| value)
    }

    /// The value of `key` as a number: decimal, or hexadecimal after `0x`, with `_` between digits as in Rust.
    ///
    /// # Errors
    ///
    /// [`NotANumber`] when the key is there and its value is no number of 64 bits.
    pub fn number<'a>(&'a self, key: &'a str) -> Result<Option<u64>, NotANumber<'a>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let digits = value.replace('_', "");
        let parsed = match digits.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16),
            None => digits.parse(),
        };
        parsed.map(Some).map_err(|_| NotANumber { key, value })
    }

    /// The first key that is not in `known`.
    pub fn unknown(&self, known: &[&str]) -> Option<&str> {
        self.words().map(|(key, _)| key).find(|key| !known.contains(key))
    }
}

/// A value on the command line that should be a number and is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotANumber<'a> {
    /// The key.
    pub key: &'a str,
    /// What was given for it.
    pub value: &'a str,
}

impl fmt::Display for NotANumber<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "command line: {}={} is not a number of 64 bits (decimal, or hexadecimal after 0x)",
            self.key, self.value
        )
    }
}

impl core::error::Error for NotANumber<'_> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_and_the_last_one_wins() {
        let line = CommandLine::from_bytes(b"  scenario=leak quiet seed=1 x=a=b seed=0x5_eed\n");
        assert_eq!(line.get("scenario"), Some("leak"));
        assert_eq!(line.get("quiet"), Some(""));
        assert_eq!(line.get("x"), Some("a=b"));
        assert_eq!(line.get("absent"), None);
        assert_eq!(line.number("seed"), Ok(Some(0x5eed)));
        assert_eq!(line.number("absent"), Ok(None));
    }

    #[test]
    fn a_bad_number_is_named() {
        for value in ["", "0x", "-1", "12z", "0x1_0000_0000_0000_0000"] {
            let text = alloc::format!("seed={value}");
            let line = CommandLine::from_bytes(text.as_bytes());
            assert_eq!(line.number("seed"), Err(NotANumber { key: "seed", value }));
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        let line = CommandLine::from_bytes(b"scenario=x sede=1");
        assert_eq!(line.unknown(&["scenario", "seed"]), Some("sede"));
        assert_eq!(line.unknown(&["scenario", "sede"]), None);
    }

    #[test]
    fn garbage_and_length_are_bounded() {
        assert_eq!(CommandLine::from_bytes(&[0xff; 10_000]).as_str().chars().count(), MAX_LEN_BYTES);
        assert_eq!(CommandLine::from_bytes(b"").words().count(), 0);
    }
}
