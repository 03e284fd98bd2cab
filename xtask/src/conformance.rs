//! Whether `driver/docs/conformance.md` and the conformance tests have the same requirements and the same names.
//!
//! The names come from the test binary itself, so that a test which is not compiled, or not run, does not count.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::{command, paths};

/// The requirements are D-01 up to this.
const REQUIREMENTS: u32 = 41;

const TABLE: &str = "driver/docs/conformance.md";

/// Where the tests are in the binary.
const MODULE: &str = "conformance::";

/// How long building and listing the tests may take.
const LIMIT: Duration = Duration::from_secs(900);

/// Compares the table with the tests, which it builds if need be.
///
/// # Errors
///
/// With everything that is missing, and where.
pub(crate) fn check() -> Result<()> {
    let table =
        fs::read_to_string(paths::root().join(TABLE)).with_context(|| format!("cannot read {TABLE}"))?;
    let differences = differences(&table, &list(&[])?, &list(&["--ignored"])?);
    if !differences.is_empty() {
        bail!("{TABLE} and the conformance tests differ:\n  {}", differences.join("\n  "));
    }
    Ok(())
}

/// What the test binary lists.
fn list(which: &[&str]) -> Result<String> {
    // The whole workspace, as the host tests are built: else the features differ, and all is built again.
    let mut list = command::cargo(&["test", "--workspace", "--all-features", "--test", "driver"]);
    list.args(["--", "--list"]).args(which).arg(MODULE);
    command::output(&mut list, LIMIT)
}

/// Lines that say what is wrong, none when all is well.
fn differences(table: &str, listed: &str, ignored: &str) -> Vec<String> {
    let (rows, mut wrong) = rows(table);
    let (tests, ignored) = (tests(listed), tests(ignored));
    for number in 1..=REQUIREMENTS {
        match rows.iter().filter(|row| row.number == number).count() {
            0 => wrong.push(format!("D-{number:02} has no row in the table")),
            1 => {}
            count => wrong.push(format!("D-{number:02} has {count} rows in the table")),
        }
    }
    for Row { number, test } in &rows {
        if *number == 0 || *number > REQUIREMENTS {
            wrong.push(format!("D-{number:02} is in the table, and there is no such requirement"));
        }
        if !test.starts_with(&format!("d{number:02}_")) {
            wrong.push(format!(
                "D-{number:02} in the table names `{test}`, which does not begin with its number"
            ));
        }
        if !tests.contains(test) {
            wrong.push(format!("`{test}` is in the table, and not among the tests"));
        }
    }
    let named: BTreeSet<&str> = rows.iter().map(|row| row.test).collect();
    wrong.extend(tests.difference(&named).map(|test| format!("`{test}` is a test, and not in the table")));
    wrong.extend(ignored.iter().map(|test| format!("`{test}` is ignored, so that it shows nothing")));
    wrong
}

/// One row of the table.
struct Row<'a> {
    number: u32,
    test: &'a str,
}

/// The rows that begin with `| D-`, and what is wrong with those that cannot be read.
fn rows(table: &str) -> (Vec<Row<'_>>, Vec<String>) {
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for line in table.lines().filter(|line| line.starts_with("| D-")) {
        match row(line) {
            Some(row) => rows.push(row),
            None => wrong.push(format!("no row that can be read: {line}")),
        }
    }
    (rows, wrong)
}

/// The number in the first of five cells and the test's name in the last.
fn row(line: &str) -> Option<Row<'_>> {
    let cells: Vec<&str> =
        line.trim().strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect();
    let [id, _level, _requirement, _place, test] = cells[..] else { return None };
    let number = id.strip_prefix("D-")?.parse().ok()?;
    let test = test.strip_prefix('`')?.strip_suffix('`')?;
    Some(Row { number, test })
}

/// The names of the conformance tests in a binary's list, without their modules.
fn tests(listed: &str) -> BTreeSet<&str> {
    let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    names.filter(|name| name.starts_with(MODULE)).filter_map(|name| name.rsplit("::").next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test_name(number: u32) -> String {
        format!("d{number:02}_holds")
    }

    fn row(number: u32) -> String {
        format!("| D-{number:02} | MUST | words | `a.rs`: `f` | `{}` |\n", test_name(number))
    }

    fn line(number: u32) -> String {
        format!("{MODULE}map::{}: test\n", test_name(number))
    }

    fn all(each: impl Fn(u32) -> String) -> String {
        (1..=REQUIREMENTS).map(each).collect()
    }

    fn table() -> String {
        format!(
            "# Conformance\n\n| id | level | requirement | where | test |\n|---|---|---|---|---|\n{}",
            all(row)
        )
    }

    fn listed() -> String {
        // A test of another module may have such a name, and is none of these.
        format!("{}start::d06_of_others: test\n\n42 tests, 0 benchmarks\n", all(line))
    }

    #[test]
    fn equal_lists_do_not_differ() {
        assert_eq!(differences(&table(), &listed(), "0 tests, 0 benchmarks\n"), Vec::<String>::new());
    }

    #[test]
    fn a_row_without_a_test() {
        let listed = listed().replace(&line(7), "");
        let expected = ["`d07_holds` is in the table, and not among the tests"];
        assert_eq!(differences(&table(), &listed, ""), expected);
    }

    #[test]
    fn a_test_without_a_row() {
        let table = table().replace(&row(41), "");
        let expected = ["D-41 has no row in the table", "`d41_holds` is a test, and not in the table"];
        assert_eq!(differences(&table, &listed(), ""), expected);
        let more = format!("{}{MODULE}map::d41_and_more: test\n", listed());
        assert_eq!(
            differences(&self::table(), &more, ""),
            ["`d41_and_more` is a test, and not in the table"]
        );
        let strange = format!("{}{MODULE}map::helper: test\n", listed());
        assert_eq!(differences(&self::table(), &strange, ""), ["`helper` is a test, and not in the table"]);
    }

    #[test]
    fn rows_that_are_there_twice_or_are_none() {
        let twice = table() + &row(3);
        assert_eq!(differences(&twice, &listed(), ""), ["D-03 has 2 rows in the table"]);
        let beyond = table() + &row(42);
        let more = listed() + &line(42);
        let expected = ["D-42 is in the table, and there is no such requirement"];
        assert_eq!(differences(&beyond, &more, ""), expected);
        let broken = table() + "| D-05 | MUST | a cell too few | `d05_holds` |\n";
        let found = differences(&broken, &listed(), "");
        assert!(found.len() == 1 && found[0].starts_with("no row that can be read: | D-05"), "{found:?}");
    }

    #[test]
    fn a_row_with_the_test_of_another() {
        let table = table().replace("`d08_holds`", "`d09_holds`");
        let expected = [
            "D-08 in the table names `d09_holds`, which does not begin with its number",
            "`d08_holds` is a test, and not in the table",
        ];
        assert_eq!(differences(&table, &listed(), ""), expected);
    }

    #[test]
    fn a_test_that_is_ignored() {
        let expected = ["`d10_holds` is ignored, so that it shows nothing"];
        assert_eq!(differences(&table(), &listed(), &line(10)), expected);
    }

    #[test]
    fn an_empty_list_is_not_taken_for_agreement() {
        assert_eq!(differences("", "", "").len(), REQUIREMENTS as usize);
        assert_eq!(differences(&table(), "", "").len(), REQUIREMENTS as usize);
    }
}
