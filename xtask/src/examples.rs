//! The driver's examples: each is run, and has to say what it is there to show.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::{command, paths, progress};

/// How long one may take, once it is built.
const LIMIT: Duration = Duration::from_secs(60);

/// The example that needs a feature, which has its name.
const CONTEXTS: &str = "contexts";

/// An example, and what has to be in its output.
const EXAMPLES: [(&str, &[&str]); 7] = [
    (
        "attach_and_map",
        &[
            "the device wrote \"done\" there",
            "the device reads them: reached",
            "and writes to them: blocked",
            "another device reads them: blocked",
            "the device reads them, unmapped: blocked",
            "2 mapped, 2 unmapped",
        ],
    ),
    (
        "scatter_list",
        &["6 MAPs by 1 doorbell", "reads 0x8000 bytes in one go: abcdefgh", "all of it gone by 1 request"],
    ),
    (
        "faults",
        &[
            "the disk: endpoint 0x10: write at 0xdead0000 blocked, no mapping",
            "the network card: endpoint 0x18: write at 0xbad00000 blocked, no mapping",
            "reported 500 of its accesses in all",
            "suspended: true, the disk: false",
            "and back: true",
        ],
    ),
    (
        "async",
        &[
            "both are sent and wait: (true, true)",
            "wake-ups so far: 0",
            "the device answered 2: Wake",
            "wake-ups now: 2",
            "dropped while unmapping: 1 mapping in quarantine",
            "after the answer: 0",
        ],
    ),
    (
        "virtio_drivers_device",
        &[
            "features that were accepted: 0x300000000",
            "2 pieces of ring memory mapped",
            "16 bytes of entropy: [0b, 30, 55,",
            "requests to the IOMMU for that: 0",
            "memory that is not its own: blocked",
            "the driver is gone: 2 unmapped",
        ],
    ),
    (
        CONTEXTS,
        &[
            "PASID 1, MAP and UNMAP              0x1000  allowed",
            "PASID 2, a page table               0x1000  blocked",
            "no PASID, anonymous: blocked        0x2000  blocked",
            "PASID 2, not invalidated            0x2000  allowed",
            "PASID 2, invalidated                0x2000  blocked",
            "fault at 0x7008 of its own, since at 0x100008 nothing is mapped",
            "with it: 1 shadow, true",
            "taken away again: 0 shadows, false",
        ],
    ),
    (
        "viot_dump",
        &[
            "IOMMU 0x30: PCI function 0000:00:01.0",
            "device at 0xc0000000: endpoint 0x10000 of IOMMU 0x30",
            "endpoint 0x8 is the IOMMU 0x30 itself",
            "0000:00:02.0 is endpoint 0x10",
        ],
    ),
];

/// Builds and runs all.
///
/// # Errors
///
/// When one does not build, fails, does not say what it has to, or is not listed here.
pub(crate) fn run() -> Result<()> {
    progress::heading("examples");
    let directory = paths::root().join("driver/examples");
    for entry in std::fs::read_dir(&directory).with_context(|| format!("{}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if name != "support" && !EXAMPLES.iter().any(|(listed, _)| *listed == name) {
            bail!("{} is not listed in xtask/src/examples.rs", path.display());
        }
    }
    command::run(&mut command::cargo(&["build", "--package", "virtio-iommu", "--examples"]))?;
    for (name, wanted) in EXAMPLES {
        let mut run = command::cargo(&["run", "--quiet", "--package", "virtio-iommu", "--example", name]);
        if name == CONTEXTS {
            run.args(["--features", CONTEXTS]);
        }
        let said = command::output(&mut run, LIMIT)?;
        if let Some(missing) = missing(&said, wanted) {
            bail!("the example {name} does not say `{missing}`, but:\n{said}");
        }
        progress::note(&format!("{name}: {} lines", said.lines().count()));
    }
    Ok(())
}

/// The first of the wanted words that do not come after those before.
fn missing<'a>(said: &str, wanted: &[&'a str]) -> Option<&'a str> {
    let mut rest = said;
    for words in wanted {
        match rest.find(words) {
            Some(at) => rest = &rest[at + words.len()..],
            None => return Some(words),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::missing;

    #[test]
    fn words_have_to_come_in_order() {
        assert_eq!(missing("one two three", &["one", "three"]), None);
        assert_eq!(missing("one two three", &["two", "one"]), Some("one"));
        assert_eq!(missing("", &["one"]), Some("one"));
    }
}
