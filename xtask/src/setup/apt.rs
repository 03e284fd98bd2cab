//! The machine's own apt sources: which mirror it uses, and by which keys it trusts it.
//!
//! Both forms are read: deb822 (`*.sources`) and one line each (`*.list`). Addresses are only ever taken from there.

use std::fs;
use std::path::Path;

/// A place where packages come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its address.
    pub(crate) uri: String,
    /// Lines about trust (`Signed-By`, `Trusted`) in deb822 form; a key may stand in them, over several lines.
    pub(crate) trust: Vec<String>,
}

impl Source {
    /// This source as a deb822 entry for `suites`, each with `main`.
    pub(crate) fn entry(&self, suites: &[String]) -> String {
        let mut lines = vec!["Types: deb".to_owned(), format!("URIs: {}", self.uri)];
        lines.push(format!("Suites: {}", suites.join(" ")));
        lines.push("Components: main".to_owned());
        lines.extend(self.trust.iter().cloned());
        lines.join("\n") + "\n"
    }
}

/// The sources under `directory` (`/etc/apt`) that have packages of `suite` in `main`. Each address once.
pub(crate) fn sources(directory: &Path, suite: &str) -> Vec<Source> {
    let mut files = vec![directory.join("sources.list")];
    let entries = fs::read_dir(directory.join("sources.list.d")).into_iter().flatten().flatten();
    files.extend(entries.map(|entry| entry.path()));
    files.sort();
    let mut found: Vec<Source> = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let sources = match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => deb822(&text, suite),
            Some("list") => one_line(&text, suite),
            _ => continue,
        };
        for source in sources {
            if !found.iter().any(|known| known.uri == source.uri) {
                found.push(source);
            }
        }
    }
    found
}

/// Reads `deb [options] URI SUITE COMPONENT...` lines.
fn one_line(text: &str, suite: &str) -> Vec<Source> {
    text.lines().filter_map(|line| one_line_source(line, suite)).collect()
}

fn one_line_source(line: &str, suite: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_owned();
    let fits = words.next()? == suite && words.any(|component| component == "main");
    let trust = options.split_whitespace().filter_map(|option| {
        let (name, value) = option.split_once('=')?;
        match name.to_ascii_lowercase().as_str() {
            "signed-by" => Some(format!("Signed-By: {}", value.replace(',', " "))),
            "trusted" => Some(format!("Trusted: {value}")),
            _ => None,
        }
    });
    (fits && !uri.starts_with("cdrom:")).then(|| Source { uri, trust: trust.collect() })
}

/// Reads deb822 entries: fields, one per line and continued by indented ones, with an empty line between entries.
fn deb822(text: &str, suite: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut entry: Vec<&str> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if !line.trim().is_empty() {
            entry.push(line);
            continue;
        }
        found.extend(deb822_sources(&entry, suite));
        entry.clear();
    }
    found
}

fn deb822_sources(entry: &[&str], suite: &str) -> Vec<Source> {
    let has = |name: &str, word: &str| field(entry, name).iter().any(|found| found == word);
    let disabled = has("enabled", "no") || has("enabled", "false");
    if disabled || !has("types", "deb") || !has("suites", suite) || !has("components", "main") {
        return Vec::new();
    }
    let mut trust = Vec::new();
    for name in ["signed-by", "trusted"] {
        trust.extend(lines_of(entry, name).iter().map(|line| (*line).to_owned()));
    }
    let uris = field(entry, "uris").into_iter().filter(|uri| !uri.starts_with("cdrom:"));
    uris.map(|uri| Source { uri, trust: trust.clone() }).collect()
}

/// The words of a field.
fn field(entry: &[&str], name: &str) -> Vec<String> {
    let lines = lines_of(entry, name);
    let values = lines.iter().enumerate().map(|(index, line)| match (index, line.split_once(':')) {
        (0, Some((_, value))) => value,
        _ => line,
    });
    values.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// The lines of a field, its name and its continuations included.
fn lines_of<'a>(entry: &[&'a str], name: &str) -> Vec<&'a str> {
    let is_field =
        |line: &&&str| line.split_once(':').is_some_and(|(field, _)| field.eq_ignore_ascii_case(name));
    let Some(start) = entry.iter().position(|line| is_field(&line)) else { return Vec::new() };
    let more = entry[start + 1..].iter().take_while(|line| line.starts_with([' ', '\t']));
    [entry[start]].into_iter().chain(more.copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCES: &str = "\
# a comment
Types: deb
# another
URIs: http://mirror.invalid/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.invalid/debian-security
Suites: bookworm-security
Components: main

Types: deb-src
URIs: http://source.invalid/debian
Suites: bookworm
Components: main

Enabled: no
Types: deb
URIs: http://disabled.invalid/debian
Suites: bookworm
Components: main
";

    #[test]
    fn deb822_entries_of_the_suite() {
        let found = deb822(SOURCES, "bookworm");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].uri, "http://mirror.invalid/debian");
        let entry = found[0].entry(&["bookworm".into(), "bookworm-backports".into()]);
        assert_eq!(
            entry,
            "Types: deb\nURIs: http://mirror.invalid/debian\nSuites: bookworm bookworm-backports\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
    }

    #[test]
    fn a_key_inside_an_entry_is_kept_whole() {
        let text = "Types: deb\nURIs: mirror+file:/etc/apt/mirrors/debian.list\nSuites: trixie\nComponents: main contrib\nSigned-By:\n -----BEGIN-----\n .\n mQIN\n -----END-----\n";
        let found = deb822(text, "trixie");
        assert_eq!(found[0].uri, "mirror+file:/etc/apt/mirrors/debian.list");
        assert_eq!(found[0].trust, ["Signed-By:", " -----BEGIN-----", " .", " mQIN", " -----END-----"]);
    }

    #[test]
    fn one_line_entries_of_the_suite() {
        let text = "\
deb cdrom:[Debian]/ bookworm main
deb [arch=amd64 signed-by=/k.gpg trusted=yes] https://a.invalid/debian bookworm contrib main # note
deb-src https://b.invalid/debian bookworm main
deb https://c.invalid/debian bookworm-updates main
#deb https://d.invalid/debian bookworm main
deb https://e.invalid/apt cloud main
";
        let found = one_line(text, "bookworm");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].uri, "https://a.invalid/debian");
        assert_eq!(found[0].trust, ["Signed-By: /k.gpg", "Trusted: yes"]);
    }

    #[test]
    fn odd_text_is_nothing() {
        for text in ["", "deb", "deb [", "deb [x] ", ": :\n :", "Types deb\n\n\n", "\u{fffd}"] {
            assert!(one_line(text, "bookworm").is_empty() && deb822(text, "bookworm").is_empty());
        }
    }
}
