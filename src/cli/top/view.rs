//! The picture: a function of [`App`] and of the room there is.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph, Sparkline, Wrap};

use super::app::App;
use super::shot::{Scan, Shot};
use crate::cli::stats::time;
use crate::cli::status::NOT_OPERATIONAL;
use crate::cli::surface::{Worst, worst_of_cells};
use crate::cli::{show, table};
use crate::runtime::report::{BlockReport, EventRecord};
use crate::runtime::surface::SurfaceReport;

/// Less room than this gets the short picture.
const WIDTH_FULL: u16 = 64;
const HEIGHT_FULL: u16 = 18;
/// From here on there are curves, from there on more of everything.
const WIDTH_WIDE: u16 = 100;
const HEIGHT_TALL: u16 = 32;
/// Width of the numbers of requests; the curves are beside them.
const WIDTH_NUMBERS: u16 = 79;

const HELP: &str = "\
q, Esc, Ctrl-C  end
p               pause, go on
+ -             ask less often, more often
j k, arrows     scroll the events
PgDn PgUp       by ten; Home: the newest
Tab, 1 to 9     another volume, where there are more
?               this help";

const KEYS: &str = "q end  p pause  +/- interval  j/k scroll  ? help";

/// Draw.
pub(super) fn draw(frame: &mut Frame, app: &App) {
    let area = frame.area();
    match &app.shot {
        None => frame.render_widget(Paragraph::new("asking the server"), area),
        Some(shot) if area.width < WIDTH_FULL || area.height < HEIGHT_FULL => short(frame, area, app, shot),
        Some(shot) => full(frame, area, app, shot),
    }
    if app.shows_help {
        help(frame, area);
    }
}

/// Text of others without what would move the cursor or turn the line around (UAX #9).
fn plain(text: &str) -> String {
    let is_active = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if is_active(c) { '\u{fffd}' } else { c }).collect()
}

fn style_of(worst: Worst) -> Style {
    match worst {
        Worst::Fine => Style::new().dim(),
        Worst::NotScanned => Style::new().fg(Color::DarkGray),
        Worst::Slow => Style::new().fg(Color::Cyan),
        Worst::Remapped => Style::new().fg(Color::Blue),
        Worst::Pending => Style::new().fg(Color::Yellow),
        Worst::Lost => Style::new().fg(Color::Red).bold(),
    }
}

fn health_style(state: &str) -> Style {
    match state {
        "OK" => Style::new().fg(Color::Green),
        "WATCH" => Style::new().fg(Color::Yellow),
        "" => Style::new().dim(),
        _ => Style::new().fg(Color::Red).bold(),
    }
}

fn state_style(states: &[String]) -> Style {
    match states {
        [ok] if ok == "ok" => Style::new().fg(Color::Green),
        states if states.iter().any(|state| NOT_OPERATIONAL.contains(&state.as_str())) => {
            Style::new().fg(Color::Red).bold()
        }
        _ => Style::new().fg(Color::Yellow),
    }
}

/// `1d 2h 3m`, the two largest parts.
fn span(seconds: u64) -> String {
    let text = humantime::format_duration(Duration::from_secs(seconds)).to_string();
    let short = |part: &str| part.replace("days", "d").replace("day", "d");
    text.split(' ').take(2).map(short).collect::<Vec<_>>().join(" ")
}

/// A number a second, with three digits or so.
fn rate(value: f64) -> String {
    match value {
        value if value >= 99_950.0 => format!("{:.0}k", value / 1000.0),
        value if value >= 99.95 || value == 0.0 => format!("{value:.0}"),
        value => format!("{value:.1}"),
    }
}

fn bytes_per_second(value: f64) -> String {
    format!("{}/s", show::bytes(value as u64))
}

fn heading(text: String) -> Line<'static> {
    Line::styled(text, Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED))
}

/// First line: which volume, and how it is.
fn title(app: &App, shot: &Shot) -> Line<'static> {
    let status = &shot.status;
    let at = shot.names.iter().position(|name| *name == shot.name).map_or(0, |at| at + 1);
    let which = if shot.names.len() > 1 { format!(" ({at}/{})", shot.names.len()) } else { String::new() };
    let health =
        if status.health.is_empty() { "-".to_owned() } else { format!("{} {}", status.health, status.health_score) };
    let mut parts = vec![
        Span::styled(format!("{}{which}", plain(&shot.name)), Style::new().bold()),
        "  ".into(),
        Span::styled(plain(&status.state.join(",")), state_style(&status.state)),
        "  health ".into(),
        Span::styled(plain(&health), health_style(&status.health)),
        format!("  up {}", span(status.uptime_seconds)).into(),
        if status.connected { "  connected".into() } else { Span::styled("  not connected", Style::new().dim()) },
    ];
    if app.is_paused {
        parts.push(Span::styled("  PAUSED", Style::new().reversed()));
    }
    Line::from(parts)
}

