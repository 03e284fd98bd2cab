//! Running other programs.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use qemu_tests::process;

use crate::paths;

/// A cargo of the toolchain that runs this program, in the root of the workspace.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(paths::cargo());
    command.current_dir(paths::root()).args(arguments);
    // These describe the package `xtask`. A build script that watches one would run again for nothing.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// How long one command may take, far more than any does on a slow machine: a test that hangs is to fail, not to take
/// everything after it along.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Runs a program that talks to the user itself.
///
/// # Errors
///
/// When it cannot be started, does not end within [`LIMIT`], or does not succeed.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    run_within(command, Some(LIMIT))
}

/// The same with a limit of its own, or none.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn run_within(command: &mut Command, limit: Option<Duration>) -> Result<()> {
    let line = describe(command);
    let status = process::run(command, limit).with_context(|| format!("`{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed ({status}); its own messages are above");
    }
    Ok(())
}

/// Runs a program quietly and returns what it printed.
///
/// # Errors
///
/// When it cannot be started, does not end in time, or does not succeed; then its last words are in the error.
pub(crate) fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let line = describe(command);
    let output = process::capture(command, limit).with_context(|| format!("`{line}`"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> =
        stderr.lines().chain(stdout.lines()).filter(|line| !line.trim().is_empty()).collect();
    // The line that says what is wrong comes with a mark in apt and cargo, and last in most others.
    let marked = said.iter().find(|line| line.starts_with("E:") || line.starts_with("error"));
    let words = marked.or(said.last()).unwrap_or(&"it said nothing");
    bail!("`{line}` failed ({}): {}", output.status, words.trim())
}

/// The program and its first arguments, for messages.
fn describe(command: &Command) -> String {
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program()).to_string_lossy();
    let mut line = name.into_owned();
    for argument in command.get_args().take(6) {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    if command.get_args().len() > 6 {
        line.push_str(" ...");
    }
    line
}
