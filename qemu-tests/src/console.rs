//! What came out of the machine's virtio console.
//!
//! A guest that used it says so: `@@ value console.domain NUMBER domain` names the domain that the console's endpoint was
//! in, and the console must have printed exactly [`text`]. Otherwise nothing must have come out.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::protocol::Value;

/// The value by which the guest says that it used the console.
pub const DOMAIN: &str = "console.domain";

/// What a guest that was given `seed` prints from `domain`.
#[must_use]
pub fn text(seed: u64, domain: u64) -> String {
    format!("seed {seed:#x} by way of domain {domain:#x}\n")
}

/// Checks what is in `file` against what the guest claims.
///
/// # Errors
///
/// When the file cannot be read, or differs.
pub fn verify(file: &Path, seed: u64, claimed: &[Value]) -> Result<()> {
    let bytes = fs::read(file)
        .with_context(|| format!("cannot read what the console printed: {}", file.display()))?;
    let found = String::from_utf8_lossy(&bytes);
    let domain = claimed.iter().find(|value| value.name == DOMAIN);
    let expected = domain.map_or_else(String::new, |value| text(seed, value.number));
    if found != expected {
        bail!("the console printed {found:?} instead of {expected:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_to_be_there_exactly_when_it_is_claimed() {
        let name = format!("qemu-tests-{}-console", std::process::id());
        let file = std::env::temp_dir().join(name);
        let claim = [Value { name: DOMAIN.into(), number: 9, unit: "domain".into() }];
        for (content, claimed, right) in [
            ("seed 0x7 by way of domain 0x9\n", &claim[..], true),
            ("", &[], true),
            ("", &claim, false),
            ("seed 0x7 by way of domain 0x8\n", &claim, false),
            ("seed 0x7 by way of domain 0x9\n", &[], false),
        ] {
            fs::write(&file, content).unwrap();
            assert_eq!(verify(&file, 7, claimed).is_ok(), right, "{content:?}, {claimed:?}");
        }
        fs::remove_file(&file).unwrap();
        assert!(verify(&file, 7, &[]).is_err(), "no file");
    }
}