/// That the server is gone, what is wrong, and what to do.
fn notes(app: &App, shot: &Shot) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    if let Some(gone) = &app.gone {
        let since = app.now.saturating_sub(gone.since).as_secs();
        let old = app.now.saturating_sub(app.taken).as_secs();
        let text = format!("NO ANSWER for {since} s, what is below is {old} s old, asking on: {}", plain(&gone.why));
        lines.push(Line::styled(text, Style::new().fg(Color::Red).bold().reversed()));
    }
    for message in &shot.status.messages {
        lines.push(Line::styled(format!("! {}", plain(message)), state_style(&shot.status.state)));
    }
    for found in shot.health.iter().flat_map(|health| &health.findings) {
        let text = format!(
            "{} {}, {}: {} {} (limit {}); {}",
            found.state, found.device, found.rule, found.value, found.what, found.limit, found.advice
        );
        lines.push(Line::styled(plain(&text), health_style(&found.state)));
    }
    lines
}

/// Rows of requests, and the operation each is of.
fn requests(app: &App, shot: &Shot, all: bool) -> Vec<(String, Line<'static>)> {
    let head = format!(
        "{:<12} {:>8} {:>13} {:>9} {:>9} {:>9} {:>5} {:>6}",
        "REQUESTS", "IOPS", "BYTES", "p50", "p99", "p99 ALL", "NOW", "FAILED"
    );
    let mut rows = vec![(String::new(), heading(head))];
    for operation in &shot.stats.operations {
        let is_always = ["read", "write", "flush"].contains(&operation.operation.as_str());
        if !(is_always || all && operation.completed > 0) {
            continue;
        }
        let now = app.rates.as_ref().and_then(|rates| rates.get(&operation.operation));
        let latency = |ns: Option<u64>| ns.map_or("-".into(), time);
        let text = format!(
            "{:<12} {:>8} {:>13} {:>9} {:>9} {:>9} {:>5} ",
            plain(&operation.operation),
            now.map_or("-".into(), |now| rate(now.requests)),
            now.map_or("-".into(), |now| bytes_per_second(now.bytes)),
            latency(now.and_then(|now| now.p50_ns)),
            latency(now.and_then(|now| now.p99_ns)),
            latency(operation.latency.p99_ns),
            operation.in_flight,
        );
        let failed = Span::styled(format!("{:>6}", operation.failed), trouble(operation.failed));
        rows.push((operation.operation.clone(), Line::from(vec![text.into(), failed])));
    }
    rows
}

fn trouble(count: u64) -> Style {
    if count > 0 { Style::new().fg(Color::Red) } else { Style::new() }
}

fn devices(shot: &Shot) -> Vec<Line<'static>> {
    use table::Align::{Left, Right};
    let mut rows = table::Table::new(&[
        ("DEVICE", Left),
        ("STATE", Left),
        ("SIZE", Right),
        ("READ ERR", Right),
        ("WRITE ERR", Right),
        ("FLUSH ERR", Right),
        ("PATH", Left),
    ]);
    for device in &shot.status.devices {
        rows.row([
            plain(&device.role),
            plain(&device.state),
            show::bytes(device.size),
            device.read_errors.to_string(),
            device.write_errors.to_string(),
            device.flush_errors.to_string(),
            plain(&device.path),
        ]);
    }
    let text = rows.render("");
    let mut lines = text.lines().map(str::to_owned);
    let mut out: Vec<Line> = lines.next().map(heading).into_iter().collect();
    for (line, device) in lines.zip(&shot.status.devices) {
        let errors = device.read_errors + device.write_errors + device.flush_errors;
        let style = match device.state.as_str() {
            "up" if errors == 0 => Style::new(),
            "up" => Style::new().fg(Color::Yellow),
            _ => Style::new().fg(Color::Red).bold(),
        };
        out.push(Line::styled(line, style));
    }
    out
}

