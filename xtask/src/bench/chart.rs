//! The figures as a drawing: bars for each operation, ours and Linux's, on a logarithmic scale; words for what has none.

use std::fmt::Write as _;

use super::figures::{Figure, Found};
use super::table::number;

const WIDTH: u32 = 890;
/// Where bars begin and the longest can end.
const LEFT: f64 = 260.0;
const RIGHT: f64 = 790.0;
const TOP: u32 = 64;
const ROW: u32 = 40;
/// The scale's ends, as powers of ten.
const DECADES: std::ops::RangeInclusive<i32> = 1..=6;

/// Text and lines by the reader's colours, bars in two that stand out on either.
const STYLE: &str = "\
text{font:13px system-ui,sans-serif;fill:#1f2328}.s{font-size:11px;fill:#59636e}\
.g{stroke:#d1d9e0}.o{fill:#0969da}.l{fill:#9a6700}.t{stroke:#1f2328;stroke-width:2}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.s{fill:#9198a1}.g{stroke:#3d444d}\
.o{fill:#4493f8}.l{fill:#d29922}.t{stroke:#f0f6fc}}";

/// Draws every figure.
pub(super) fn svg(figures: &[Figure], qemu: &str) -> String {
    let bottom = TOP + ROW * figures.len() as u32;
    let height = bottom + 30;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\">\n<title>Guest instructions per operation</title>\n\
         <style>{STYLE}</style>\n"
    );
    let mut draw = |part: std::fmt::Arguments<'_>| {
        // A string takes everything.
        let _ = writeln!(svg, "{part}");
    };
    draw(format_args!(
        "<text x=\"12\" y=\"24\">Guest instructions per operation (QEMU {qemu}, log scale)</text>"
    ));
    draw(format_args!("<rect class=\"o\" x=\"12\" y=\"36\" width=\"12\" height=\"10\"/>"));
    draw(format_args!("<text class=\"s\" x=\"30\" y=\"45\">this driver</text>"));
    draw(format_args!("<rect class=\"l\" x=\"112\" y=\"36\" width=\"12\" height=\"10\"/>"));
    draw(format_args!("<text class=\"s\" x=\"130\" y=\"45\">Linux 6.12, strict</text>"));
    draw(format_args!("<line class=\"t\" x1=\"250\" y1=\"34\" x2=\"250\" y2=\"48\"/>"));
    draw(format_args!("<text class=\"s\" x=\"258\" y=\"45\">target</text>"));
    for decade in DECADES {
        let (x, power) = (place(10_f64.powi(decade)), 10_u64.pow(decade.unsigned_abs()));
        draw(format_args!("<line class=\"g\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>"));
        draw(format_args!(
            "<text class=\"s\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{power}</text>",
            bottom + 18
        ));
    }
    for (index, figure) in figures.iter().enumerate() {
        let (target, y) = (figure.target, TOP + ROW * index as u32);
        draw(format_args!(
            "<text x=\"{:.0}\" y=\"{}\" text-anchor=\"end\">{}</text>",
            LEFT - 10.0,
            y + 24,
            target.name
        ));
        let (ours, words) = match &figure.found {
            Found::NotMeasured(why) => (None, Some(format!("not measured: {why}"))),
            // Another scale.
            Found::Ratio(ratio) => (None, Some(number(*ratio))),
            Found::Instructions { .. } | Found::Added { .. } | Found::Layers { .. } => {
                (figure.found.number(), None)
            }
        };
        if let Some(words) = words {
            let words = words.replace('&', "&amp;").replace('<', "&lt;");
            draw(format_args!("<text class=\"s\" x=\"{:.1}\" y=\"{}\">{words}</text>", LEFT + 6.0, y + 17));
        }
        let linux = target.linux.map(|linux| linux.strict as f64);
        for (class, y, value) in [("o", y + 7, ours), ("l", y + 20, linux)] {
            let Some(value) = value else { continue };
            let end = place(value);
            draw(format_args!(
                "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{y}\" width=\"{:.1}\" height=\"11\"/>",
                end - LEFT
            ));
            draw(format_args!(
                "<text class=\"s\" x=\"{:.1}\" y=\"{}\">{}</text>",
                end + 6.0,
                y + 10,
                number(value)
            ));
        }
        if let (Some(limit), Some(_)) = (target.limit, ours) {
            let x = place(limit);
            draw(format_args!(
                "<line class=\"t\" x1=\"{x:.1}\" y1=\"{}\" x2=\"{x:.1}\" y2=\"{}\"/>",
                y + 5,
                y + 20
            ));
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Where a number of instructions lies; what is off the scale lies at its end.
fn place(instructions: f64) -> f64 {
    let (first, last) = (f64::from(*DECADES.start()), f64::from(*DECADES.end()));
    let share = (instructions.max(1.0).log10().clamp(first, last) - first) / (last - first);
    LEFT + share * (RIGHT - LEFT)
}

#[cfg(test)]
mod tests {
    use super::super::figures::{figures, tests::runs};
    use super::*;

    #[test]
    fn the_scale_is_logarithmic_and_ends() {
        assert_eq!(place(10.0), LEFT);
        assert_eq!(place(0.0), LEFT);
        assert_eq!(place(1e9), RIGHT);
        let step = place(1_000.0) - place(100.0);
        assert!((place(10_000.0) - place(1_000.0) - step).abs() < 1e-9);
    }

    #[test]
    fn every_figure_has_its_bar_or_its_words() {
        let figures = figures(&runs());
        let drawing = svg(&figures, "10.0.2");
        assert_eq!(drawing.matches("<rect class=\"o\" x=\"260\"").count(), 6, "ours, of what was measured");
        for figure in &figures {
            assert!(drawing.contains(&format!(">{}<", figure.target.name)), "{}", figure.target.name);
        }
        let height: u32 =
            drawing.split(" height=\"").nth(1).and_then(|rest| rest.split('"').next()?.parse().ok()).unwrap();
        assert!(height > TOP + ROW * figures.len() as u32, "the drawing ends before its last row");
        assert!(drawing.contains(">not measured: too many<"));
        assert!(drawing.ends_with("</svg>\n"));
    }
}
