//! `surface`: a map of the disk in letters, and the troubled stretches of it with their numbers.

use std::io::{IsTerminal, Write};

use super::args::ControlArgs;
use super::report_args::SurfaceArgs;
use super::run::{CliError, Server};
use super::table::Align::{Left, Right};
use super::table::Table;
use super::{show, surface_svg};
use crate::runtime::report::StatusReport;
use crate::runtime::surface::{CELLS_MAX, SurfaceCell, SurfaceReport};

/// Rows of a map, where nobody said how many cells.
const ROWS: u64 = 16;
/// Stretches whose numbers are listed.
const STRETCHES_MAX: usize = 12;

/// What is worst in a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Worst {
    Fine,
    NotScanned,
    Slow,
    Remapped,
    Pending,
    Lost,
}

impl Worst {
    pub(super) const ALL: [Worst; 6] =
        [Worst::Fine, Worst::NotScanned, Worst::Slow, Worst::Remapped, Worst::Pending, Worst::Lost];

    pub(super) fn of(cell: &SurfaceCell) -> Worst {
        match cell {
            SurfaceCell { lost: 1.., .. } => Worst::Lost,
            SurfaceCell { pending: 1.., .. } => Worst::Pending,
            SurfaceCell { remapped: 1.., .. } => Worst::Remapped,
            SurfaceCell { slow: 1.., .. } => Worst::Slow,
            _ => Worst::Fine,
        }
    }

    pub(super) fn letter(self) -> char {
        match self {
            Worst::Fine => '.',
            Worst::NotScanned => '-',
            Worst::Slow => 's',
            Worst::Remapped => 'r',
            Worst::Pending => 'P',
            Worst::Lost => 'L',
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Worst::Fine => "nothing known",
            Worst::NotScanned => "not scanned yet",
            Worst::Slow => "slow",
            Worst::Remapped => "remapped",
            Worst::Pending => "pending",
            Worst::Lost => "lost",
        }
    }

    /// Select Graphic Rendition (ECMA-48 §8.3.117).
    fn color(self) -> &'static str {
        match self {
            Worst::Fine => "2",
            Worst::NotScanned => "90",
            Worst::Slow => "36",
            Worst::Remapped => "34",
            Worst::Pending => "33",
            Worst::Lost => "1;31",
        }
    }
}

/// Neighbouring cells with trouble: a scratch is one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    worst: Worst,
    cells: u64,
    first: u64,
    last: u64,
    pending: u64,
    remapped: u64,
    lost: u64,
    slow: u64,
}

pub(super) fn run(args: &SurfaceArgs, out: &mut dyn Write) -> Result<(), CliError> {
    let server = Server::of(&args.control)?;
    let cells = args.cells.unwrap_or(args.width * ROWS).min(CELLS_MAX);
    let surface: SurfaceReport = server.get_with("/v1/surface", &[("cells", cells.to_string())])?;
    if let Some(file) = &args.svg {
        let status: StatusReport = server.get("/v1/status")?;
        let name = status.devices.first().map_or(status.volume.as_str(), |primary| primary.path.as_str());
        let picture = surface_svg::render(&surface, name, args.width);
        std::fs::write(file, picture).map_err(|error| CliError::File { path: file.clone(), error })?;
        return Ok(writeln!(out, "{}: {} cells, {} marked", file.display(), surface.cells, surface.marked.len())?);
    }
    server.print(&surface, |surface| text(surface, args.width, in_color(args)), out)
}

fn in_color(args: &SurfaceArgs) -> bool {
    let SurfaceArgs { control: ControlArgs { json, .. }, no_color, .. } = args;
    // <https://no-color.org>
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !json && !no_color && !unwanted && std::io::stdout().is_terminal()
}

/// The worst of each cell, in order.
pub(super) fn worst_of_cells(surface: &SurfaceReport) -> Vec<Worst> {
    let cells = usize::try_from(surface.cells.min(CELLS_MAX)).expect("at most 65,536");
    let mut worst = vec![Worst::Fine; cells];
    for (first, count) in &surface.not_scanned {
        let cells = worst.iter_mut().skip(usize::try_from(*first).unwrap_or(usize::MAX));
        cells.take(usize::try_from(*count).unwrap_or(usize::MAX)).for_each(|cell| *cell = Worst::NotScanned);
    }
    for cell in &surface.marked {
        if let Some(place) = usize::try_from(cell.cell).ok().and_then(|at| worst.get_mut(at)) {
            *place = Worst::of(cell);
        }
    }
    worst
}

fn text(surface: &SurfaceReport, width: u64, color: bool) -> String {
    let mut out = String::new();
    let size = show::bytes(surface.sectors_per_cell.saturating_mul(512));
    out.push_str(&format!("{} sectors, {} a cell ({size})\n\n", surface.capacity_sectors, surface.sectors_per_cell));
    let label = surface.capacity_sectors.saturating_sub(1).to_string().len();
    let width = usize::try_from(width).expect("at most 1024");
    for (row, cells) in (0_u64..).zip(worst_of_cells(surface).chunks(width)) {
        let first = row * width as u64 * surface.sectors_per_cell;
        out.push_str(&format!("{first:>label$}  "));
        // One change of colour for a run of like cells.
        for run in cells.chunk_by(|a, b| a == b) {
            let letters: String = run.iter().map(|worst| worst.letter()).collect();
            match color {
                true => out.push_str(&format!("\x1b[{}m{letters}\x1b[0m", run[0].color())),
                false => out.push_str(&letters),
            }
        }
        out.push('\n');
    }
    let legend: Vec<String> = Worst::ALL.iter().map(|worst| format!("{} {}", worst.letter(), worst.name())).collect();
    out.push_str(&format!("\n{}; the worst of a cell is shown\n", legend.join(", ")));
    let stretches = stretches(surface);
    if !stretches.is_empty() {
        out.push('\n');
        out.push_str(&numbers(&stretches));
    }
    out
}

