//! Shell scripts that play QEMU: what the harness makes of machines that lie, refuse or hang.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qemu_tests::boot::{Boot, DEFAULT_SEED, Outcome};
use qemu_tests::disk;
use qemu_tests::machine::{Arch, Iommu, Machine};
use qemu_tests::qemu::{Qemu, Version};

const CLAIMS: &str = "\
@@ start 1 x86_64
@@ plan 1
@@ check disk.read ok 1 MiB
@@ value attach 1 requests
@@ value detach 0 requests
@@ value map 2 requests
@@ value unmap 0 requests
@@ value kicks 2 kicks
@@ end PASS
";

const TRACE: &str = "\
virtio_queue_notify vdev 0x1 n 0 vq 0xa
virtqueue_pop vq 0xa elem 0x2 in_num 1 out_num 1
virtio_iommu_attach domain=1 endpoint=16
virtio_iommu_switch_address_space Device 00:02.0 switching address space (iommu enabled=1)
virtio_queue_notify vdev 0x1 n 0 vq 0xa
virtqueue_pop vq 0xa elem 0x2 in_num 1 out_num 1
virtio_iommu_map domain=1 virt_start=0x1000 virt_end=0x1fff phys_start=0x1000 flags=3
virtqueue_pop vq 0xa elem 0x2 in_num 1 out_num 1
virtio_iommu_map domain=1 virt_start=0x2000 virt_end=0x2fff phys_start=0x2000 flags=3
";

