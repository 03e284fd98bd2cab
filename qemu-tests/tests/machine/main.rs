//! Boots the kernel's scenarios on each machine and asserts how each ends.
//!
//! `cargo xtask test` builds the kernels, finds QEMUs, and names both in the environment. Without them every case is
//! reported as ignored, with the reason; with `QEMU_TESTS_TIER=host` there is nothing here to run.
//!
//! A case is a row of a matrix, and a machine on a QEMU a column of it; each cell is a test,
//! `ARCHITECTURE/TRANSPORT/RELEASE/CASE`.

mod cases;
mod column;
mod counts;
mod expect;
mod growth;
mod table;

use std::env;
use std::fs;
use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use qemu_tests::boot::{Boot, DiskDevice};
use qemu_tests::process;

use crate::cases::{Case, On};
use crate::column::{Column, Host};
use crate::growth::Growth;
use crate::table::{Mark, Table};

/// `host` leaves all of these cases out.
const TIER: &str = "QEMU_TESTS_TIER";

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    if env::var_os(TIER).is_some_and(|tier| tier == "host") {
        return ExitCode::SUCCESS;
    }
    // By default there would be twice as many threads as processors.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some(processors));
    if let Err(error) = process::end_children_on_interrupt() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let columns = column::all();
    let rows: Vec<Row> = rows();
    // What differs between architectures has a row there in each, by the same name.
    let mut names: Vec<&str> = rows.iter().map(|row| row.name).collect();
    names.dedup();
    let table = Arc::new(Table::default());
    if !arguments.list {
        for column in &columns {
            if let Err(reason) = &column.host {
                eprintln!("NOT RUN: {column}: {reason}");
            }
        }
    }
    let mut trials = Vec::new();
    for row in &rows {
        let row_at = names.iter().position(|name| *name == row.name).unwrap_or(0);
        for (column_at, column) in columns.iter().enumerate() {
            if row.on.includes(column) {
                let table = Arc::clone(&table);
                let note = move |mark| table.note(row_at, column_at, mark);
                trials.push(trial(row, column, note));
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    print!("{}", table.draw(&names, &columns));
    conclusion.exit_code()
}

/// A row of the matrix.
#[derive(Clone)]
struct Row {
    name: &'static str,
    on: On,
    kind: Kind,
}

/// What is done in its cells.
#[derive(Clone)]
enum Kind {
    Case(Arc<Case>),
    Growth(Arc<Growth>),
}

fn rows() -> Vec<Row> {
    let case = |case: Case| Row { name: case.name, on: case.on, kind: Kind::Case(Arc::new(case)) };
    let growth =
        |growth: Growth| Row { name: growth.name, on: On::Home, kind: Kind::Growth(Arc::new(growth)) };
    cases::all().into_iter().map(case).chain(growth::all().into_iter().map(growth)).collect()
}

fn trial(row: &Row, column: &Column, note: impl Fn(Mark) + Send + 'static) -> Trial {
    let (kind, column) = (row.kind.clone(), column.clone());
    Trial::ignorable_test(format!("{column}/{}", row.name), move || {
        let host = match &column.host {
            Ok(host) => host,
            Err(reason) => {
                note(Mark::Skipped(None));
                return Ok(Completion::ignored_with(reason));
            }
        };
        if let Kind::Case(case) = &kind
            && host.qemu.version < case.since
        {
            let reason = format!("QEMU before {} lacks the option", case.since);
            note(Mark::Skipped(Some(reason.clone())));
            return Ok(Completion::ignored_with(reason));
        }
        // Until it is known to have passed, even if it panics.
        note(Mark::Failed);
        match kind {
            Kind::Case(case) => run(&case, &column, host)?,
            Kind::Growth(growth) => growth.run(&column, host)?,
        }
        note(Mark::Passed);
        Ok(Completion::Completed)
    })
}

fn run(case: &Case, column: &Column, host: &Host) -> Result<(), Failed> {
    let directory = column.directory(case.name);
    let mut machine = column.machine(host, case.scenario);
    machine.iommu = case.iommu.unwrap_or(machine.iommu);
    machine.place = case.place;
    machine.reserved = case.reserved.to_vec();
    machine.cpus = case.cpus;
    machine.extra = case.extra.split_whitespace().map(Into::into).collect();
    let mut boot = Boot::new(machine, case.scenario, &directory);
    boot.iommu_server = host.iommu_server.clone();
    boot.words = case.words.to_owned();
    boot.disk = case.disk;
    if case.disk == DiskDevice::Absent {
        boot.nvme = DiskDevice::Absent;
    }
    boot.peer = case.peer;
    boot.deadline = Some(case.deadline);
    let outcome = boot.run(&host.qemu, &mut |_| {}).map_err(|error| format!("{error:#}"))?;
    let log = directory.join("serial.log");
    // The verdict stands without the log.
    let _ = fs::write(&log, outcome.lines.join("\n") + "\n");
    case.expect.check(&outcome, &directory.join("trace.log")).map_err(|complaint| {
        let last = outcome.lines.len().saturating_sub(25);
        let tail = outcome.lines[last..].join("\n    ");
        let stderr = outcome.stderr.trim();
        format!(
            "{complaint}\n  verdict: {}\n  the last lines of {}:\n    {tail}\n  QEMU's own: {stderr}",
            if outcome.passed() { "passed".to_owned() } else { outcome.summary() },
            log.display(),
        )
        .into()
    })
}
