//! Bars with intervals, a panel a case, each to its own scale.

use std::fmt::Write;

use crate::stats::Estimate;

const WIDTH: usize = 860;
const LABELS: usize = 260;
const BARS: usize = 440;
const ROW: usize = 20;
const TITLE: usize = 30;
const COLOURS: [&str; 4] = ["#2b6cb0", "#c05621", "#805ad5", "#718096"];

/// A case: its name, and who reached what.
pub(crate) type Panel<'a> = (&'a str, Vec<(&'a str, Estimate)>);

/// A picture of them.
pub(crate) fn chart(title: &str, panels: &[Panel]) -> String {
    let rows: usize = panels.iter().map(|(_, bars)| bars.len()).sum();
    let height = 2 * TITLE + panels.len() * TITLE + rows * ROW;
    let mut svg = String::new();
    let mut line = |text: std::fmt::Arguments| writeln!(svg, "{text}").expect("a string takes everything");
    line(format_args!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">"#
    ));
    line(format_args!(r#"<rect width="100%" height="100%" fill="white"/>"#));
    line(format_args!(r#"<text x="10" y="20" font-size="15" font-weight="bold">{}</text>"#, escaped(title)));
    let mut y = TITLE;
    for (name, bars) in panels {
        y += TITLE;
        line(format_args!(r#"<text x="10" y="{}" font-weight="bold">{}</text>"#, y - 6, escaped(name)));
        let most = bars.iter().map(|(_, bar)| bar.high).fold(f64::MIN_POSITIVE, f64::max);
        let x = |value: f64| LABELS as f64 + value / most * BARS as f64;
        for (at, (label, bar)) in bars.iter().enumerate() {
            let (middle, colour) = (y + ROW / 2, COLOURS[at % COLOURS.len()]);
            line(format_args!(r#"<text x="20" y="{}">{}</text>"#, middle + 4, escaped(label)));
            let width = x(bar.median) - LABELS as f64;
            let top = y + 3;
            line(format_args!(r#"<rect x="{LABELS}" y="{top}" width="{width:.1}" height="14" fill="{colour}"/>"#));
            let (low, high) = (x(bar.low), x(bar.high));
            line(format_args!(
                r#"<path d="M{low:.1} {middle}H{high:.1}M{low:.1} {}v8M{high:.1} {}v8" stroke="black" fill="none"/>"#,
                middle - 4,
                middle - 4
            ));
            line(format_args!(r#"<text x="{:.1}" y="{}">{}</text>"#, high + 6.0, middle + 4, figure(bar.median)));
            y += ROW;
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// With three digits, or all that are before the point.
pub(crate) fn figure(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0..100.0 => 1,
        1.0..10.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