fn blocks(blocks: &BlockReport) -> Line<'static> {
    let BlockReport { remapped, remaps_max, slots_free, slots_retired, pending, lost_sectors, in_doubt } = blocks;
    let used = format!("{remapped} of {remaps_max} remapped ({})", show::percent(*remapped, *remaps_max));
    let mut parts = vec![
        Span::styled("BLOCKS  ", Style::new().bold()),
        Span::styled(used, if *remapped > 0 { style_of(Worst::Remapped) } else { Style::new() }),
    ];
    let mut part = |count: u64, text: &str, style: Style| {
        parts.push("  ".into());
        parts.push(Span::styled(format!("{count} {text}"), if count > 0 { style } else { Style::new() }));
    };
    part(*pending, "pending", style_of(Worst::Pending));
    part(*lost_sectors, "lost", style_of(Worst::Lost));
    part(*slots_free, "free", Style::new());
    part(*slots_retired, "retired", style_of(Worst::Pending));
    if *in_doubt > 0 {
        part(*in_doubt, "in doubt", style_of(Worst::Lost));
    }
    Line::from(parts)
}

fn scanner(scan: Option<&Scan>) -> Line<'static> {
    let name = Span::styled("SCANNER ", Style::new().bold());
    let Some(scan) = scan else { return Line::from(vec![name, "this server says nothing of one".dim()]) };
    let mut text = plain(&scan.state);
    if scan.pass > 0 {
        text.push_str(&format!(", pass {}, {:.1} %", scan.pass, scan.percent));
    }
    if scan.speed_now > 0 || scan.speed_average > 0 {
        let speed = |bytes| format!("{}/s", show::bytes(bytes));
        text.push_str(&format!(", {} (average {})", speed(scan.speed_now), speed(scan.speed_average)));
    }
    if let Some(seconds) = scan.eta_seconds {
        text.push_str(&format!(", {} to go", span(seconds)));
    }
    let finds = scan.finds();
    if !finds.is_empty() {
        text.push_str(&format!("; {}", plain(&finds)));
    }
    Line::from(vec![name, text.into()])
}

/// The map in so many rows and columns, several cells in one where it is finer than that.
fn surface(surface: &SurfaceReport, width: u16, rows: u16) -> Vec<Line<'static>> {
    let cells = worst_of_cells(surface);
    let (width, rows) = (usize::from(width.max(1)), usize::from(rows.max(1)));
    let together = cells.len().div_ceil(width * rows).max(1);
    let worst: Vec<Worst> =
        cells.chunks(together).map(|part| part.iter().copied().max().unwrap_or(Worst::Fine)).collect();
    let row = |cells: &[Worst]| {
        let runs = cells.chunk_by(|a, b| a == b);
        Line::from_iter(runs.map(|run| {
            let letters: String = run.iter().map(|worst| worst.letter()).collect();
            Span::styled(letters, style_of(run[0]))
        }))
    };
    let size = surface.sectors_per_cell.saturating_mul(512).saturating_mul(together as u64);
    let mut lines = vec![heading("SURFACE".into())];
    lines[0].push_span(Span::styled(format!("  {} a letter", show::bytes(size)), Style::new().not_underlined()));
    lines[0].push_span(" ");
    // All of it fits into 80 columns without the one that needs no word.
    for worst in Worst::ALL.into_iter().filter(|worst| *worst != Worst::Fine) {
        lines[0].push_span(" ");
        lines[0].push_span(Span::styled(worst.letter().to_string(), style_of(worst)));
        lines[0].push_span(format!(" {}", worst.name()));
    }
    lines.extend(worst.chunks(width).map(row));
    lines
}

fn event(event: &EventRecord) -> Line<'static> {
    let style = match event.severity.as_str() {
        "error" => Style::new().fg(Color::Red),
        "warn" => Style::new().fg(Color::Yellow),
        _ => Style::new(),
    };
    let text = plain(&show::event(event));
    // The date and the fractions take room that the cause needs.
    let short = text.get(11..19).filter(|_| text.get(10..11) == Some("T")).map(|clock| {
        let rest = text.split_once('Z').map_or("", |(_, rest)| rest);
        let words = rest.split_whitespace().collect::<Vec<_>>().join(" ");
        format!("{clock} {words}")
    });
    Line::styled(short.unwrap_or(text), style)
}

fn events(app: &App, rows: u16) -> Vec<Line<'static>> {
    let count = app.events.len();
    let place = match app.scroll {
        0 => format!("EVENTS  {count}, newest first (UTC)"),
        scroll => format!("EVENTS  {} to {count} of {count}, newest first (UTC)", scroll + 1),
    };
    let mut lines = vec![heading(place)];
    lines.extend(app.events.iter().skip(app.scroll).take(usize::from(rows)).map(event));
    if count == 0 {
        lines.push(Line::from("nothing has happened".dim()));
    }
    lines
}

fn footer(app: &App) -> Line<'static> {
    let interval = humantime::format_duration(app.interval);
    Line::from(vec![KEYS.dim(), format!("  every {interval}").dim()])
}

