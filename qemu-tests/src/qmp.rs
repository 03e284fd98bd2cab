//! QEMU's monitor, through which the machine is changed while it runs.
//!
//! It speaks JSON, a line each way: a greeting, then an answer to each command, with events in between.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

/// How long QEMU may take to open its socket, and to answer a command.
const ANSWER: Duration = Duration::from_secs(10);
/// Longer lines are not believed.
const LINE_BYTES: u64 = 1 << 20;
/// How often the socket is tried.
const TICK: Duration = Duration::from_millis(10);

/// A monitor that is connected and takes commands.
#[derive(Debug)]
pub(crate) struct Monitor {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Monitor {
    /// Connects to the socket that QEMU opens at `path`.
    ///
    /// # Errors
    ///
    /// When QEMU does not open it in time, or is not QEMU.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if started.elapsed() > ANSWER => {
                    return Err(error)
                        .with_context(|| format!("QEMU opened no monitor at {}", path.display()));
                }
                Err(_) => thread::sleep(TICK),
            }
        };
        let lines = BufReader::new(stream.try_clone()?);
        let mut monitor = Self { stream, lines };
        let greeting = monitor.line(Instant::now() + ANSWER)?;
        ensure!(greeting.get("QMP").is_some(), "the monitor greets with {greeting}");
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command and returns what it returns.
    ///
    /// # Errors
    ///
    /// When QEMU refuses, or does not answer in time.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.stream.write_all(format!("{line}\n").as_bytes()).with_context(|| command.to_owned())?;
        let until = Instant::now() + ANSWER;
        loop {
            let answer = self.line(until).with_context(|| command.to_owned())?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {}", error["desc"].as_str().unwrap_or("QEMU refuses"));
            }
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            // An event, which nobody waits for.
        }
    }

    /// The next line.
    fn line(&mut self, until: Instant) -> Result<Value> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let left = until.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "QEMU's monitor does not answer in time");
            self.stream.set_read_timeout(Some(left))?;
            // What came of a line before the time was up stays in it.
            match self.lines.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
                Ok(0) => bail!("QEMU closed its monitor"),
                Ok(_) => ensure!((line.len() as u64) < LINE_BYTES, "QEMU's monitor says too much"),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => return Err(error).context("QEMU's monitor"),
            }
        }
        serde_json::from_slice(&line)
            .with_context(|| format!("QEMU's monitor says `{}`", String::from_utf8_lossy(&line).trim()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::thread::JoinHandle;

    use super::*;

    /// A monitor that greets, and to each command says the next of `answers`, which may be several lines.
    fn monitor(name: &str, answers: Vec<&'static str>) -> (PathBuf, JoinHandle<Vec<String>>) {
        let path = std::env::temp_dir().join(format!("qmp-{}-{name}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut commands = BufReader::new(stream.try_clone().unwrap()).lines();
            stream.write_all(b"{\"QMP\": {\"version\": {}}}\n").unwrap();
            let mut heard = Vec::new();
            for answer in ["{\"return\": {}}"].into_iter().chain(answers) {
                let Some(Ok(command)) = commands.next() else { break };
                heard.push(command);
                stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
            heard
        });
        (path, served)
    }

    #[test]
    fn events_before_an_answer_are_skipped() {
        let deleted =
            "{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"plugged\"}}\n{\"return\": {\"a\": 1}}";
        let (path, served) = monitor("events", vec![deleted]);
        let mut connected = Monitor::connect(&path).unwrap();
        let returned = connected.execute("device_del", &json!({ "id": "plugged" })).unwrap();
        assert_eq!(returned["a"], 1);
        drop(connected);
        let heard = served.join().unwrap();
        assert!(heard[0].contains("qmp_capabilities") && heard[1].contains("\"device_del\""), "{heard:?}");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_refusal_says_why() {
        let (path, _served) = monitor(
            "refusal",
            vec!["{\"error\": {\"class\": \"GenericError\", \"desc\": \"Bus 'x' not found\"}}"],
        );
        let error = Monitor::connect(&path).unwrap().execute("device_add", &json!({})).unwrap_err();
        assert_eq!(error.to_string(), "device_add: Bus 'x' not found");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn an_answer_that_does_not_come_is_not_waited_for_forever() {
        let (path, served) = monitor("silence", Vec::new());
        let mut connected = Monitor::connect(&path).unwrap();
        let error = connected.execute("device_add", &json!({})).unwrap_err();
        assert!(format!("{error:#}").starts_with("device_add"), "{error:#}");
        served.join().unwrap();
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn what_is_no_monitor_is_refused() {
        let path = std::env::temp_dir().join(format!("qmp-{}-other", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"220 ready\n").unwrap();
        });
        assert!(format!("{:#}", Monitor::connect(&path).unwrap_err()).contains("220 ready"));
        served.join().unwrap();
        std::fs::remove_file(path).unwrap();
    }
}
