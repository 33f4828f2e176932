//! Doing what was typed.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::args::{
    AdoptArgs, Args, Command, ControlArgs, CreateArgs, ListArgs, LogLevelArgs, SectorsArgs, ServeArgs, ShapeArgs,
};
use super::logging::LogFormat;
use super::{follow, parse, show};
use crate::control::api::{Done, ListPage, LogLevel, Pong, Resize, Sectors};
use crate::control::client::{Client, ClientError, ORDER_TIMEOUT, REPORT_TIMEOUT};
use crate::runtime::options::{
    AdoptOptions, CreateIfAbsent, CreateOptions, Listen, MAX_REMAPS_DEFAULT, ServeOptions, VolumeShape,
};
use crate::runtime::report::ListFilter;
use crate::runtime::signals;
use crate::runtime::volume::{MakeError, adopt, create};
use crate::serve::{FrontEnd, ServeError, serve};

/// Why a command failed: one line for a person.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// What was typed does not fit what is there.
    #[error("{0}")]
    Usage(String),
    /// There is no such sector.
    #[error("{disk}: {count} sectors from {start} are not all on the disk; its last sector is {last}")]
    BeyondEnd {
        /// The primary's path.
        disk: String,
        /// First sector asked for.
        start: u64,
        /// Sectors asked for.
        count: u64,
        /// Last sector there is.
        last: u64,
    },
    /// No server, or it refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// No volume was made.
    #[error(transparent)]
    Make(#[from] MakeError),
    /// Serving failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A pass of the scanner is not, or not well, at its end.
    #[error("{0}")]
    Scan(String),
    /// Signals cannot be had.
    #[error("cannot listen for SIGTERM and SIGINT: {0}")]
    Signals(io::Error),
    /// A file cannot be written.
    #[error("{}: {error}; name another file", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// The terminal cannot be drawn on.
    #[error("the terminal: {0}; `status --watch 1` needs none")]
    Terminal(io::Error),
    /// The answer cannot be printed.
    #[error("standard output: {0}")]
    Output(#[from] io::Error),
}

impl CliError {
    /// The program's exit status.
    pub fn exit_status(&self) -> u8 {
        match self {
            CliError::Usage(_) => 2,
            // Whoever read the answer has seen enough (`list | head`).
            CliError::Output(e) if e.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }
}

/// How much this command logs until told otherwise, 0 to 3.
pub fn log_level(args: &Args) -> u8 {
    match &args.command {
        Command::Serve(args) => args.log_level,
        _ => 0,
    }
}

/// How this command's log lines look.
pub fn log_format(args: &Args) -> LogFormat {
    match &args.command {
        Command::Serve(args) => args.log_format,
        _ => LogFormat::Text,
    }
}

/// Do it; answers go to `out`.
///
/// # Errors
/// See [`CliError`].
pub fn run(args: Args, out: &mut dyn Write) -> Result<(), CliError> {
    match args.command {
        Command::Create(args) => Ok(writeln!(out, "{}", create(&create_options(args)?)?)?),
        Command::Adopt(args) => Ok(writeln!(out, "{}", adopt(&adopt_options(args)?)?)?),
        Command::Serve(args) => {
            let options = serve_options(*args)?;
            let front_end = FrontEnd::new(&options.listen)?;
            let stop = signals::stop_signals().map_err(CliError::Signals)?;
            Ok(serve(&options, front_end, stop)?)
        }
        Command::Status(args) => super::status::run(&args, out),
        Command::Stats(args) => super::stats::run(&args, out),
        Command::List(args) => Server::of(&args.control)?.list(&args, out),
        Command::Events(args) => follow::events(&Server::of(&args.control)?, &args, out),
        Command::Fault(command) => super::fault::run(command, out),
        Command::Clear(args) => Server::of(&args)?.order("/v1/clear", &serde_json::json!({}), out),
        Command::Save(args) => Server::of(&args)?.order("/v1/save", &serde_json::json!({}), out),
        Command::Remap(args) => Server::of(&args.control)?.sectors("/v1/remap", &args, out),
        Command::Verify(args) => super::verify::run(&args, out),
        Command::Release(args) => Server::of(&args.control)?.sectors("/v1/release", &args, out),
        Command::Resize(args) => Server::of(&args.control)?.order("/v1/resize", &Resize { size: args.size }, out),
        Command::Scan(command) => super::scan::run(command, out),
        Command::Ping(args) => Server::of(&args)?.ping(out),
        Command::LogLevel(args) => Server::of(&args.control)?.log_level(&args, out),
        Command::Health(args) => super::health::run(&args, out),
        Command::Surface(args) => super::surface::run(&args, out),
        Command::Top(args) => super::top::run(&args),
        Command::ClearStats(args) => Server::of(&args)?.order("/v1/clear-stats", &serde_json::json!({}), out),
    }
}

fn shape(args: ShapeArgs) -> VolumeShape {
    VolumeShape { max_remaps: args.max_remaps.unwrap_or(MAX_REMAPS_DEFAULT), serial: args.serial }
}

fn create_options(args: CreateArgs) -> Result<CreateOptions, CliError> {
    let spare = args.spare.map_or_else(|| parse::default_spare(&args.primary), Ok).map_err(CliError::Usage)?;
    Ok(CreateOptions { primary: args.primary, spare, size: args.size, shape: shape(args.shape), force: args.force })
}

fn adopt_options(args: AdoptArgs) -> Result<AdoptOptions, CliError> {
    let spare = args.spare.map_or_else(|| parse::default_spare(&args.primary), Ok).map_err(CliError::Usage)?;
    Ok(AdoptOptions { primary: args.primary, spare, shape: shape(args.shape), force: args.force })
}

pub(super) fn serve_options(args: ServeArgs) -> Result<ServeOptions, CliError> {
    let spare = match args.spare {
        None if args.passthrough || args.degraded => None,
        None => Some(parse::default_spare(&args.primary).map_err(CliError::Usage)?),
        given => given,
    };
    let (listen, control_default) = match (args.socket_path, args.fd) {
        (Some(path), _) => {
            let control = parse::with_suffix(&path, ".ctl");
            (Listen::Path(path), Some(control))
        }
        (None, Some(fd)) => (Listen::Fd(fd), None),
        (None, None) => return Err(CliError::Usage("say where to listen with --socket-path or --fd".into())),
    };
    let new_shape = shape(ShapeArgs { max_remaps: args.max_remaps, serial: args.serial });
    Ok(ServeOptions {
        primary: args.primary,
        spare,
        listen,
        control_path: args.control_path.or(control_default),
        num_queues: args.num_queues,
        transport: args.transport,
        workers: args.workers,
        poll_us: args.poll_us,
        incoming: args.incoming,
        read_only: args.read_only,
        create: args.size.filter(|_| args.create).map(|size| CreateIfAbsent { size, shape: new_shape }),
        io_engine: args.io_engine,
        cache: args.cache,
        fault_injection: args.fault_injection,
        accept_external: args.accept_external,
        passthrough: args.passthrough,
        degraded: args.degraded,
        on_device_loss: args.on_device_loss,
        on_spare_full: args.on_spare_full,
        lock_wait: Duration::from_secs(args.lock_wait),
        control_group: args.control_group,
        http_listen: args.http_listen,
        scan: args.scan.options(),
    })
}

/// A running server, and how its answers are printed.
pub(super) struct Server {
    client: Client,
    volume: Option<String>,
    json: bool,
}

impl Server {
    pub(super) fn of(args: &ControlArgs) -> Result<Server, CliError> {
        Ok(Server { client: Client::new(&args.control_path)?, volume: args.volume.clone(), json: args.json })
    }

    /// One whose answers are not printed.
    pub(super) fn at(control_path: &Path) -> Result<Server, CliError> {
        Ok(Server { client: Client::new(control_path)?, volume: None, json: false })
    }

    /// Ask for this volume from now on.
    pub(super) fn choose(&mut self, volume: &str) {
        self.volume = Some(volume.to_owned());
    }

    /// `route` with the query, and the volume where one was named.
    fn target(&self, route: &str, query: &[(&str, String)]) -> String {
        let mut target = route.to_owned();
        let volume = self.volume.iter().map(|volume| ("volume", percent_encoded(volume)));
        let query = query.iter().map(|(name, value)| (*name, value.clone())).chain(volume);
        for (i, (name, value)) in query.enumerate() {
            target.push(if i == 0 { '?' } else { '&' });
            target.push_str(name);
            target.push('=');
            target.push_str(&value);
        }
        target
    }

    pub(super) fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, CliError> {
        self.get_with(route, &[])
    }

    pub(super) fn get_with<T: DeserializeOwned>(&self, route: &str, query: &[(&str, String)]) -> Result<T, CliError> {
        Ok(self.client.get(&self.target(route, query), REPORT_TIMEOUT)?)
    }

    pub(super) fn post<T: DeserializeOwned>(&self, route: &str, body: &impl Serialize) -> Result<T, CliError> {
        Ok(self.client.post(&self.target(route, &[]), body, ORDER_TIMEOUT)?)
    }

    pub(super) fn delete<T: DeserializeOwned>(&self, route: &str) -> Result<T, CliError> {
        Ok(self.client.delete(&self.target(route, &[]), ORDER_TIMEOUT)?)
    }

    /// Print a document as JSON, or as the text made of it.
    pub(super) fn print<T: Serialize>(
        &self,
        document: &T,
        text: impl FnOnce(&T) -> String,
        out: &mut dyn Write,
    ) -> Result<(), CliError> {
        if self.json {
            let json = serde_json::to_string(document).expect("documents are plain data with string keys");
            writeln!(out, "{json}")?;
        } else {
            writeln!(out, "{}", text(document).trim_end_matches('\n'))?;
        }
        Ok(())
    }

    pub(super) fn get_text(&self, route: &str) -> Result<String, CliError> {
        Ok(self.client.get_text(route, REPORT_TIMEOUT)?)
    }

    fn list(&self, args: &ListArgs, out: &mut dyn Write) -> Result<(), CliError> {
        let filter = match args.filter() {
            ListFilter::All => "all",
            ListFilter::Lost => "lost",
            ListFilter::Pending => "pending",
        };
        let mut from = Some(0);
        let mut head_due = !self.json;
        while let Some(start) = from {
            let page: ListPage =
                self.get_with("/v1/list", &[("filter", filter.into()), ("from", start.to_string())])?;
            if head_due {
                head_due = false;
                let head = if page.entries.is_empty() { "none".into() } else { show::list_head() };
                writeln!(out, "{head}")?;
            }
            for entry in &page.entries {
                self.print(entry, show::list_entry, out)?;
            }
            // A server that would send us back ends the list rather than looping for ever.
            from = page.next.filter(|next| *next > start);
        }
        Ok(())
    }

    /// As [`Server::get_with`], for answers that may be put off.
    pub(super) fn ask<T: DeserializeOwned>(
        &self,
        route: &str,
        query: &[(&str, String)],
        timeout: Duration,
    ) -> Result<T, ClientError> {
        self.client.get(&self.target(route, query), timeout)
    }

    pub(super) fn prints_json(&self) -> bool {
        self.json
    }

    fn ping(&self, out: &mut dyn Write) -> Result<(), CliError> {
        let pong: Pong = self.get("/v1/ping")?;
        self.print(&pong, |pong| format!("pong from vhost-remap {}", pong.version), out)
    }

    pub(super) fn order(&self, route: &str, body: &impl Serialize, out: &mut dyn Write) -> Result<(), CliError> {
        let done: Done = self.post(route, body)?;
        self.print(&done, |done| done.message.clone(), out)
    }

    fn sectors(&self, route: &str, args: &SectorsArgs, out: &mut dyn Write) -> Result<(), CliError> {
        for range in &args.sectors {
            self.order(route, &Sectors { start: range.start.0, count: range.count }, out)?;
        }
        Ok(())
    }

    fn log_level(&self, args: &LogLevelArgs, out: &mut dyn Write) -> Result<(), CliError> {
        let set: LogLevel = self.post("/v1/log-level", &LogLevel { level: args.level })?;
        self.print(&set, |set| format!("log level {}", set.level), out)
    }
}

/// A value safe in a query (RFC 3986 §2.3).
fn percent_encoded(value: &str) -> String {
    let byte = |b: u8| match b {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(b).to_string(),
        _ => format!("%{b:02X}"),
    };
    value.bytes().map(byte).collect()
}