fn rows_of(lines: &[Line]) -> u16 {
    u16::try_from(lines.len()).unwrap_or(u16::MAX)
}

fn full(frame: &mut Frame, area: Rect, app: &App, shot: &Shot) {
    let is_tall = area.height >= HEIGHT_TALL;
    let gap = u16::from(is_tall);
    let mut notes = notes(app, shot);
    notes.truncate(if is_tall { 6 } else { 2 });
    let requests = requests(app, shot, is_tall);
    let mut devices = devices(shot);
    devices.truncate(if is_tall { 9 } else { 4 });
    let surface_rows = if is_tall { area.height / 5 } else { 3 };
    let surface = app.surface.as_ref().map(|found| surface(found, area.width, surface_rows)).unwrap_or_default();
    let height = |lines: u16| Constraint::Length(lines);
    let areas = Layout::vertical([
        height(1),
        height(rows_of(&notes)),
        height(gap),
        height(u16::try_from(requests.len()).unwrap_or(u16::MAX)),
        height(gap),
        height(rows_of(&devices)),
        height(gap),
        height(2),
        height(gap),
        height(rows_of(&surface)),
        height(gap),
        Constraint::Min(2),
        height(1),
    ])
    .areas::<13>(area);
    let [at_title, at_notes, _, at_requests, _, at_devices, _, at_blocks, _, at_surface, _, at_events, at_keys] = areas;
    frame.render_widget(title(app, shot), at_title);
    frame.render_widget(Paragraph::new(notes), at_notes);
    for ((operation, line), row) in requests.into_iter().zip(at_requests.rows()) {
        frame.render_widget(line, row);
        curve(frame, app, &operation, row);
    }
    frame.render_widget(Paragraph::new(devices), at_devices);
    frame.render_widget(Paragraph::new(vec![blocks(&shot.status.blocks), scanner(shot.scan.as_ref())]), at_blocks);
    frame.render_widget(Paragraph::new(surface), at_surface);
    frame.render_widget(Paragraph::new(events(app, at_events.height.saturating_sub(1))), at_events);
    frame.render_widget(footer(app), at_keys);
}

/// Requests a second over time, where there is room beside the numbers.
fn curve(frame: &mut Frame, app: &App, operation: &str, row: Rect) {
    if row.width < WIDTH_WIDE {
        return;
    }
    let place = Rect { x: row.x + WIDTH_NUMBERS, width: row.width - WIDTH_NUMBERS, ..row };
    if operation.is_empty() {
        frame.render_widget(heading(format!("{:<1$}", "IOPS OVER TIME", usize::from(place.width))), place);
        return;
    }
    let Some(history) = app.history.get(operation) else { return };
    let skipped = history.len().saturating_sub(usize::from(place.width));
    let values: Vec<u64> = history.iter().skip(skipped).map(|rate| rate.round() as u64).collect();
    frame.render_widget(Sparkline::default().data(values).style(Style::new().fg(Color::Cyan)), place);
}

/// What matters most, for little room.
fn short(frame: &mut Frame, area: Rect, app: &App, shot: &Shot) {
    let mut lines = vec![title(app, shot)];
    lines.extend(notes(app, shot).into_iter().take(1));
    for operation in ["read", "write"] {
        let now = app.rates.as_ref().and_then(|rates| rates.get(operation));
        let latency = |ns: Option<u64>| ns.map_or("-".into(), time);
        lines.push(match now {
            None => Line::from(format!("{operation:<6}-")),
            Some(now) => Line::from(format!(
                "{operation:<6}{}/s {} p99 {}",
                rate(now.requests),
                bytes_per_second(now.bytes),
                latency(now.p99_ns)
            )),
        });
    }
    lines.push(blocks(&shot.status.blocks));
    lines.push(scanner(shot.scan.as_ref()));
    let room = area.height.saturating_sub(rows_of(&lines)).saturating_sub(1);
    lines.extend(app.events.iter().skip(app.scroll).take(usize::from(room)).map(event));
    let areas = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas::<2>(area);
    frame.render_widget(Paragraph::new(lines), areas[0]);
    frame.render_widget(footer(app), areas[1]);
}

fn help(frame: &mut Frame, area: Rect) {
    let width = area.width.min(56);
    let height = area.height.min(9);
    let place = Rect { x: (area.width - width) / 2, y: (area.height - height) / 2, width, height };
    frame.render_widget(Clear, place);
    let text = Paragraph::new(HELP).wrap(Wrap { trim: false }).block(Block::bordered().title(" keys "));
    frame.render_widget(text, place);
}
