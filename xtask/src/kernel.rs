//! Builds a kernel image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anyhow::{Context as _, Result, bail};
use qemu_tests::boot::NEEDS_CONTEXTS;
use qemu_tests::machine::{Arch, Image};

use crate::setup::toolchain::{self, Toolchain};
use crate::{command, image, paths, progress};

/// What the kernel is built with, of the workspace's profiles.
const PROFILE: &str = "kernel";

/// What the kernel is built with, of its features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Features {
    /// None: what everything is measured with.
    Standard,
    /// The draft's contexts, nested domains, and a virtio-iommu in software to try them on.
    Contexts,
}

impl Features {
    /// What a scenario takes.
    pub(crate) fn of(scenario: &str) -> Self {
        if NEEDS_CONTEXTS.contains(&scenario) { Self::Contexts } else { Self::Standard }
    }
}

/// A kernel that was built.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The ELF file, which knows its symbols.
    pub(crate) elf: PathBuf,
    /// What QEMU boots; on most architectures the same file.
    pub(crate) image: PathBuf,
}

/// Builds the kernel for `arch` with whatever compiler can.
///
/// # Errors
///
/// When there is no compiler and none can be installed, or when the build fails.
pub(crate) fn build(arch: Arch, features: Features) -> Result<Kernel> {
    let toolchain = toolchain::ensure(arch)?;
    // A directory for each architecture, so that they can be built at once. Both kinds share what does not differ.
    let directory = directory(toolchain).join(arch.name());
    let (name, kind) = match features {
        Features::Standard => ("kernel-standard", ""),
        Features::Contexts => ("kernel-with-contexts", " with contexts"),
    };
    let mut build = toolchain::cargo(toolchain, arch.target());
    build.args(["build", "--profile", PROFILE, "--package", "platform", "--bin", "kernel"]);
    build.args(["--target", arch.target()]);
    if features == Features::Contexts {
        build.args(["--features", "contexts"]);
    }
    build.arg("--target-dir").arg(&directory);
    progress::note(&format!("building the kernel{kind} for {} with {toolchain}", arch.name()));
    command::run(&mut build)?;
    let built = directory.join(arch.target()).join(PROFILE).join("kernel");
    let bytes =
        fs::read(&built).with_context(|| format!("the build left no kernel image at {}", built.display()))?;
    check(&bytes, features)?;
    // A name of its own, so that neither image is ever taken for the other.
    let elf = built.with_file_name(name);
    put(&elf, &bytes)?;
    let image = match arch.image() {
        Image::Elf => elf.clone(),
        Image::Arm64 => flat(&elf, &bytes)?,
    };
    Ok(Kernel { elf, image })
}

/// Parts of symbols that the standard kernel does not have, in either way of mangling: what it is measured with is all that
/// it consists of.
const OF_CONTEXTS: [&str; 2] = ["12virtio_iommu8contexts", "18virtio_iommu_model"];

/// Sees that a feature that is off left nothing in the kernel, and that one that is on is there: another build may have put
/// its kernel there just then.
fn check(elf: &[u8], features: Features) -> Result<()> {
    let part = OF_CONTEXTS.into_iter().find(|part| holds(elf, part));
    match (features, part) {
        (Features::Standard, Some(part)) => bail!(
            "the kernel without contexts has symbols with {part}; if another build was running here, try again"
        ),
        (Features::Contexts, None) => {
            bail!(
                "the kernel with contexts has no symbol of them; if another build was running here, try again"
            )
        }
        _ => Ok(()),
    }
}

/// Puts a file in its place at once, since a QEMU may be reading what was there.
fn put(path: &Path, bytes: &[u8]) -> Result<()> {
    let new = path.with_extension(process::id().to_string());
    let written = fs::write(&new, bytes).and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

fn holds(bytes: &[u8], part: &str) -> bool {
    // Symbols are ASCII, and what is not does not matter.
    String::from_utf8_lossy(bytes).contains(part)
}

/// Makes the flat image beside the ELF file.
fn flat(elf: &Path, bytes: &[u8]) -> Result<PathBuf> {
    let flat = image::flatten(bytes)
        .with_context(|| format!("{} does not make an image for arm64's boot protocol", elf.display()))?;
    let path = elf.with_extension("image");
    put(&path, &flat)?;
    Ok(path)
}

/// Each compiler has a directory of its own, so that changing between them rebuilds nothing.
pub(crate) fn directory(toolchain: Toolchain) -> PathBuf {
    paths::target().join("kernel").join(match toolchain {
        Toolchain::Rustup => "rustup",
        Toolchain::Debian => "debian",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_found_wherever_they_are() {
        assert!(holds(b"\0_RNvNtCs9dGXsK4UtOz_12virtio_iommu8contexts6nested\0", OF_CONTEXTS[0]));
        assert!(!holds(b"\0_RNvNtCs9dGXsK4UtOz_12virtio_iommu6domain\0", OF_CONTEXTS[0]));
        assert!(!holds(b"", OF_CONTEXTS[1]));
    }

    #[test]
    fn neither_kernel_is_taken_for_the_other() {
        let standard = b"\0_RNvNtCs9dGXsK4UtOz_12virtio_iommu6domain\0".as_slice();
        let with_contexts = b"\0_RNvNtCs9dGXsK4UtOz_12virtio_iommu8contexts6nested\0".as_slice();
        for (elf, features, good) in [
            (standard, Features::Standard, true),
            (standard, Features::Contexts, false),
            (with_contexts, Features::Standard, false),
            (with_contexts, Features::Contexts, true),
        ] {
            assert_eq!(check(elf, features).is_ok(), good, "{features:?}");
        }
    }

    #[test]
    fn only_the_drafts_scenarios_have_its_code() {
        assert_eq!(Features::of("nesting"), Features::Contexts);
        assert_eq!(Features::of("contexts"), Features::Contexts);
        assert_eq!(Features::of("default"), Features::Standard);
    }
}
