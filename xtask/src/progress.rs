//! What the user sees while something takes long. All of it goes to standard error; colour only to a terminal.

use std::io::{IsTerminal as _, Write as _, stderr, stdout};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// How often a long step says that it is still at it.
const STILL: Duration = Duration::from_secs(10);

const BOLD: &str = "1";
const RED: &str = "1;31";
const GREEN: &str = "1;32";

/// Prints a line about what comes next.
pub(crate) fn note(text: &str) {
    eprintln!("{} {text}", painted("xtask:", BOLD, stderr().is_terminal()));
}

/// Prints why the command fails.
pub(crate) fn error(text: &str) {
    eprintln!("{} {text}", painted("error:", RED, stderr().is_terminal()));
}

/// Prints the heading of a step.
pub(crate) fn heading(text: &str) {
    eprintln!("\n{}", painted(&format!("== {text}"), BOLD, stderr().is_terminal()));
}

/// Prints to standard output that something passed.
pub(crate) fn pass(text: &str) {
    println!("{} {text}", painted("PASS", GREEN, stdout().is_terminal()));
    let _ = stdout().flush();
}

/// Prints to standard output that something failed.
pub(crate) fn fail(text: &str) {
    println!("{} {text}", painted("FAIL:", RED, stdout().is_terminal()));
    let _ = stdout().flush();
}

/// Runs a long step: says what it is, every few seconds that it still runs, and how long it took.
pub(crate) fn during<T>(what: &str, step: impl FnOnce() -> T) -> T {
    note(&format!("{what} ..."));
    let started = Instant::now();
    let (done, waiting) = channel::<()>();
    let ticker = thread::spawn(move || {
        while waiting.recv_timeout(STILL) == Err(RecvTimeoutError::Timeout) {
            note(&format!("  ... {} s", started.elapsed().as_secs()));
        }
    });
    let result = step();
    drop(done);
    let _ = ticker.join();
    note(&format!("  {}", seconds(started.elapsed())));
    result
}

/// A duration in seconds, for people.
pub(crate) fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn painted(text: &str, colour: &str, to_terminal: bool) -> String {
    let wanted = to_terminal && std::env::var_os("NO_COLOR").is_none();
    if wanted { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
}
