//! The driver's fuzz targets, without cargo-fuzz: built with the flags that it would give, by the compiler in use.
//!
//! The flags are unstable ones, which a stable compiler takes with `RUSTC_BOOTSTRAP`. The package is no member of the
//! workspace, since nothing else is built with them, and has a directory of its own under `target`. Corpora and inputs
//! that failed are where cargo-fuzz would put them, so that either can be used.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use qemu_tests::process;

use crate::{command, paths, progress};

const PACKAGE: &str = "driver/fuzz";
const MANIFEST: &str = "driver/fuzz/Cargo.toml";

/// A target.
struct Target {
    name: &'static str,
    /// The length in bytes from which on inputs only get slow.
    max_len: u32,
    /// How long it runs in ci: a parser is through with most of what it can do in no time.
    smoke_seconds: u64,
}

const TARGETS: [Target; 8] = [
    // The long ones first, so that none runs alone at the end.
    Target { name: "sequences", max_len: 2048, smoke_seconds: 9 },
    Target { name: "hostile_used_ring", max_len: 2048, smoke_seconds: 9 },
    Target { name: "context_sequences", max_len: 768, smoke_seconds: 9 },
    Target { name: "context_requests", max_len: 768, smoke_seconds: 6 },
    Target { name: "properties", max_len: 512, smoke_seconds: 3 },
    Target { name: "events", max_len: 192, smoke_seconds: 3 },
    Target { name: "viot", max_len: 512, smoke_seconds: 3 },
    Target { name: "device_tree_maps", max_len: 256, smoke_seconds: 3 },
];

/// What cargo-fuzz gives the compiler: coverage that libFuzzer reads, and the address sanitizer.
const RUST_FLAGS: [&str; 11] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-sanitizer-coverage-stack-depth",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    // Counters of one function are in one place.
    "-Ccodegen-units=1",
    "-Zsanitizer=address",
    "-Cforce-frame-pointers=yes",
];

/// What a run without `--seed` begins with, so that two begin alike.
const SEED: u32 = 0x5eed;
/// Targets that run at a time in ci.
const AT_A_TIME: usize = 2;
/// How long one input may take, in seconds.
const INPUT_SECONDS: u32 = 10;
/// How long after its time a target may end, before it is killed.
const GRACE: Duration = Duration::from_secs(30);
/// The most memory that a target may take, in MiB. The sanitizer takes most of it.
const MEMORY_MIB: u32 = 2048;
/// How long the compiler may take to say which machine it is for.
const ASK_LIMIT: Duration = Duration::from_secs(30);

/// Arguments of `cargo xtask fuzz`.
#[derive(Args)]
pub(crate) struct FuzzArguments {
    /// Run only this target
    #[arg(long, value_name = "NAME", value_parser = TARGETS.map(|target| target.name))]
    target: Option<String>,
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// What the choice of inputs is made from; each run goes on with what earlier ones found
    #[arg(long, value_name = "N", default_value_t = SEED)]
    seed: u32,
}

/// What a target is run with.
#[derive(Clone, Copy)]
struct Budget {
    seconds: u64,
    seed: u32,
    corpus: Corpus,
}

/// Where a target begins.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Corpus {
    /// With nothing, the same each time.
    Empty,
    /// With what earlier runs found, to which this one adds.
    Kept,
}

