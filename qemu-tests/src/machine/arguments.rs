//! QEMU's command line, word by word.

use std::ffi::OsString;
use std::path::Path;

/// A list of arguments under construction.
#[derive(Default)]
pub(super) struct Arguments(Vec<OsString>);

impl Arguments {
    /// Adds each word of `words`.
    pub(super) fn words(&mut self, words: &str) -> &mut Self {
        self.0.extend(words.split_whitespace().map(OsString::from));
        self
    }

    /// Adds one argument as it is.
    pub(super) fn word(&mut self, word: impl Into<OsString>) -> &mut Self {
        self.0.push(word.into());
        self
    }

    /// Adds `prefix` and `path` as one argument; QEMU takes a doubled comma for one that belongs to the path.
    pub(super) fn joined(&mut self, prefix: &str, path: &Path) -> &mut Self {
        let mut word = OsString::from(prefix);
        match path.to_str() {
            Some(text) => word.push(text.replace(',', ",,")),
            None => word.push(path),
        }
        self.word(word)
    }

    /// Adds arguments as they are.
    pub(super) fn all(&mut self, arguments: &[OsString]) -> &mut Self {
        self.0.extend(arguments.iter().cloned());
        self
    }

    /// The list.
    pub(super) fn finish(self) -> Vec<OsString> {
        self.0
    }
}
