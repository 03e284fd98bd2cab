//! A device that comes and goes while the guest runs, when the guest asks for it.
//!
//! The guest prints `@@ ask plug`, and an `edu` appears in the empty root port; it prints `@@ ask unplug`, and QEMU wants the
//! device back, presses the slot's attention button, and has it once the guest has turned the slot's power off. A
//! second device finds room in the port only when QEMU is rid of the first. (It says so with an event too, but on some
//! machines not before their memory map changes once more.)

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::json;

use crate::machine::Arch;
use crate::qmp::Monitor;
use crate::socket;

/// The scenario that asks.
pub(crate) const SCENARIO: &str = "hot-plug";
/// The root port that is empty at first.
const SOCKET: &str = "socket";
/// The device that comes and goes.
const DEVICE: &str = "plugged";

/// The end of a monitor's socket that is the harness's. It goes away with the value.
#[derive(Debug)]
pub(crate) struct HotPlug {
    path: PathBuf,
    monitor: Option<Monitor>,
}

impl HotPlug {
    /// Chooses where the socket will be.
    pub(crate) fn new() -> Self {
        Self { path: socket::path("qmp"), monitor: None }
    }

    /// Where QEMU has to open its monitor.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Does what the guest asks for in this line, if it does.
    ///
    /// # Errors
    ///
    /// When that is not known, or QEMU does not do it in time.
    pub(crate) fn answer(&mut self, line: &str) -> Result<()> {
        match line.strip_prefix("@@ ask ") {
            None => Ok(()),
            Some("plug") => self.plug().context("the guest asked for a device"),
            Some("unplug") => self.unplug().context("the guest wants to be rid of its device"),
            Some(other) => bail!("the guest asks for `{other}`"),
        }
    }

    fn plug(&mut self) -> Result<()> {
        let device = json!({
            "driver": "edu", "id": DEVICE, "bus": SOCKET, "dma_mask": u64::MAX,
        });
        self.monitor()?.execute("device_add", &device).map(drop)
    }

    fn unplug(&mut self) -> Result<()> {
        self.monitor()?.execute("device_del", &json!({ "id": DEVICE })).map(drop)
    }

    fn monitor(&mut self) -> Result<&mut Monitor> {
        let monitor = match self.monitor.take() {
            Some(monitor) => monitor,
            None => Monitor::connect(&self.path)?,
        };
        Ok(self.monitor.insert(monitor))
    }
}

impl Drop for HotPlug {
    fn drop(&mut self) {
        // QEMU may have removed it, or never opened it.
        let _ = fs::remove_file(&self.path);
    }
}

/// The arguments that make the monitor and the empty root port. q35 would tell of what comes and goes by ACPI otherwise.
pub(crate) fn arguments(arch: Arch, monitor: &Path) -> Vec<String> {
    let native: &[&str] = match arch {
        Arch::X86_64 => &["-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off"],
        Arch::Aarch64 | Arch::Riscv64 => &[],
    };
    let words = [
        "-qmp".to_owned(),
        format!("unix:{},server=on,wait=off", monitor.display()),
        "-device".to_owned(),
        format!("pcie-root-port,id={SOCKET},bus=pcie.0,chassis=20,addr=0xa"),
    ];
    native.iter().map(|word| (*word).to_owned()).chain(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_guest_asks_for_is_done() {
        let mut hot_plug = HotPlug::new();
        assert!(hot_plug.answer("@@ check a ok").is_ok() && hot_plug.answer("ask plug").is_ok());
        let unknown = hot_plug.answer("@@ ask reset").unwrap_err();
        assert_eq!(unknown.to_string(), "the guest asks for `reset`");
    }

    #[test]
    fn sockets_have_paths_of_their_own() {
        let (one, other) = (HotPlug::new(), HotPlug::new());
        assert_ne!(one.path(), other.path());
        assert!(arguments(Arch::Aarch64, one.path())[1].contains(".qmp,server=on"));
        assert!(arguments(Arch::X86_64, one.path())[1].contains("acpi-pci-hotplug"));
    }
}
