//! The figures as a table.

use std::fmt::Write as _;

use super::figures::{Figure, Found};

/// One line for each figure, with what Linux needs and whether the target is met.
pub(super) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<32}{:>10}{:>10}{:>8}{:>9}  {:<22}{:>9}{:>9}\n",
        "instructions per operation", "here", "Linux", "ratio", "target", "", "requests", "kicks"
    );
    for figure in figures {
        // A string takes everything.
        let _ = writeln!(text, "{}", line(figure).trim_end());
    }
    text
}

fn line(figure: &Figure) -> String {
    let target = figure.target;
    let linux = target.linux.map(|linux| linux.to_string()).unwrap_or_default();
    let limit = target.limit.map(number).unwrap_or_default();
    let Some(found) = figure.found.number() else {
        let Found::NotMeasured(why) = &figure.found else { return String::new() };
        return format!("{:<32}{:>10}{linux:>10}{:>8}{limit:>9}  not measured: {why}", target.name, "-", "");
    };
    let ratio = target.linux.map(|linux| format!("{:.1}x", linux as f64 / found)).unwrap_or_default();
    let judged = match figure.misses() {
        None => String::new(),
        Some(misses) if misses.is_empty() => "met".to_owned(),
        Some(misses) => format!("NOT MET: {}", misses.join(", ")),
    };
    let (requests, kicks) =
        figure.asked.map(|(requests, kicks)| (number(requests), number(kicks))).unwrap_or_default();
    format!(
        "{:<32}{:>10}{linux:>10}{ratio:>8}{limit:>9}  {judged:<22}{requests:>9}{kicks:>9}",
        target.name,
        number(found)
    )
}

/// Whole where it is, else with as many digits as it takes to tell small ones apart.
pub(super) fn number(number: f64) -> String {
    match number {
        whole if whole.fract() == 0.0 => format!("{whole}"),
        small if small < 1.0 => format!("{small:.4}"),
        large => format!("{large:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::{figures, tests::runs};
    use super::*;

    #[test]
    fn each_figure_has_a_line_with_its_judgement() {
        let table = table(&figures(&runs()));
        let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        let words = |name| line(name).split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
        assert_eq!(words("map_unmap_4k_strict "), "map_unmap_4k_strict 400 4835 12.1x 480 met 2 2");
        assert_eq!(words("attach_detach"), "attach_detach 600.5 3733 6.2x 480 NOT MET: figure, kicks 2 3");
        assert!(line("coherent_4k").ends_with("not measured: there is no such row yet"));
    }
}
