//! The driver's tests in every interleaving of their threads: the unit tests named `loom`, under `--cfg loom`.
//!
//! They have a target directory of their own, since every crate is built with that flag.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::{command, paths, progress};

/// How long listing the tests may take, once they are built.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs those whose name holds the filter, or all.
///
/// # Errors
///
/// When one fails, or there is none.
pub(crate) fn test(filter: Option<&str>) -> Result<()> {
    progress::heading("tests in every interleaving");
    let filter = filter.unwrap_or("loom");
    // Not quiet: the first time it takes minutes.
    command::run(cargo(filter).arg("--no-run"))?;
    let listed = command::output(cargo(filter).args(["--", "--list"]), LIMIT)?;
    let tests = count(&listed);
    if tests == 0 {
        bail!("no test of the driver under `--cfg loom` is named `{filter}`, so that none ran");
    }
    command::run(&mut cargo(filter))?;
    progress::note(&format!("{tests} tests ran in every interleaving"));
    Ok(())
}

fn cargo(filter: &str) -> Command {
    let mut cargo = command::cargo(&["test", "--release", "--package", "virtio-iommu", "--lib", filter]);
    cargo.arg("--target-dir").arg(paths::target().join("loom")).env("RUSTFLAGS", "--cfg loom");
    cargo
}

/// The tests in what a test binary lists, of modules named `loom` only.
fn count(listed: &str) -> usize {
    let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    names.filter(|name| name.split("::").any(|part| part == "loom")).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tests_of_loom_modules_count() {
        let listed =
            "ring::loom::no_doorbell_is_lost: test\nring::tests::blooms: test\n\n2 tests, 0 benchmarks\n";
        assert_eq!((count(listed), count("0 tests, 0 benchmarks\n")), (1, 0));
    }
}
