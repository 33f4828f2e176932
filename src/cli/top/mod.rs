//! `top`: a volume on a terminal, drawn anew as it changes.
//!
//! [`feed`] asks the server on a thread of its own, so that keys are answered while it does not; [`app`] is what is
//! known and what was typed, [`view`] draws that and nothing else.

mod app;
mod feed;
mod rates;
mod shot;
#[cfg(test)]
mod tests;
mod view;

use std::io::{self, IsTerminal};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyEventKind};
use rustix::event::{PollFd, PollFlags, poll};

use self::app::{App, Wanted};
use self::feed::Feed;
use self::shot::Shot;
use super::report_args::TopArgs;
use super::run::CliError;
use crate::runtime::signals;

/// How often the age of what is shown is brought up to date, where nothing else happens.
const TICK: Duration = Duration::from_secs(1);

/// What the drawing thread waits for.
enum Message {
    /// An answer, or why there is none, and when.
    Answer(Duration, Result<Box<Shot>, String>),
    /// A key, or another size.
    Typed(Event),
    /// The terminal is gone.
    Broken(io::Error),
    /// A signal came.
    Stop,
}

/// Brings the terminal back on every way out; a panic does so by ratatui's hook, before it is printed.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

pub(super) fn run(args: &TopArgs) -> Result<(), CliError> {
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        let advice = "`top` needs a terminal to draw on; use `status --watch 1` or `stats --json` here";
        return Err(CliError::Usage(advice.into()));
    }
    let began = Instant::now();
    let mut feed = Feed::new(args)?;
    // A wrong path or volume is said as by any other command.
    let first = feed.ask()?;
    let mut app = App::new(args.interval);
    app.take(began.elapsed(), Ok(first));
    let stop = signals::end_signals().map_err(CliError::Signals)?;
    let (told, messages) = mpsc::channel();
    let orders = start(feed, args.interval, began, stop, &told).map_err(CliError::Terminal)?;
    let _restored = Restored;
    let mut terminal = ratatui::try_init().map_err(CliError::Terminal)?;
    watch(&mut terminal, &mut app, began, &messages, &orders).map_err(CliError::Terminal)
}

/// The threads that wait for the server, for keys and for signals. They end with the process.
fn start(
    feed: Feed,
    interval: Duration,
    began: Instant,
    stop: OwnedFd,
    told: &Sender<Message>,
) -> io::Result<Sender<Wanted>> {
    let (orders, ordered) = mpsc::channel();
    let to = told.clone();
    let answer = move |answer| to.send(Message::Answer(began.elapsed(), answer)).is_ok();
    thread::Builder::new().name("feed".into()).spawn(move || feed.run(interval, &ordered, answer))?;
    let to = told.clone();
    thread::Builder::new().name("keys".into()).spawn(move || {
        loop {
            let message = event::read().map_or_else(Message::Broken, Message::Typed);
            let is_last = matches!(message, Message::Broken(_));
            if to.send(message).is_err() || is_last {
                return;
            }
        }
    })?;
    let to = told.clone();
    thread::Builder::new().name("signals".into()).spawn(move || {
        while poll(&mut [PollFd::new(&stop, PollFlags::IN)], None).is_err() {}
        // Where nobody listens any more, the end has come anyway.
        let _ = to.send(Message::Stop);
    })?;
    Ok(orders)
}

fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    app: &mut App,
    began: Instant,
    messages: &Receiver<Message>,
    orders: &Sender<Wanted>,
) -> io::Result<()> {
    loop {
        app.now = began.elapsed();
        terminal.draw(|frame| view::draw(frame, app))?;
        let wanted = match messages.recv_timeout(TICK) {
            Ok(Message::Answer(at, answer)) => {
                app.take(at, answer.map(|shot| *shot));
                None
            }
            Ok(Message::Typed(Event::Key(key))) if key.kind != KeyEventKind::Release => app.typed(key),
            Ok(Message::Typed(_)) | Err(RecvTimeoutError::Timeout) => None,
            Ok(Message::Broken(error)) => return Err(error),
            Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        match wanted {
            None => {}
            Some(Wanted::End) => return Ok(()),
            // It asks until nobody listens: it has panicked, and its hook has given the terminal back.
            Some(order) => orders.send(order).map_err(|_| io::Error::other("the thread that asks has ended"))?,
        }
    }
}
