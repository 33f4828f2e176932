//! The map of the disk as a picture: one file of SVG without anything outside of it.

use std::fmt::Write;

use super::show;
use super::surface::{Worst, worst_of_cells};
use crate::runtime::surface::{SurfaceCell, SurfaceReport};

/// Distance from a cell to the next, and how much of it is the cell, in user units.
const STEP: u64 = 12;
const CELL: u64 = 11;
/// Space at the left, for the sector numbers of the rows, and at the other sides.
const LEFT: u64 = 96;
const MARGIN: u64 = 16;
/// Height of title and legend.
const HEAD: u64 = 64;
/// The legend and the title need so much.
const WIDTH_MIN: u64 = 824;

/// Colours of the light and the dark scheme; lightness differs too, for those who do not tell the hues apart. No CSS
/// variables: most viewers beside browsers do not know them.
const STYLE: &str = "\
text { fill: #1b1f24; font: 12px system-ui, sans-serif; }
.title { font-size: 15px; font-weight: 600; }
.row { text-anchor: end; }
.back { fill: #ffffff; }
.fine { fill: #d3e8d6; }
.unscanned { fill: #e4e8ec; }
.slow { fill: #8a5bc7; }
.remapped { fill: #2f6fce; }
.pending { fill: #d99a00; }
.lost { fill: #b3001b; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e9ec; }
  .back { fill: #14181d; }
  .fine { fill: #24402b; }
  .unscanned { fill: #2a3138; }
  .slow { fill: #b48bf0; }
  .remapped { fill: #5b9bff; }
  .pending { fill: #ffc53d; }
  .lost { fill: #ff5c6c; }
}";

fn class(worst: Worst) -> &'static str {
    match worst {
        Worst::Fine => "fine",
        Worst::NotScanned => "unscanned",
        Worst::Slow => "slow",
        Worst::Remapped => "remapped",
        Worst::Pending => "pending",
        Worst::Lost => "lost",
    }
}

/// Text that is no markup (XML 1.0 §2.4); what XML cannot hold is replaced.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// The picture, with so many cells in a row.
pub(super) fn render(surface: &SurfaceReport, name: &str, width: u64) -> String {
    let cells = worst_of_cells(surface);
    let rows = (cells.len() as u64).div_ceil(width);
    let right = (LEFT + width.min(cells.len() as u64) * STEP + MARGIN).max(WIDTH_MIN);
    let bottom = HEAD + rows * STEP + MARGIN;
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| writeln!(out, "{text}").expect("writing to a String cannot fail");
    let (name, size) = (escaped(name), show::bytes(surface.sectors_per_cell.saturating_mul(512)));
    line(format_args!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right} {bottom}" width="{right}" height="{bottom}" role="img">"#
    ));
    line(format_args!("<title>Surface of {name}</title>"));
    line(format_args!("<style>\n{STYLE}\n</style>"));
    line(format_args!(r#"<rect class="back" width="{right}" height="{bottom}"/>"#));
    line(format_args!(
        r#"<text class="title" x="{MARGIN}" y="26">{name}: {} sectors, {} a cell ({size})</text>"#,
        surface.capacity_sectors, surface.sectors_per_cell
    ));
    let mut x = MARGIN;
    for worst in Worst::ALL {
        line(format_args!(
            r#"<rect class="{}" x="{x}" y="38" width="{CELL}" height="{CELL}"/><text x="{}" y="48">{}</text>"#,
            class(worst),
            x + STEP + 4,
            worst.name()
        ));
        x += 132;
    }
    let mut marked = surface.marked.iter().peekable();
    for (number, worst) in (0_u64..).zip(&cells) {
        let (column, y) = (number % width, HEAD + number / width * STEP);
        let first = number * surface.sectors_per_cell;
        if column == 0 {
            line(format_args!(r#"<text class="row" x="{}" y="{}">{first}</text>"#, LEFT - 8, y + CELL - 1));
        }
        let last = (first + surface.sectors_per_cell).min(surface.capacity_sectors).saturating_sub(1);
        let known = marked.next_if(|cell| cell.cell == number).map_or_else(|| worst.name().to_owned(), counts);
        line(format_args!(
            r#"<rect class="{}" x="{}" y="{y}" width="{CELL}" height="{CELL}"><title>{first}-{last}: {known}</title></rect>"#,
            class(*worst),
            LEFT + column * STEP,
        ));
    }
    line(format_args!("</svg>"));
    out
}

fn counts(cell: &SurfaceCell) -> String {
    let SurfaceCell { lost, pending, remapped, slow, first, last, .. } = cell;
    let blocks = format!("{pending} pending, {remapped} remapped and {slow} slow blocks");
    format!("{lost} lost sectors, {blocks}, from {first} to {last}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::surface::tests::scratched;

    #[test]
    fn the_picture_has_a_cell_with_a_title_for_each_part_of_the_disk() {
        let picture = render(&scratched(), "/srv/a<b>&c.img", 16);
        assert_eq!(picture.matches("<title>").count(), 65);
        assert!(picture.contains("<title>Surface of /srv/a&lt;b&gt;&amp;c.img</title>"), "{picture}");
        let of_class = |class: &str| picture.matches(&format!("<rect class=\"{class}\"")).count();
        // One more of each in the legend.
        let classes = ["fine", "unscanned", "slow", "remapped", "pending", "lost"];
        assert_eq!(classes.map(of_class), [54, 7, 2, 3, 2, 2]);
        let numbers = "4 lost sectors, 0 pending, 1 remapped and 0 slow blocks, from 11776 to 11783";
        assert!(picture.contains(&format!("<title>11264-12287: {numbers}</title>")), "{picture}");
        assert!(picture.contains("prefers-color-scheme: dark"));
    }

    /// Nothing is loaded from anywhere, and what is opened is closed.
    #[test]
    fn the_picture_is_complete_in_itself() {
        let picture = render(&scratched(), "disk", 16);
        for outside in ["href", "url(", "@import", "<script", "src="] {
            assert!(!picture.contains(outside), "{outside}");
        }
        assert_eq!(picture.matches("http").count(), 1, "the name of the SVG namespace");
        for element in ["svg", "title", "style", "text"] {
            let (opened, closed) = (format!("<{element}"), format!("</{element}>"));
            assert_eq!(picture.matches(&opened).count(), picture.matches(&closed).count(), "{element}");
        }
    }
}