/// Runs one target or all, one after the other, and returns success if none failed.
pub(crate) fn fuzz(arguments: &FuzzArguments) -> Result<ExitCode> {
    let programs = build()?;
    let budget = Budget { seconds: arguments.seconds, seed: arguments.seed, corpus: Corpus::Kept };
    progress::note(&format!("{} s for each target, -seed={}", budget.seconds, budget.seed));
    let wanted = |target: &&Target| arguments.target.as_deref().is_none_or(|name| name == target.name);
    let mut failed = 0;
    for target in TARGETS.iter().filter(wanted) {
        let ran = progress::during(target.name, || run(&programs, target, budget));
        failed += u32::from(!report(target, ran));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Checks formatting and lints of the package, and runs each target for a few seconds.
///
/// # Errors
///
/// When there is something to mend, a target does not build, or one fails.
pub(crate) fn smoke() -> Result<()> {
    command::run(&mut command::cargo(&["fmt", "--manifest-path", MANIFEST, "--check"]))?;
    let programs = build()?;
    command::run(cargo("clippy")?.args(["--", "-D", "warnings"]))?;
    progress::note(&format!("a few seconds for each target, -seed={SEED}"));
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(target) = TARGETS.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let seconds = target.smoke_seconds;
                    let budget = Budget { seconds, seed: SEED, corpus: Corpus::Empty };
                    if !report(target, run(&programs, target, budget))
                        && let Ok(mut failed) = failed.lock()
                    {
                        failed.push(target.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if !failed.is_empty() {
        bail!("fuzz targets that failed: {}", failed.join(", "));
    }
    Ok(())
}

/// Builds all targets and returns where the programs are.
fn build() -> Result<PathBuf> {
    let started = Instant::now();
    command::run(cargo("build")?.arg("--bins"))?;
    progress::note(&format!("fuzz targets built in {}", progress::seconds(started.elapsed())));
    Ok(directory().join(host()?).join("release"))
}

fn directory() -> PathBuf {
    paths::target().join("fuzz")
}

/// A cargo for the package, with the flags. The target is named, so that they are not for build scripts too.
fn cargo(what: &str) -> Result<Command> {
    let mut cargo = command::cargo(&[what, "--quiet", "--release", "--locked", "--manifest-path", MANIFEST]);
    cargo.args(["--target", &host()?, "--target-dir"]).arg(directory());
    // This variable wins over all other places where flags could come from.
    cargo.env("CARGO_ENCODED_RUSTFLAGS", RUST_FLAGS.join("\x1f")).env("RUSTC_BOOTSTRAP", "1");
    Ok(cargo)
}

/// The machine that the compiler in use builds for by itself.
fn host() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut ask = Command::new(rustc);
    ask.current_dir(paths::root()).arg("-vV");
    let version = command::output(&mut ask, ASK_LIMIT)?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("`rustc -vV` names no host")
}

/// What came of a run that ended well.
#[derive(Debug, PartialEq, Eq)]
struct Ran {
    executions: u64,
    /// Edges of the program that were covered.
    covered: u64,
}

/// Prints the one line of a target. Whether it did not fail.
fn report(target: &Target, ran: Result<Ran>) -> bool {
    match ran {
        Ok(Ran { executions, covered }) => {
            let name = target.name;
            progress::note(&format!("  {name:<18} {executions:>10} executions, {covered:>5} edges"));
            true
        }
        Err(error) => {
            progress::error(&format!("{error:#}"));
            false
        }
    }
}

fn run(programs: &Path, target: &Target, budget: Budget) -> Result<Ran> {
    let Target { name, max_len, .. } = *target;
    let package = paths::root().join(PACKAGE);
    let artifacts = package.join("artifacts").join(name);
    std::fs::create_dir_all(&artifacts).with_context(|| format!("cannot make {}", artifacts.display()))?;
    let program = programs.join(name);
    let mut fuzzer = Command::new(&program);
    fuzzer.current_dir(&package);
    fuzzer.arg(format!("-max_total_time={}", budget.seconds)).arg(format!("-seed={}", budget.seed));
    fuzzer.arg(format!("-max_len={max_len}")).arg(format!("-timeout={INPUT_SECONDS}"));
    fuzzer
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()));
    fuzzer.args(["-len_control=20", "-print_final_stats=1"]);
    if budget.corpus == Corpus::Kept {
        let corpus = package.join("corpus").join(name);
        std::fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
        fuzzer.arg(corpus);
    }
    let limit = Duration::from_secs(budget.seconds) + GRACE;
    let output = process::capture(&mut fuzzer, limit).with_context(|| format!("fuzz target {name}"))?;
    judge(&output).with_context(|| format!("fuzz target {name}, at {}", program.display()))
}

/// Reads what libFuzzer said.
fn judge(output: &Output) -> Result<Ran> {
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let mut error = format!("failed ({}): {}", output.status, complaint(&said));
        if let Some(input) = said.lines().find_map(|line| line.split("Test unit written to ").nth(1)) {
            error.push_str(&format!("; to see it again, run the program with FUZZ_TRACE=1 on {input}"));
        }
        bail!(error);
    }
    let number = |before: &str| {
        let mut words = said.lines().rev().filter_map(|line| line.split(before).nth(1));
        words.next().and_then(|rest| rest.split_whitespace().next()?.parse().ok())
    };
    match (number("stat::number_of_executed_units:"), number(" cov: ")) {
        (Some(executions), Some(covered)) if executions > 0 && covered > 0 => Ok(Ran { executions, covered }),
        _ => bail!("ended without saying how much it ran"),
    }
}

/// The lines that say what is wrong: a panic's place and words, or the sanitizer's summary.
fn complaint(said: &str) -> String {
    let mut lines = said.lines().skip_while(|line| !line.contains("panicked at"));
    let panic: Vec<&str> =
        lines.by_ref().take_while(|line| !line.starts_with("stack backtrace")).take(4).collect();
    if panic.is_empty() {
        let summary = said.lines().rev().find(|line| line.starts_with("SUMMARY:"));
        return summary.or(said.lines().last()).unwrap_or("it said nothing").to_owned();
    }
    panic.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    fn output(status: i32, stderr: &str) -> Output {
        Output { status: ExitStatus::from_raw(status), stdout: Vec::new(), stderr: stderr.into() }
    }

    /// Fails when a target is added and not run here.
    #[test]
    fn every_target_is_listed() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PACKAGE).join("fuzz_targets");
        let mut files: Vec<String> = std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        let mut listed = TARGETS.map(|target| target.name.to_owned());
        files.sort();
        listed.sort();
        assert_eq!(files, listed);
    }

    #[test]
    fn a_run_that_ended_well() {
        let said = "#2\tINITED cov: 14 ft: 14\n#4096\tDONE   cov: 288 ft: 472 corp: 51/6390b exec/s: 4\n\
                    Done 4096 runs in 7 second(s)\nstat::number_of_executed_units: 4096\nstat::slowest: 0\n";
        assert_eq!(judge(&output(0, said)).unwrap(), Ran { executions: 4096, covered: 288 });
    }

    #[test]
    fn silence_is_no_success() {
        assert!(judge(&output(0, "")).is_err());
        assert!(judge(&output(0, "#1 cov: 0 ft: 0\nstat::number_of_executed_units: 9\n")).is_err());
    }

    #[test]
    fn a_crash_names_its_words_and_its_input() {
        let said = "#7 NEW cov: 9 ft: 9\nthread '<unnamed>' (1) panicked at src/session.rs:7:9:\n\
                    memory went back twice\nstack backtrace:\n   0: core\n\
                    artifact_prefix='x/'; Test unit written to /a/crash-12\n";
        let error = format!("{:#}", judge(&output(77 << 8, said)).unwrap_err());
        assert!(error.contains("src/session.rs:7:9: memory went back twice"), "{error}");
        assert!(error.ends_with("on /a/crash-12") && !error.contains("backtrace"), "{error}");
        let error = format!("{:#}", judge(&output(6, "SUMMARY: libFuzzer: timeout\nlast\n")).unwrap_err());
        assert!(error.contains("SUMMARY: libFuzzer: timeout"), "{error}");
    }
}