/// Neighbouring cells with trouble, worst first, then by what they count.
pub(super) fn stretches(surface: &SurfaceReport) -> Vec<Stretch> {
    let neighbours = |a: &SurfaceCell, b: &SurfaceCell| a.cell.checked_add(1) == Some(b.cell);
    let mut found: Vec<Stretch> = surface
        .marked
        .chunk_by(neighbours)
        .map(|cells| {
            let sum = |of: fn(&SurfaceCell) -> u64| cells.iter().map(of).fold(0, u64::saturating_add);
            Stretch {
                worst: cells.iter().map(Worst::of).max().expect("a chunk is not empty"),
                cells: cells.len() as u64,
                first: cells[0].first,
                last: cells[cells.len() - 1].last,
                pending: sum(|cell| cell.pending),
                remapped: sum(|cell| cell.remapped),
                lost: sum(|cell| cell.lost),
                slow: sum(|cell| cell.slow),
            }
        })
        .collect();
    let weight = |stretch: &Stretch| (stretch.worst, stretch.lost, stretch.pending, stretch.remapped, stretch.slow);
    found.sort_by_key(|stretch| std::cmp::Reverse(weight(stretch)));
    found
}

fn numbers(stretches: &[Stretch]) -> String {
    let mut table = Table::new(&[
        ("SECTORS", Left),
        ("CELLS", Right),
        ("WORST", Left),
        ("LOST SECTORS", Right),
        ("PENDING BLOCKS", Right),
        ("REMAPPED BLOCKS", Right),
        ("SLOW BLOCKS", Right),
    ]);
    for stretch in stretches.iter().take(STRETCHES_MAX) {
        table.row([
            show::sectors(stretch.first, stretch.last.saturating_sub(stretch.first).saturating_add(1)),
            stretch.cells.to_string(),
            stretch.worst.name().to_owned(),
            stretch.lost.to_string(),
            stretch.pending.to_string(),
            stretch.remapped.to_string(),
            stretch.slow.to_string(),
        ]);
    }
    let mut out = table.render("");
    if stretches.len() > STRETCHES_MAX {
        out.push_str(&format!("and {} more; see `list`, or --json\n", stretches.len() - STRETCHES_MAX));
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::runtime::surface;

    /// A disk of 64 cells with 1024 sectors each: a scratch over three cells, two cells by themselves, and parts that
    /// were not scanned.
    pub(crate) fn scratched() -> SurfaceReport {
        let cell = |cell, lost, pending, remapped| SurfaceCell {
            cell,
            first: 1024 * cell + 512,
            last: 1024 * cell + 519,
            pending,
            remapped,
            lost,
            slow: u64::from(cell == 20),
        };
        let marked = vec![cell(9, 0, 0, 2), cell(10, 0, 3, 0), cell(11, 4, 0, 1), cell(20, 0, 0, 0), cell(40, 0, 0, 5)];
        SurfaceReport { marked, not_scanned: vec![(39, 3), (60, 4)], ..surface::empty(64 * 1024, 64) }
    }

    #[test]
    fn a_scratch_is_seen_and_its_ends_are_named() {
        let expected = "\
65536 sectors, 1024 a cell (512 KiB)

    0  .........rPL....
16384  ....s...........
32768  .......-r-......
49152  ............----

. nothing known, - not scanned yet, s slow, r remapped, P pending, L lost; the worst of a cell is shown

SECTORS      CELLS  WORST     LOST SECTORS  PENDING BLOCKS  REMAPPED BLOCKS  SLOW BLOCKS
9728-11783       3  lost                 4               3                3            0
41472-41479      1  remapped             0               0                5            0
20992-20999      1  slow                 0               0                0            1
";
        assert_eq!(text(&scratched(), 16, false), expected);
    }

    #[test]
    fn colour_adds_nothing_that_the_letters_do_not_say() {
        let (plain, colored) = (text(&scratched(), 16, false), text(&scratched(), 16, true));
        assert!(
            colored.contains("\x1b[2m.........\x1b[0m\x1b[34mr\x1b[0m\x1b[33mP\x1b[0m\x1b[1;31mL\x1b[0m"),
            "{colored}"
        );
        let mut bare = colored;
        for code in ["\x1b[2m", "\x1b[90m", "\x1b[36m", "\x1b[34m", "\x1b[33m", "\x1b[1;31m", "\x1b[0m"] {
            bare = bare.replace(code, "");
        }
        assert_eq!(bare, plain);
    }

    #[test]
    fn a_disk_without_trouble_is_all_dots_and_a_long_list_is_cut() {
        let text_of = |surface: &SurfaceReport| text(surface, 16, false);
        let clean = text_of(&surface::empty(64 * 1024, 64));
        assert_eq!(clean.matches("................\n").count(), 4, "{clean}");
        assert!(!clean.contains("SECTORS"), "{clean}");
        let marked = (0..30).map(|i| SurfaceCell { cell: 2 * i, remapped: 1, ..SurfaceCell::default() }).collect();
        let many = text_of(&SurfaceReport { marked, ..surface::empty(64 * 1024, 64) });
        assert!(many.ends_with("and 18 more; see `list`, or --json\n"), "{many}");
    }
}
