//! A process that serves an IOMMU over vhost-user, beside QEMU.
//!
//! It says `listening` once there is a socket, and when QEMU has gone what the device was asked, a line for each
//! number. It is a witness as QEMU's trace is: what the guest claims has to be the same.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::process::{Ended, Process};
use crate::protocol::Value;
use crate::socket;

/// How long it may take to listen, and, after QEMU, to end.
const PATIENCE: Duration = Duration::from_secs(10);
/// The numbers that both say.
const CLAIMED: [&str; 5] = ["attach", "map", "unmap", "requests", "faults"];
/// What only the server knows, and what has to be none: rules that the guest's driver broke.
const VIOLATIONS: &str = "violations";

/// A server that is running. Its socket goes away with the value.
#[derive(Debug)]
pub(crate) struct IommuServer {
    socket: PathBuf,
    lines: Receiver<String>,
    thread: Option<JoinHandle<(Ended, String)>>,
}

impl IommuServer {
    /// Starts `program`, which is killed some time after `deadline`.
    ///
    /// # Errors
    ///
    /// When it does not listen.
    pub(crate) fn start(program: &Path, deadline: Option<Duration>) -> Result<Self> {
        let socket = socket::path("vhost");
        let mut process = Process::start(Command::new(program).arg(&socket))?;
        let (sender, lines) = channel();
        let limit = deadline.map(|deadline| deadline + PATIENCE);
        let thread = thread::spawn(move || {
            // Nobody may listen any more.
            let ended = process.follow(limit, &mut |line| drop(sender.send(line.to_owned())));
            (ended, process.into_stderr())
        });
        let mut server = Self { socket, lines, thread: Some(thread) };
        match server.lines.recv_timeout(PATIENCE) {
            Ok(line) if line == "listening" => Ok(server),
            Ok(line) => bail!("{} says `{line}` and does not listen", program.display()),
            Err(_) => {
                let (ended, stderr) = server.end()?;
                bail!("{} does not listen: it {ended}: {}", program.display(), stderr.trim())
            }
        }
    }

    /// Where QEMU finds it.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// After QEMU: what the server came to grief at, or else what speaks against the claims of a guest that passed, a
    /// sentence each.
    pub(crate) fn objections(mut self, claimed: Option<&[Value]>) -> Vec<String> {
        match self.end() {
            Ok((Ended::Exit(0), _)) => {}
            Ok((ended, stderr)) => return vec![format!("the IOMMU's server {ended}: {}", stderr.trim())],
            Err(error) => return vec![format!("{error:#}")],
        }
        let said: Vec<String> = self.lines.try_iter().collect();
        claimed.map_or_else(Vec::new, |claimed| differences(claimed, &said))
    }

    /// Waits for its end, which is QEMU's, or comes now when QEMU never came.
    fn end(&mut self) -> Result<(Ended, String)> {
        // A front end that goes at once. If there was one already, nobody takes this one.
        drop(UnixStream::connect(&self.socket));
        let thread = self.thread.take().context("the IOMMU's server has ended before")?;
        thread.join().map_err(|_| anyhow::anyhow!("nobody knows how the IOMMU's server ended"))
    }
}

impl Drop for IommuServer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            // Nobody wants to know how.
            let _ = self.end();
        }
        // It removes its socket by itself, if it is not killed.
        let _ = fs::remove_file(&self.socket);
    }
}

/// Says what differs between what the guest claims and what the server said.
fn differences(claimed: &[Value], said: &[String]) -> Vec<String> {
    let number = |name: &str| {
        let line = said.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|number| number.parse::<u64>().ok())
    };
    let claim = |name: &str| claimed.iter().find(|value| value.name == name).map(|value| value.number);
    let mut differences = Vec::new();
    for name in CLAIMED {
        match (claim(name), number(name)) {
            (Some(claimed), Some(served)) if claimed == served => {}
            (claimed, served) => differences.push(format!(
                "the guest claims `{name}` {}, but the IOMMU's server saw {}",
                shown(claimed),
                shown(served)
            )),
        }
    }
    match number(VIOLATIONS) {
        Some(0) => {}
        broken => differences.push(format!("the IOMMU's server saw {} rules broken", shown(broken))),
    }
    differences
}

fn shown(number: Option<u64>) -> String {
    number.map_or_else(|| "nothing".to_owned(), |number| number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Vec<Value> {
        let value =
            |(name, number): (&str, u64)| Value { name: name.into(), number, unit: "requests".into() };
        [("attach", 1), ("map", 2), ("unmap", 3), ("requests", 4), ("faults", 5), ("kicks", 6)]
            .map(value)
            .into()
    }

    fn said(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn each_number_is_compared_and_none_may_be_missing() {
        let agreed = "attach 1\nmap 2\nunmap 3\nrequests 4\nfaults 5\nviolations 0";
        assert_eq!(differences(&claims(), &said(agreed)), Vec::<String>::new());
        let other = differences(&claims(), &said(&agreed.replace("map 2", "map 7")));
        assert_eq!(other, ["the guest claims `map` 2, but the IOMMU's server saw 7"]);
        let broken = differences(&claims(), &said(&agreed.replace("violations 0", "violations 1")));
        assert_eq!(broken, ["the IOMMU's server saw 1 rules broken"]);
        assert_eq!(differences(&claims(), &[]).len(), 6);
        assert_eq!(differences(&[], &said(agreed)).len(), 5);
    }

    #[test]
    fn what_does_not_listen_is_no_server() {
        let error = IommuServer::start(Path::new("/bin/false"), None).unwrap_err();
        assert!(format!("{error:#}").contains("does not listen"), "{error:#}");
        let error = IommuServer::start(Path::new("/bin/echo"), None).unwrap_err();
        assert!(format!("{error:#}").contains("does not listen"), "{error:#}");
    }
}
