//! A machine in QEMU, started for one case.

use std::fs::{self, File};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use qemu_tests::process::Process;
use qemu_tests::qemu::{Qemu, Version};
use virtio_iommu::EndpointId;
use virtio_iommu::transport::pci::PciTransport;

use crate::edu::Edu;
use crate::function::Function;
use crate::platform::HostPlatform;
use crate::ram::Ram;
use crate::wire::Wire;

/// The IOMMU's own function, 00:01.0.
pub const IOMMU: EndpointId = EndpointId::pci(0, 0, 1, 0);
/// An endpoint that does DMA, 00:04.0.
pub const EDU: EndpointId = EndpointId::pci(0, 0, 4, 0);
/// Another one, 00:05.0.
pub const EDU2: EndpointId = EndpointId::pci(0, 0, 5, 0);
/// An endpoint that QEMU knows and that does nothing.
pub const HOST_BRIDGE: EndpointId = EndpointId::pci(0, 0, 0, 0);

/// When the machine is ended, whatever it does.
const LIFE: Duration = Duration::from_secs(90);
/// How long QEMU may take to connect.
const START_LIMIT: Duration = Duration::from_secs(20);
/// Where BARs are placed: in q35's hole for devices, above what so little RAM can reach.
const FIRST_BAR: u64 = 0xc000_0000;

const FIRMWARE_LEN: usize = 64 * 1024;
/// Where the processor begins, from the end of the firmware.
const RESET_VECTOR: usize = FIRMWARE_LEN - 16;
/// `cli; hlt; jmp` back to the `hlt`.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];

/// A running QEMU with a virtio-iommu and two `edu` behind it.
///
/// Its clock goes by what its processor executes, and leaps ahead while that sleeps (`-icount`): the 100 ms
/// that `edu` takes for a transfer pass at once.
///
/// When it is dropped QEMU is killed. That it still answered then is checked: a case in which QEMU hung or
/// died fails.
#[derive(Debug)]
pub struct Machine {
    /// The endpoint [`EDU`].
    pub edu: Edu,
    /// The endpoint [`EDU2`].
    pub edu2: Edu,
    iommu: Function,
    version: Version,
    ram: Arc<Ram>,
    wire: Arc<Wire>,
    process: Option<Process>,
}

impl Machine {
    /// Starts a machine and does what its firmware would have done.
    ///
    /// # Errors
    /// When QEMU cannot be started, does not connect, or has not the devices that it was told to have.
    pub fn start(qemu: &Qemu) -> Result<Self> {
        Self::start_with(qemu, &[])
    }

    /// As [`start`](Self::start), with more arguments for QEMU.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn start_with(qemu: &Qemu, extra: &[&str]) -> Result<Self> {
        let directory = Directory::make()?;
        let firmware = directory.0.join("firmware");
        fs::write(&firmware, halting_firmware())?;
        let memory = directory.0.join("ram");
        let file = File::options().read(true).write(true).create_new(true).open(&memory)?;
        file.set_len(Ram::LEN)?;
        let ram = Arc::new(Ram::map(&file)?);
        let socket = directory.0.join("qtest");
        let listener = UnixListener::bind(&socket).context("cannot make a socket for QEMU")?;

        let mut command = Command::new(&qemu.path);
        command.args(arguments(&memory, &firmware, &socket)).args(extra);
        let mut process = Some(Process::start(&mut command)?);
        let stream = accept(&listener).map_err(|error| {
            let said = process.take().map(Process::into_stderr).unwrap_or_default();
            error.context(format!("QEMU said: {}", said.trim()))
        })?;
        let wire = Arc::new(Wire::new(stream, Instant::now() + LIFE));

        let mut next = FIRST_BAR;
        let mut function = |id: EndpointId| Function::set_up(&wire, id.get() as u16, &mut next);
        let iommu = function(IOMMU)?;
        iommu.enable_bus_mastering();
        let edu = Edu::new(&wire, function(EDU)?)?;
        let edu2 = Edu::new(&wire, function(EDU2)?)?;
        Ok(Self { edu, edu2, iommu, version: qemu.version, ram, wire, process })
    }

    /// The version of its QEMU.
    pub fn version(&self) -> Version {
        self.version
    }

    /// The guest's memory.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The platform for a driver.
    pub fn platform(&self) -> HostPlatform {
        HostPlatform::new(Arc::clone(&self.ram))
    }

    /// The driver's own transport over the IOMMU's registers.
    ///
    /// One at a time is to be used: a new one means that the former driver is gone, as after a reboot.
    ///
    /// # Panics
    /// When the IOMMU's capabilities make no sense.
    pub fn transport(&self) -> PciTransport {
        let regions = self.iommu.virtio_regions().expect("the IOMMU's virtio structures");
        // SAFETY: the regions are the IOMMU's, decoding is on, and the windows stay as long as the machine.
        // After that, an access ends in a panic and not in memory.
        unsafe { PciTransport::new(regions) }.expect("the IOMMU's virtio structures")
    }

    /// Commands that QEMU was sent so far.
    pub fn commands(&self) -> u64 {
        self.wire.commands()
    }

    /// Why QEMU does not answer any more, if so.
    pub fn failure(&self) -> Option<String> {
        self.wire.failure()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let failure = self.wire.failure();
        let said = self.process.take().map(Process::into_stderr).unwrap_or_default();
        let said = said.trim();
        if thread::panicking() {
            eprintln!("QEMU {}: {} {said}", self.version, failure.unwrap_or_default());
        } else if let Some(failure) = failure {
            panic!("{failure}; QEMU said: {said}");
        }
    }
}

fn arguments(memory: &Path, firmware: &Path, socket: &Path) -> Vec<String> {
    let size = Ram::LEN >> 20;
    let fixed = "-M q35,memory-backend=ram -nodefaults -display none -no-reboot -accel tcg \
                 -icount shift=0,sleep=off -qtest-log /dev/null -device virtio-iommu-pci,addr=1 \
                 -device edu,addr=4,dma_mask=0xffffffffffffffff -device edu,addr=5,dma_mask=0xffffffffffffffff";
    let mut words: Vec<String> = fixed.split_whitespace().map(str::to_owned).collect();
    let path = memory.display();
    let ram = format!("memory-backend-file,id=ram,size={size}M,mem-path={path},share=on");
    let firmware = firmware.display().to_string();
    let mut pair = |name: &str, value| words.extend([name.to_owned(), value]);
    pair("-m", size.to_string());
    pair("-object", ram);
    pair("-bios", firmware);
    pair("-qtest", format!("unix:{}", socket.display()));
    words
}

fn halting_firmware() -> Vec<u8> {
    let mut image = vec![HALT[1]; FIRMWARE_LEN];
    image[RESET_VECTOR..RESET_VECTOR + HALT.len()].copy_from_slice(&HALT);
    image
}

/// Waits for QEMU to connect.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let since = Instant::now();
    while since.elapsed() < START_LIMIT {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error).context("cannot talk to QEMU"),
        }
    }
    bail!("QEMU did not connect in {} s", START_LIMIT.as_secs())
}

/// A directory for the files of one machine, removed as soon as QEMU has opened them.
struct Directory(PathBuf);

impl Directory {
    fn make() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Short, since the name of a socket has room for about a hundred bytes.
        let name = format!("qtest-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}
