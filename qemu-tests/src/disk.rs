//! Disk images: made from a seed before the boot, checked after it.
//!
//! The first MiB is a pattern that the guest reads and digests; its SHA-256 travels on the kernel's command line. The
//! second MiB is zero, and the guest writes another pattern into its first 64 KiB. Kernel and harness use the
//! same generator, so that nobody has to carry the bytes.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

/// Bytes of the part that the guest only reads, from offset 0.
pub const READ_BYTES: usize = 1024 * 1024;
/// Bytes that the guest writes, from offset [`READ_BYTES`].
pub const WRITTEN_BYTES: usize = 64 * 1024;
/// Bytes of the whole image.
pub const IMAGE_BYTES: usize = 2 * 1024 * 1024;
/// What the seed is combined with for the pattern that the guest writes: "WRIT".
pub const WRITTEN_SEED: u64 = 0x5752_4954;

/// A disk image in a file.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Where it is.
    pub path: PathBuf,
    /// What its pattern was made from.
    pub seed: u64,
    /// SHA-256 of its first MiB, in lower-case hex.
    pub sha256: String,
}

impl Disk {
    /// Writes the image of `seed` to `path`, over what was there.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn create(path: &Path, seed: u64) -> Result<Self> {
        let image = image(seed);
        let sha256 = sha256(&image[..READ_BYTES]);
        fs::write(path, image).with_context(|| format!("cannot write the disk image {}", path.display()))?;
        Ok(Self { path: path.to_owned(), seed, sha256 })
    }

    /// Checks the image after the guest has run.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or differs from what the guest had to leave behind.
    pub fn verify(&self) -> Result<()> {
        let image = fs::read(&self.path)
            .with_context(|| format!("cannot read the disk image {}", self.path.display()))?;
        if image.len() != IMAGE_BYTES {
            bail!(
                "the disk image {} has {} bytes instead of {IMAGE_BYTES}",
                self.path.display(),
                image.len()
            );
        }
        match first_difference(&image, &expected(self.seed)) {
            Some(difference) => {
                bail!("the disk image {} is not as it must be: {difference}", self.path.display())
            }
            None => Ok(()),
        }
    }
}

/// The first byte that is not as it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its offset in the image.
    pub offset: usize,
    /// What is there.
    pub found: u8,
    /// What must be there.
    pub expected: u8,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = match self.offset {
            offset if offset < READ_BYTES => "the part that is only read",
            offset if offset < READ_BYTES + WRITTEN_BYTES => "the part that the guest writes",
            _ => "the part behind it, which stays zero",
        };
        let Self { offset, found, expected } = self;
        write!(f, "at offset {offset:#x} ({part}) is {found:#04x} instead of {expected:#04x}")
    }
}

/// `len_bytes` bytes of the pattern of `seed`.
#[must_use]
pub fn pattern(seed: u64, len_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0; len_bytes];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// SHA-256 of `bytes`, in lower-case hex.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The image before the guest runs.
#[must_use]
pub fn image(seed: u64) -> Vec<u8> {
    let mut bytes = pattern(seed, READ_BYTES);
    bytes.resize(IMAGE_BYTES, 0);
    bytes
}

/// The image after the guest has run.
#[must_use]
pub fn expected(seed: u64) -> Vec<u8> {
    let mut bytes = pattern(seed, READ_BYTES);
    bytes.extend(pattern(seed ^ WRITTEN_SEED, WRITTEN_BYTES));
    bytes.resize(IMAGE_BYTES, 0);
    bytes
}

fn first_difference(found: &[u8], expected: &[u8]) -> Option<Difference> {
    let pairs = found.iter().zip(expected).enumerate();
    let mut differences = pairs.filter(|(_, (found, expected))| found != expected);
    differences.next().map(|(offset, (&found, &expected))| Difference { offset, found, expected })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("qemu-tests-{}-{name}", std::process::id()))
    }

    #[test]
    fn the_image_is_a_pattern_and_zeros() {
        let image = image(7);
        assert_eq!(image.len(), IMAGE_BYTES);
        assert_ne!(image[..16], [0; 16]);
        assert!(image[READ_BYTES..].iter().all(|&byte| byte == 0));
        assert_ne!(pattern(7, 64), pattern(8, 64));
    }

    #[test]
    fn an_untouched_image_lacks_the_writes() {
        let path = temporary("untouched");
        let disk = Disk::create(&path, 7).unwrap();
        assert_eq!(disk.sha256.len(), 64);
        let error = disk.verify().unwrap_err().to_string();
        fs::remove_file(&path).unwrap();
        assert!(error.contains("0x100000") && error.contains("the guest writes"), "{error}");
    }

    #[test]
    fn a_written_image_is_right_and_each_part_is_checked() {
        let path = temporary("written");
        let disk = Disk::create(&path, 7).unwrap();
        let good = expected(7);
        fs::write(&path, &good).unwrap();
        disk.verify().unwrap();
        for (offset, part) in
            [(5, "only read"), (READ_BYTES + 9, "guest writes"), (IMAGE_BYTES - 1, "stays zero")]
        {
            let mut bad = good.clone();
            bad[offset] ^= 0x80;
            fs::write(&path, &bad).unwrap();
            let error = disk.verify().unwrap_err().to_string();
            let bytes = format!("{:#04x} instead of {:#04x}", bad[offset], good[offset]);
            assert!(
                error.contains(&format!("{offset:#x}")) && error.contains(part) && error.contains(&bytes),
                "{error}"
            );
        }
        fs::write(&path, &good[1..]).unwrap();
        assert!(disk.verify().unwrap_err().to_string().contains("2097151 bytes"));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn the_digest_is_that_of_the_first_mebibyte() {
        let path = temporary("digest");
        let disk = Disk::create(&path, 0).unwrap();
        fs::remove_file(&path).unwrap();
        let again: String =
            Sha256::digest(pattern(0, READ_BYTES)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(disk.sha256, again);
    }
}
