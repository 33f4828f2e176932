//! What is known of the volume, and what was typed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::rates::{self, Rate};
use super::shot::Shot;
use crate::runtime::report::EventRecord;
use crate::runtime::surface::SurfaceReport;

/// Events kept for scrolling.
const EVENTS_MAX: usize = 1000;
/// Rates kept for the curves.
const HISTORY_MAX: usize = 256;
/// Rows that a page key goes.
const PAGE: usize = 10;
/// What + and - step through, in milliseconds.
const INTERVALS_MS: [u64; 8] = [250, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000];

/// What a key asks for that is not done by drawing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    End,
    Volume(String),
    Interval(Duration),
    Pause(bool),
}

/// Why nothing new is known, and since when.
#[derive(Clone, Debug)]
pub(super) struct Gone {
    pub(super) why: String,
    pub(super) since: Duration,
}

/// Everything that is drawn. Times are since `top` began.
pub(super) struct App {
    pub(super) now: Duration,
    pub(super) interval: Duration,
    pub(super) is_paused: bool,
    pub(super) shows_help: bool,
    /// Events passed over, newest first.
    pub(super) scroll: usize,
    pub(super) shot: Option<Shot>,
    pub(super) taken: Duration,
    pub(super) gone: Option<Gone>,
    pub(super) surface: Option<SurfaceReport>,
    /// Newest first.
    pub(super) events: VecDeque<EventRecord>,
    /// By operation; nothing before the second answer.
    pub(super) rates: Option<BTreeMap<String, Rate>>,
    /// Requests a second by operation, newest last.
    pub(super) history: BTreeMap<String, VecDeque<f64>>,
}

impl App {
    pub(super) fn new(interval: Duration) -> App {
        App {
            now: Duration::ZERO,
            interval,
            is_paused: false,
            shows_help: false,
            scroll: 0,
            shot: None,
            taken: Duration::ZERO,
            gone: None,
            surface: None,
            events: VecDeque::new(),
            rates: None,
            history: BTreeMap::new(),
        }
    }

    /// What the server said, or why it did not.
    pub(super) fn take(&mut self, at: Duration, answer: Result<Shot, String>) {
        self.now = at;
        let mut shot = match answer {
            Ok(shot) => shot,
            Err(why) => {
                let since = self.gone.as_ref().map_or(at, |gone| gone.since);
                self.gone = Some(Gone { why, since });
                self.rates = None;
                return;
            }
        };
        let before = self.shot.take().filter(|before| before.name == shot.name);
        if before.is_none() {
            (self.rates, self.surface) = (None, None);
            self.history.clear();
        }
        if shot.events_anew || before.is_none() {
            self.events.clear();
            self.scroll = 0;
        }
        // A pause, or a server that was away, would make one long stretch of it.
        let is_next = self.gone.is_none();
        self.rates = before
            .filter(|_| is_next)
            .and_then(|before| rates::between(&before.stats, &shot.stats, at.saturating_sub(self.taken)));
        for (operation, rate) in self.rates.iter().flatten() {
            let history = self.history.entry(operation.clone()).or_default();
            history.push_back(rate.requests);
            if history.len() > HISTORY_MAX {
                history.pop_front();
            }
        }
        let is_open = shot.health.is_some();
        self.surface = shot.surface.take().or(self.surface.take().filter(|_| is_open));
        let came = shot.events.len();
        shot.events.drain(..).for_each(|event| self.events.push_front(event));
        self.events.truncate(EVENTS_MAX);
        if self.scroll > 0 {
            // What is read stays where it is.
            self.scroll_to(self.scroll.saturating_add(came));
        }
        (self.shot, self.taken, self.gone) = (Some(shot), at, None);
    }

    fn scroll_to(&mut self, place: usize) {
        self.scroll = place.min(self.events.len().saturating_sub(1));
    }

    /// A key.
    pub(super) fn typed(&mut self, key: KeyEvent) -> Option<Wanted> {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return (key.code == KeyCode::Char('c')).then_some(Wanted::End);
        }
        match key.code {
            KeyCode::Esc if self.shows_help => self.shows_help = false,
            KeyCode::Char('q') | KeyCode::Esc => return Some(Wanted::End),
            KeyCode::Char('?') => self.shows_help = !self.shows_help,
            KeyCode::Char('p') => {
                self.is_paused = !self.is_paused;
                return Some(Wanted::Pause(self.is_paused));
            }
            KeyCode::Char('+' | '=') => return self.change_interval(|ms, now| ms > now, INTERVALS_MS),
            KeyCode::Char('-') => {
                let mut falling = INTERVALS_MS;
                falling.reverse();
                return self.change_interval(|ms, now| ms < now, falling);
            }
            KeyCode::Down | KeyCode::Char('j') => self.scroll_to(self.scroll.saturating_add(1)),
            KeyCode::Up | KeyCode::Char('k') => self.scroll_to(self.scroll.saturating_sub(1)),
            KeyCode::PageDown => self.scroll_to(self.scroll.saturating_add(PAGE)),
            KeyCode::PageUp => self.scroll_to(self.scroll.saturating_sub(PAGE)),
            KeyCode::Home => self.scroll = 0,
            KeyCode::End => self.scroll_to(usize::MAX),
            KeyCode::Tab => return self.volume(|at, all| (at + 1) % all),
            KeyCode::BackTab => return self.volume(|at, all| (at + all - 1) % all),
            KeyCode::Char(digit @ '1'..='9') => {
                let number = usize::try_from(digit.to_digit(10)?).ok()?;
                return self.volume(|_, _| number - 1);
            }
            _ => {}
        }
        None
    }

    fn change_interval(&mut self, is_next: fn(Duration, Duration) -> bool, steps: [u64; 8]) -> Option<Wanted> {
        let next = steps.into_iter().map(Duration::from_millis).find(|step| is_next(*step, self.interval))?;
        self.interval = next;
        Some(Wanted::Interval(next))
    }

    fn volume(&mut self, which: impl FnOnce(usize, usize) -> usize) -> Option<Wanted> {
        let shot = self.shot.as_ref()?;
        // One that was named by its UUID stands nowhere.
        let at = shot.names.iter().position(|name| *name == shot.name);
        let all = shot.names.len();
        if all == 0 || (all == 1 && at.is_some()) {
            return None;
        }
        let next = shot.names.get(which(at.unwrap_or(all - 1), all))?;
        (*next != shot.name).then(|| Wanted::Volume(next.clone()))
    }
}
