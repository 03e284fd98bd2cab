//! The figures as a table.

use std::fmt::Write as _;

use super::figures::{Figure, Found};
use super::targets::Linux;

/// One line for each figure, with what Linux needs and whether the target is met. Of what an IOMMU adds to a disk's
/// request also the whole request, with one and without; of an operation in layers, each of them.
pub(super) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<32}{:>10}{:>8}{:>8}{:>8}{:>9}{:>8}  {:<22}{:>9}{:>9}\n\
         {:<32}{:>10}{:>8}{:>8}{:>8}{:>9}\n",
        "instructions per operation",
        "here",
        "Linux",
        "Linux",
        "Linux",
        "ratio",
        "target",
        "",
        "requests",
        "kicks",
        "",
        "",
        "direct",
        "strict",
        "lazy",
        "(strict)"
    );
    for figure in figures {
        // A string takes everything.
        let _ = writeln!(text, "{}", line(figure).trim_end());
    }
    text
}

fn line(figure: &Figure) -> String {
    let target = figure.target;
    let linux = |of: fn(&Linux) -> Option<u64>| {
        target.linux.as_ref().and_then(of).map(|linux| linux.to_string()).unwrap_or_default()
    };
    let linux = format!(
        "{:>8}{:>8}{:>8}",
        linux(|linux| linux.direct),
        linux(|linux| Some(linux.strict)),
        linux(|linux| linux.lazy)
    );
    let limit = target.limit.map(number).unwrap_or_default();
    let Some(found) = figure.found.number() else {
        let Found::NotMeasured(why) = &figure.found else { return String::new() };
        return format!("{:<32}{:>10}{linux}{:>9}{limit:>8}  not measured: {why}", target.name, "-", "");
    };
    let ratio = target.linux.filter(|_| found > 0.0);
    let ratio = ratio.map(|linux| format!("{:.1}x", linux.strict as f64 / found)).unwrap_or_default();
    let judged = match figure.misses() {
        None => String::new(),
        Some(misses) if misses.is_empty() => "met".to_owned(),
        Some(misses) => format!("NOT MET: {}", misses.join(", ")),
    };
    let (requests, kicks) =
        figure.asked.map(|(requests, kicks)| (number(requests), number(kicks))).unwrap_or_default();
    let whole = match &figure.found {
        Found::Added { with, without, .. } => format!("  = {} - {}", number(*with), number(*without)),
        Found::Layers { own, devices, .. } if own.len() > 1 || *devices > 0.0 => {
            let own: Vec<_> = own.iter().map(|(layer, mean)| format!("{layer} {}", number(*mean))).collect();
            format!("  = {}; devices in software take {} more", own.join(" + "), number(*devices))
        }
        _ => String::new(),
    };
    format!(
        "{:<32}{:>10}{linux}{ratio:>9}{limit:>8}  {judged:<22}{requests:>9}{kicks:>9}{whole}",
        target.name,
        number(found)
    )
}

/// Whole where it is, else with as many digits as it takes to tell small ones apart.
pub(super) fn number(number: f64) -> String {
    match number {
        whole if whole.fract() == 0.0 => format!("{whole}"),
        small if small.abs() < 10.0 => format!("{small:.4}"),
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
        assert_eq!(words("map_unmap_4k_strict "), "map_unmap_4k_strict 400 179 4835 4812 12.1x 480 met 2 2");
        assert_eq!(words("attach_detach"), "attach_detach 600.5 3733 6.2x 480 NOT MET: figure, kicks 2 3");
        let added = "blk_added_4k_qd1_pool 40 0 18442 18341 461.1x 60 NOT MET: requests 2 0 = 540 - 500";
        assert_eq!(words("blk_added_4k_qd1_pool"), added);
        let nested = "nested_map_unmap_depth2 1200 = driver 300 + nest 500 + driver 400; devices in software take 800 more";
        assert_eq!(words("nested_map_unmap_depth2"), nested);
        assert!(line("coherent_4k").ends_with("not measured: there is no such row yet"));
    }
}
