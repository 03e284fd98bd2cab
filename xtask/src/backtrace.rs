//! Names the addresses that a kernel prints when it panics or meets an exception.
//!
//! The kernel prints bare addresses, since it has no use for its own symbols. `addr2line` of binutils, which came with
//! the C compiler, knows the functions and lines. Where it is missing the addresses stand for themselves.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{command, paths};

/// What stands before the addresses of the callers.
const CALLERS: &str = "  called from ";
/// How long naming them may take.
const LIMIT: Duration = Duration::from_secs(20);

/// The callers in the last backtrace among `lines`, one line each; nothing if there is none.
pub(crate) fn explain(lines: &[String], image: &Path) -> Vec<String> {
    let addresses =
        lines.iter().rev().find_map(|line| line.strip_prefix(CALLERS)).map(call_sites).unwrap_or_default();
    if addresses.is_empty() {
        return Vec::new();
    }
    let mut name = Command::new("addr2line");
    name.args(["--functions", "--demangle", "--pretty-print", "--exe"]).arg(image);
    name.args(addresses.iter().map(|address| format!("{address:#x}")));
    let Ok(named) = command::output(&mut name, LIMIT) else { return Vec::new() };
    let root = format!("{}/", paths::root().display());
    named.lines().map(|line| format!("    {}", line.replace(&root, ""))).collect()
}

/// The calls that return to these addresses: each is the byte before.
fn call_sites(words: &str) -> Vec<u64> {
    let addresses =
        words.split_whitespace().map_while(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    addresses.map(|address| address.saturating_sub(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_before_their_returns() {
        assert_eq!(call_sites("0x21f6fc 0x2017cd"), [0x21_f6fb, 0x20_17cc]);
        assert_eq!(call_sites("0x0 nonsense 0x1"), [0]);
        assert!(call_sites("").is_empty());
    }

    #[test]
    fn without_a_backtrace_there_is_nothing_to_name() {
        assert!(explain(&["hello".to_owned()], Path::new("/nonexistent")).is_empty());
        assert!(explain(&["  called from 0x1".to_owned()], Path::new("/nonexistent")).is_empty());
    }
}