fn directory(name: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake").join(name);
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// A QEMU that runs `script` in the directory of the boot; its `-D` argument has been made `$trace`.
fn qemu(directory: &Path, script: &str) -> Qemu {
    let path = directory.join("qemu");
    let find =
        "while [ $# -gt 0 ]; do [ \"$1\" = -D ] && trace=$2; [ \"$1\" = -append ] && line=$2; shift; done";
    let text = format!("#!/bin/sh\ncd '{}'\n{find}\n{script}\n", directory.display());
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    Qemu { path, version: Version { major: 10, minor: 0, micro: 0 } }
}

/// Boots a scenario that has one disk, and writes to it.
fn boot(directory: &Path) -> Boot {
    let mut boot = Boot::new(Machine::new(Arch::X86_64, "kernel".into()), "block", directory);
    boot.deadline = Some(Duration::from_secs(20));
    boot
}

/// A guest that prints `claims`, in a QEMU that saw `trace` and leaves `image` behind, if any.
fn run(name: &str, claims: &str, trace: &str, image: Option<Vec<u8>>) -> Outcome {
    let directory = directory(name);
    fs::write(directory.join("claims"), claims).unwrap();
    fs::write(directory.join("seen"), trace).unwrap();
    let script = match image {
        Some(image) => {
            fs::write(directory.join("after.img"), image).unwrap();
            "cat claims; cp seen \"$trace\"; cp after.img disk.img; exit 33"
        }
        None => "cat claims; cp seen \"$trace\"; exit 33",
    };
    let qemu = qemu(&directory, script);
    boot(&directory).run(&qemu, &mut |_| {}).unwrap()
}

fn written() -> Option<Vec<u8>> {
    Some(disk::expected(DEFAULT_SEED))
}

#[test]
fn a_guest_whose_claims_are_true_passes() {
    let outcome = run("true", CLAIMS, TRACE, written());
    assert_eq!(outcome.summary(), "");
    assert!(outcome.passed());
    assert_eq!(outcome.seen.unwrap().pops, 3);
}

#[test]
fn a_claim_that_qemu_did_not_see_fails() {
    let outcome = run("claim", &CLAIMS.replace("map 2", "map 3"), TRACE, written());
    assert_eq!(outcome.summary(), "the guest claims `map` 3, but QEMU saw 2");
    assert!(outcome.verdict.passed() && !outcome.passed());
}

#[test]
fn a_guest_that_claims_nothing_or_a_qemu_without_a_trace_fails() {
    let silent: String =
        CLAIMS.lines().filter(|line| !line.contains("value")).map(|line| format!("{line}\n")).collect();
    assert!(run("no-claim", &silent, TRACE, written()).summary().contains("`kicks`"));

    let directory = directory("no-trace");
    // An earlier run's trace must not speak for this one.
    fs::write(directory.join("trace.log"), TRACE).unwrap();
    fs::write(directory.join("claims"), CLAIMS).unwrap();
    let qemu = qemu(&directory, "cat claims; exit 33");
    let outcome = boot(&directory).run(&qemu, &mut |_| {}).unwrap();
    assert!(outcome.summary().contains("cannot read QEMU's trace"), "{}", outcome.summary());
}

#[test]
fn a_disk_that_was_not_written_fails() {
    let outcome = run("unwritten", CLAIMS, TRACE, None);
    assert!(outcome.summary().contains("offset 0x100000"), "{}", outcome.summary());
}

#[test]
fn without_an_iommu_no_numbers_are_needed() {
    let directory = directory("no-iommu");
    fs::write(directory.join("claims"), "@@ start 1 x86_64\n@@ plan 0\n@@ end PASS\n").unwrap();
    let qemu = qemu(&directory, "cat claims; exit 33");
    let mut boot = boot(&directory);
    boot.machine.iommu = Iommu::Off;
    boot.scenario = "other".into();
    let outcome = boot.run(&qemu, &mut |_| {}).unwrap();
    assert!(outcome.passed() && outcome.seen.is_none(), "{}", outcome.summary());
}

/// A guest with an IOMMU that a script serves, which says this after QEMU.
fn served(name: &str, says: &str) -> Outcome {
    let directory = directory(name);
    let claims = CLAIMS.replace("@@ end", "@@ value requests 5 requests\n@@ value faults 0 records\n@@ end");
    fs::write(directory.join("claims"), claims).unwrap();
    let qemu = qemu(&directory, "cat claims; exit 33");
    let server = directory.join("server");
    fs::write(&server, format!("#!/bin/sh\necho listening\n{says}\n")).unwrap();
    fs::set_permissions(&server, fs::Permissions::from_mode(0o755)).unwrap();
    let mut boot = boot(&directory);
    boot.scenario = "contexts".into();
    boot.machine.iommu = Iommu::VhostUser;
    boot.iommu_server = Some(server);
    boot.run(&qemu, &mut |_| {}).unwrap()
}

#[test]
fn a_served_iommu_has_its_server_for_a_witness() {
    let numbers = "printf 'attach 1\\nmap 2\\nunmap 0\\nrequests 5\\nfaults 0\\nviolations 0\\n'";
    let outcome = served("served", numbers);
    assert!(outcome.passed() && outcome.seen.is_none(), "{}", outcome.summary());
    let outcome = served("served-other", &numbers.replace("map 2", "map 3"));
    assert_eq!(outcome.summary(), "the guest claims `map` 2, but the IOMMU's server saw 3");
    let outcome = served("served-badly", "echo 'the rings cannot be' >&2; exit 1");
    assert_eq!(outcome.summary(), "the IOMMU's server ended with status 1: the rings cannot be");
}

#[test]
fn the_kernel_is_told_scenario_seed_and_digest() {
    let directory = directory("cmdline");
    let qemu = qemu(&directory, "echo \"$line\"; exit 33");
    let mut boot = boot(&directory);
    boot.words = "viot=cut".into();
    let outcome = boot.run(&qemu, &mut |_| {}).unwrap();
    let words: Vec<&str> = outcome.lines[0].split(' ').collect();
    assert_eq!(words[0], "scenario=block");
    assert_eq!(words[1], format!("seed={DEFAULT_SEED:#x}"));
    assert_eq!(words[2].strip_prefix("disk.sha256=").unwrap().len(), 64);
    assert!(words[3].strip_prefix("net.port=").unwrap().parse::<u16>().unwrap() > 0);
    assert_eq!(words[4].strip_prefix("net.sha256=").unwrap().len(), 64);
    assert_eq!(words[5..], ["viot=cut"]);
}

#[test]
fn network_and_console_need_more_than_a_claim() {
    let more = "@@ value net.rounds 1 rounds\n@@ value console.domain 9 domain\n@@ end";
    let outcome = run("network", &CLAIMS.replace("@@ end", more), TRACE, written());
    assert_eq!(
        outcome.problems(),
        [
            "the guest claims net.rounds 1, but the server completed 0",
            "the console printed \"\" instead of \"seed 0x5eed by way of domain 0x9\\n\""
        ]
    );
}

#[test]
fn a_soak_has_its_time_on_top_of_the_deadline() {
    let directory = directory("soak");
    let qemu = qemu(&directory, "echo hello; while :; do sleep 1; done");
    let mut boot = boot(&directory);
    (boot.scenario, boot.words) = ("soak".into(), "soak.seconds=9 soak.seconds=1".into());
    boot.deadline = Some(Duration::from_millis(300));
    let outcome = boot.run(&qemu, &mut |_| {}).unwrap();
    assert!(outcome.summary().contains("deadline of 1.3 s"), "{}", outcome.summary());
}

#[test]
fn a_qemu_that_refuses_speaks_for_itself() {
    let directory = directory("refuses");
    let qemu = qemu(&directory, "echo 'qemu: -device nonsense: not a device' >&2; exit 1");
    let outcome = boot(&directory).run(&qemu, &mut |_| {}).unwrap();
    assert_eq!(outcome.summary(), "QEMU did not start the guest: qemu: -device nonsense: not a device");
}

#[test]
fn a_qemu_that_hangs_is_killed_at_the_deadline() {
    let directory = directory("hangs");
    let qemu = qemu(&directory, "trap '' TERM; echo hello; while :; do sleep 1; done");
    let mut boot = boot(&directory);
    boot.deadline = Some(Duration::from_millis(300));
    let outcome = boot.run(&qemu, &mut |_| {}).unwrap();
    assert!(outcome.summary().contains("deadline of 0.3 s"), "{}", outcome.summary());
    assert!(outcome.wall < Duration::from_secs(5));
}

#[test]
fn a_qemu_that_is_not_there_is_named() {
    let directory = directory("absent");
    let qemu = Qemu { path: "/nonexistent/qemu".into(), version: Version { major: 10, minor: 0, micro: 0 } };
    let error = boot(&directory).run(&qemu, &mut |_| {}).unwrap_err();
    assert!(format!("{error:#}").contains("/nonexistent/qemu"));
}
