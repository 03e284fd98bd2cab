//! The table at the end: a row for each case, a column for each machine on a QEMU.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::column::Column;

/// How a cell ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Passed,
    Failed,
    Skipped,
}

/// What is known so far. Cells that were filtered out stay empty.
#[derive(Default)]
pub(crate) struct Table {
    marks: Mutex<BTreeMap<(usize, usize), Mark>>,
}

impl Table {
    /// Notes how the case in this row ended in this column.
    pub(crate) fn note(&self, row: usize, column: usize, mark: Mark) {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner).insert((row, column), mark);
    }

    /// The table in words, rows and columns without any mark left out; nothing if nothing ran.
    pub(crate) fn draw(&self, rows: &[&str], columns: &[Column]) -> String {
        let marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let used: Vec<usize> =
            (0..columns.len()).filter(|column| marks.keys().any(|(_, used)| used == column)).collect();
        let runs = |mark: Mark| marks.values().filter(|found| **found == mark).count();
        if runs(Mark::Passed) + runs(Mark::Failed) == 0 {
            return String::new();
        }
        let wide = rows.iter().map(|row| row.len()).max().unwrap_or(0);
        let mut text = String::new();
        for word in 0..3 {
            text.push_str(&format!("\n  {:wide$}", ""));
            for column in &used {
                text.push_str(&format!("  {:7}", columns[*column].words()[word]));
            }
        }
        for (row, name) in rows.iter().enumerate() {
            if !marks.keys().any(|(used, _)| *used == row) {
                continue;
            }
            text.push_str(&format!("\n  {name:wide$}"));
            for column in &used {
                let word = match marks.get(&(row, *column)) {
                    Some(Mark::Passed) => "PASS",
                    Some(Mark::Failed) => "FAIL",
                    Some(Mark::Skipped) => "skip",
                    None => "",
                };
                text.push_str(&format!("  {word:7}"));
            }
        }
        let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
        let mut text = lines.join("\n");
        for column in &used {
            if let Err(why) = &columns[*column].host {
                text.push_str(&format!("\n  SKIP {}: {why}", columns[*column]));
            }
        }
        let counts = [Mark::Passed, Mark::Failed, Mark::Skipped].map(runs);
        text.push_str(&format!("\n\n  {} passed, {} failed, {} skipped\n", counts[0], counts[1], counts[2]));
        text
    }
}
