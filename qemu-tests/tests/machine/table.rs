//! The table at the end: a row for each case, a column for each machine on a QEMU.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::column::Column;

/// How a cell ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Passed,
    Failed,
    /// Not run, and why, unless the whole column is not.
    Skipped(Option<String>),
}

/// Marks by row and column.
type Marks = BTreeMap<(usize, usize), Mark>;

/// What is known so far. Cells that were filtered out stay empty.
#[derive(Default)]
pub(crate) struct Table {
    marks: Mutex<Marks>,
}

impl Table {
    /// Notes how the case in this row ended in this column.
    pub(crate) fn note(&self, row: usize, column: usize, mark: Mark) {
        self.marks().insert((row, column), mark);
    }

    /// The table in words, rows and columns without any mark left out; nothing if nothing ran.
    pub(crate) fn draw(&self, rows: &[&str], columns: &[Column]) -> String {
        let marks = self.marks();
        if marks.values().all(|mark| matches!(mark, Mark::Skipped(_))) {
            return String::new();
        }
        let is_used = |column: &usize| marks.keys().any(|(_, used)| used == column);
        let used: Vec<usize> = (0..columns.len()).filter(is_used).collect();
        let mut lines = head(&used, rows, columns);
        lines.extend(body(&marks, &used, rows));
        lines.extend(reasons(&marks, &used, rows, columns));
        let count = |is: fn(&Mark) -> bool| marks.values().filter(|mark| is(mark)).count();
        let passed = count(|mark| *mark == Mark::Passed);
        let failed = count(|mark| *mark == Mark::Failed);
        let skipped = count(|mark| matches!(mark, Mark::Skipped(_)));
        lines.push(format!("\n  {passed} passed, {failed} failed, {skipped} skipped\n"));
        lines.iter().map(|line| format!("{}\n", line.trim_end_matches(' '))).collect()
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A line of cells after the name of a row.
fn line<'w>(name: &str, rows: &[&str], words: impl Iterator<Item = &'w str>) -> String {
    let wide = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let cells: String = words.map(|word| format!("  {word:7}")).collect();
    format!("  {name:wide$}{cells}")
}

/// The three lines with the columns' names.
fn head(used: &[usize], rows: &[&str], columns: &[Column]) -> Vec<String> {
    let lines = (0..3).map(|word| line("", rows, used.iter().map(|column| columns[*column].words()[word])));
    lines.collect()
}

fn body(marks: &Marks, used: &[usize], rows: &[&str]) -> Vec<String> {
    let word = |row, column: usize| match marks.get(&(row, column)) {
        Some(Mark::Passed) => "PASS",
        Some(Mark::Failed) => "FAIL",
        Some(Mark::Skipped(_)) => "skip",
        None => "",
    };
    let has_marks = |row: &usize| marks.keys().any(|(used, _)| used == row);
    let lines = (0..rows.len()).filter(has_marks);
    lines.map(|row| line(rows[row], rows, used.iter().map(|column| word(row, *column)))).collect()
}

/// Why columns, and cells of other columns, were skipped.
fn reasons(marks: &Marks, used: &[usize], rows: &[&str], columns: &[Column]) -> Vec<String> {
    let whole = used.iter().filter_map(|column| {
        let why = columns[*column].host.as_ref().err()?;
        Some(format!("  SKIP {}: {why}", columns[*column]))
    });
    let cells = marks.iter().filter_map(|((row, column), mark)| match mark {
        Mark::Skipped(Some(why)) => Some(format!("  SKIP {}/{}: {why}", columns[*column], rows[*row])),
        _ => None,
    });
    whole.chain(cells).collect()
}
