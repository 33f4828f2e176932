//! The page at `/`, in a real browser without a screen, which is told what to do by Chromium's DevTools protocol.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::inputs::skip;
use crate::monitoring::{http, http_address, work};
use crate::server::{Server, Volume, done, vhost_remap};

/// Longest that anything takes in a browser on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// A browser with one page. It goes away with this.
struct Browser {
    child: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    asked: u64,
    session: Option<String>,
    /// What the console got: errors, warnings, refusals by the page's policy.
    console: Vec<Value>,
    profile: TempDir,
}

impl Browser {
    /// None where no browser is installed.
    fn start() -> Option<Browser> {
        let is_there = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|out| out.status.success());
        let program = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(is_there)?;
        let profile = tempfile::tempdir().unwrap();
        let mut child = Command::new("sh")
            // It speaks on descriptors 3 and 4.
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 1>&2", program])
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--disable-background-networking", "--remote-debugging-pipe"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(profile.path().join("errors")).unwrap())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (told, messages) = mpsc::channel();
        std::thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                let Ok(message) = serde_json::from_slice(&message) else { return };
                if told.send(message).is_err() {
                    return;
                }
            }
        });
        let (session, console) = (None, Vec::new());
        let mut browser = Browser { child, input, messages, asked: 0, session, console, profile };
        let targets = browser.call("Target.getTargets", &json!({}));
        let page = targets["targetInfos"].as_array().unwrap().iter().find(|target| target["type"] == "page").unwrap();
        let attached = browser.call("Target.attachToTarget", &json!({"targetId": page["targetId"], "flatten": true}));
        browser.session = Some(attached["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), &json!({}));
        }
        Some(browser)
    }

    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.asked += 1;
        let mut message = json!({"id": self.asked, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.input.write_all(format!("{message}\0").as_bytes()).unwrap();
        loop {
            let Ok(mut answer) = self.messages.recv_timeout(LIMIT) else {
                let errors = std::fs::read_to_string(self.profile.path().join("errors")).unwrap_or_default();
                panic!("{method}: no answer: {errors}");
            };
            if answer["id"] == self.asked {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].take();
            }
            let told = ["Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"];
            if told.iter().any(|method| answer["method"] == *method) {
                self.console.push(answer["params"].take());
            }
        }
    }

    fn open(&mut self, address: &str) {
        self.call("Page.navigate", &json!({"url": format!("http://{address}/")}));
    }

    /// What an expression is, on the page.
    fn value(&mut self, expression: &str) -> Value {
        let result = self.call("Runtime.evaluate", &json!({"expression": expression, "returnByValue": true}));
        assert!(result["exceptionDetails"].is_null(), "{expression}: {result}");
        result["result"]["value"].clone()
    }

    fn text(&mut self, selector: &str) -> String {
        let all = format!("[...document.querySelectorAll({selector:?})].map((found) => found.textContent).join('\\n')");
        self.value(&all).as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn await_text(&mut self, selector: &str, holds: impl Fn(&str) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let text = self.text(selector);
            if holds(&text) {
                return;
            }
            assert!(Instant::now() < deadline, "{selector} stays {text:?}; console: {:?}", self.console);
        }
    }

    fn press(&mut self, key: &str, code: u32, text: &str) {
        let down = if text.is_empty() { "rawKeyDown" } else { "keyDown" };
        for kind in [down, "keyUp"] {
            let mut event = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            if kind == "keyDown" {
                event["text"] = text.into();
            }
            self.call("Input.dispatchKeyEvent", &event);
        }
    }

    #[track_caller]
    fn check_console_is_empty(&self) {
        assert!(self.console.is_empty(), "{:?}", self.console);
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // All its processes end with it when it is asked to; the answer may not come any more.
        let close = json!({"id": self.asked + 1, "method": "Browser.close"});
        let _ = self.input.write_all(format!("{close}\0").as_bytes());
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            if self.messages.recv_timeout(Duration::from_millis(100)) == Err(mpsc::RecvTimeoutError::Disconnected) {
                break;
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A volume whose name is markup, and its server after some work.
fn hostile() -> (Volume, Server) {
    let mut volume = Volume::absent();
    volume.primary = volume.dir.path().join("<img src=x onerror=\"document.title='owned'\">&amp;.img");
    volume.spare = volume.dir.path().join("<script>document.title='owned'; <b>.spare");
    let (primary, spare) = (volume.primary.to_str().unwrap(), volume.spare.to_str().unwrap());
    done(&vhost_remap(&["create", "--primary", primary, "--spare", spare, "--size", "32M", "--max-remaps", "64"]));
    let server = volume.serve(&["--http-listen", "127.0.0.1:0"]);
    work(&server);
    server.await_event("remapped");
    (volume, server)
}

#[test]
fn the_page_shows_what_the_server_says_and_when_it_is_gone() {
    let (volume, server) = hostile();
    let address = http_address(&server);
    let Some(mut browser) = Browser::start() else {
        return skip("the_page_shows_what_the_server_says_and_when_it_is_gone", "no chromium");
    };
    browser.open(&address);
    let name = volume.primary.file_name().unwrap().to_str().unwrap().to_owned();
    browser.await_text("#name", |text| text == name);
    let status = server.status();
    browser.await_text("#state", |text| text == status.state.join(", "));
    browser.await_text("#health", |text| text == format!("{} {}", status.health, status.health_score));
    browser.await_text("#findings", |text| text.contains("remapped-recently") && text.contains("backup"));
    browser.await_text("#used-text", |text| text == "1 of 64 (1.6 %)");
    let done_and_failed = "#latency tr:first-child td:nth-last-child(-n + 2)";
    browser.await_text(done_and_failed, |text| text == "2\n1");
    browser.await_text("#devices td.left", |text| {
        text.split('\n').eq([volume.primary.to_str().unwrap(), volume.spare.to_str().unwrap()])
    });
    browser.await_text("#events", |text| text.contains("remapped") && text.contains("primary 1000-1007"));
    browser.await_text("#door", |text| text.contains(&address));
    assert_eq!(browser.value("document.querySelectorAll('#surface .remapped').length"), 1);
    assert_eq!(browser.value("document.querySelectorAll('#surface .pending').length"), 1);
    // Rates come from what the guest does while it is looked at.
    let mut guest = server.guest(1);
    let deadline = Instant::now() + LIMIT;
    while !browser.text("#load .card:first-child .now").starts_with(|c: char| ('1'..='9').contains(&c)) {
        assert!(Instant::now() < deadline, "no rate: {}", browser.text("#load"));
        guest.read(0, 8).unwrap();
    }
    assert_eq!(browser.value("document.querySelectorAll('img, main script').length"), 0, "markup was made of a name");
    assert!(browser.text("title").starts_with(&name), "{}", browser.text("title"));
    assert_eq!(browser.text("#gone"), "");
    browser.check_console_is_empty();
    drop(guest);
    server.stop();
    browser.await_text("#gone", |text| text.contains("it does not answer") && text.contains("goes on asking"));
    let again = volume.serve(&["--http-listen", &address]);
    browser.await_text("#gone", |text| text.is_empty());
    browser.await_text("#latency tr:first-child td:nth-last-child(2)", |text| text == "0");
    drop(browser);
    again.stop();
}

#[test]
fn the_page_is_used_by_keyboard_on_a_narrow_screen_in_the_dark() {
    let (_volume, server) = hostile();
    let Some(mut browser) = Browser::start() else {
        return skip("the_page_is_used_by_keyboard_on_a_narrow_screen_in_the_dark", "no chromium");
    };
    let narrow = json!({"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": true});
    browser.call("Emulation.setDeviceMetricsOverride", &narrow);
    let scheme = |name: &str| json!({"features": [{"name": "prefers-color-scheme", "value": name}]});
    let brightness = |browser: &mut Browser, name: &str| {
        browser.call("Emulation.setEmulatedMedia", &scheme(name));
        let of = "(which) => getComputedStyle(document.body)[which].match(/\\d+/g).reduce((sum, x) => sum + +x, 0)";
        let of = |which: &str| format!("({of})('{which}')");
        [of("backgroundColor"), of("color")].map(|which| browser.value(&which).as_u64().unwrap())
    };
    browser.open(&http_address(&server));
    browser.await_text("#events", |text| text.contains("remapped"));
    let [back, text] = brightness(&mut browser, "light");
    assert!(back > 600 && text < 150, "{back} {text}");
    let [back, text] = brightness(&mut browser, "dark");
    assert!(back < 150 && text > 600, "{back} {text}");
    let width = browser.value("document.documentElement.scrollWidth").as_u64().unwrap();
    assert!(width <= 360, "something is {width} px wide");
    // Everything that can be used is reached with Tab, in order.
    let focused = "document.activeElement.id || document.activeElement.dataset.cell || ''";
    let mut seen = Vec::new();
    while seen.last().is_none_or(|last| *last != "0") {
        assert!(seen.len() < 20, "{seen:?}");
        browser.press("Tab", 9, "");
        seen.push(browser.value(focused).as_str().unwrap().to_owned());
        if seen.last().is_some_and(|last| last == "pause") {
            browser.press("Enter", 13, "\r");
            assert_eq!(browser.value("document.activeElement.getAttribute('aria-pressed')"), "true");
            browser.press("Enter", 13, "\r");
            assert_eq!(browser.value("document.activeElement.getAttribute('aria-pressed')"), "false");
        }
    }
    assert!(seen.iter().any(|id| id == "interval") && seen.iter().any(|id| id == "pause"), "{seen:?}");
    browser.press("ArrowRight", 39, "");
    assert_eq!(browser.value(focused), "1");
    assert_ne!(browser.value("getComputedStyle(document.activeElement).stroke"), "none", "the focus is not seen");
    browser.press("PageDown", 34, "");
    browser.await_text("#cell", |text| text.contains("1 remapped and 0 slow blocks, from 1000 to 1007"));
    browser.press("End", 35, "");
    browser.press("PageUp", 33, "");
    browser.await_text("#cell", |text| text.contains("from 1000 to 1007"));
    browser.check_console_is_empty();
}

#[test]
fn the_page_may_load_nothing_and_be_framed_by_nobody() {
    let volume = Volume::create(32, 64);
    let server = volume.serve(&["--http-listen", "127.0.0.1:0"]);
    let address = http_address(&server);
    let (status, answer) = http(&address, "GET", "/", "localhost");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert_eq!(status, 200, "{head}");
    for wanted in [
        "content-type: text/html; charset=utf-8",
        "x-content-type-options: nosniff",
        "cache-control: no-store",
        "content-security-policy: default-src 'none'; style-src 'nonce-",
        "frame-ancestors 'none'",
    ] {
        assert!(head.contains(wanted), "{wanted}: {head}");
    }
    assert!(body.starts_with("<!doctype html>") && body.contains("data-door=\"http\""));
    let (_, status) = http(&address, "GET", "/v1/status", "localhost");
    assert!(status.contains("x-content-type-options: nosniff\r\n"), "{status}");
    assert_eq!(http(&address, "GET", "/", "evil.example").0, 403);
    assert_eq!(http(&address, "POST", "/", "localhost").0, 405);
    let mut socket = std::os::unix::net::UnixStream::connect(&server.ctl).unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let answer = std::io::read_to_string(socket).unwrap();
    assert!(answer.contains("data-door=\"socket\""), "{answer}");
}
