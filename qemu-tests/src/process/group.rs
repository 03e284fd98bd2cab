//! The process groups that have been started and have not ended.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The process groups that have not ended yet.
static RUNNING: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn running() -> MutexGuard<'static, BTreeSet<i32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes an interrupt (Ctrl-C, SIGTERM, SIGHUP) end every child before this process ends with status 130.
///
/// # Errors
///
/// When it was called before.
pub fn end_children_on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        // The lock stays held, so that no thread starts another child meanwhile.
        let groups = running();
        for &group in groups.iter() {
            // A group that is gone already is what is wanted.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        std::process::exit(130);
    })
    .context("cannot watch for Ctrl-C")
}

/// Starts a child that leads a group of its own, with empty input and both outputs piped.
pub(super) fn spawn(command: &mut Command) -> Result<Child> {
    spawn_talking(command.stdout(Stdio::piped()).stderr(Stdio::piped()))
}

/// The same with the outputs where the command has them.
pub(super) fn spawn_talking(command: &mut Command) -> Result<Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null()).process_group(0);
    let mut groups = running();
    let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
    groups.insert(group_of(&child));
    Ok(child)
}

/// The status of a child that has ended.
pub(super) fn reap(child: &mut Child) -> Option<ExitStatus> {
    let mut groups = running();
    let status = child.try_wait().ok().flatten()?;
    // What it left behind goes with it.
    let group = group_of(child);
    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    groups.remove(&group);
    Some(status)
}

/// Kills the group of a child that has not been reaped, and reaps it.
pub(super) fn kill(child: &mut Child) -> Option<ExitStatus> {
    let group = group_of(child);
    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    // SIGKILL cannot be ignored, so this is short.
    let status = child.wait().ok();
    running().remove(&group);
    status
}

/// The group that a child leads has the child's own number.
fn group_of(child: &Child) -> i32 {
    i32::try_from(child.id()).unwrap_or(i32::MAX)
}
