//! The page at `/`: one file for a browser, which asks the other routes and shows what they say.
//!
//! It shows what others wrote (paths of devices, causes of events), so it may load and run nothing but its own style
//! and script, each marked with a number that is never used twice (Content Security Policy 3, §2.3.1), and talk to
//! nobody but this server.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use uuid::Uuid;

const PAGE: &str = include_str!("page/page.html");
const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

/// Over a port that anybody may read.
pub(super) async fn over_http() -> Response {
    page("http")
}

/// Over the control socket.
pub(super) async fn over_socket() -> Response {
    page("socket")
}

fn page(door: &str) -> Response {
    let nonce = Uuid::new_v4().simple().to_string();
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let head = PAGE.replace("DOOR", door).replace("NONCE", &nonce);
    let text = head.replace("STYLE", STYLE).replace("SCRIPT", SCRIPT);
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, policy.as_str()),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    fn fetched(response: Response) -> (String, String) {
        let policy = response.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap().to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let body = runtime.block_on(to_bytes(response.into_body(), 1 << 20)).unwrap();
        (policy, String::from_utf8(body.into()).unwrap())
    }

    #[test]
    fn style_and_script_are_inside_and_marked_as_the_policy_wants_them() {
        let (policy, text) = fetched(page("http"));
        let nonce = policy.split_once("script-src 'nonce-").unwrap().1.split_once('\'').unwrap().0;
        assert!(nonce.len() >= 32 && policy.starts_with("default-src 'none'; "), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        for tag in ["style", "script"] {
            assert_eq!(text.matches(&format!("<{tag}")).count(), 1);
            assert!(text.contains(&format!("<{tag} nonce=\"{nonce}\">")), "{tag}");
        }
        assert!(text.contains("data-door=\"http\"") && text.contains(STYLE) && text.contains(SCRIPT));
        for placeholder in ["DOOR", "NONCE", ">STYLE", ">SCRIPT"] {
            assert!(!text.contains(placeholder), "{placeholder}");
        }
        let (other, _) = fetched(page("socket"));
        assert_ne!(other, policy, "a number that is used twice can be foreseen");
    }

    #[test]
    fn the_page_asks_nobody_else_and_makes_markup_of_nothing() {
        let (_, text) = fetched(page("socket"));
        let elsewhere = text.replace("\"http://www.w3.org/2000/svg\"", "");
        for part in ["http:", "https:", "//cdn", "@import", "url(", " src=", "innerHTML", "outerHTML", "insertAdjacent"]
        {
            assert!(!elsewhere.contains(part), "{part}");
        }
        for part in ["document.write", "eval(", "Function(", " style=\"", " onclick", " onload"] {
            assert!(!elsewhere.contains(part), "{part}");
        }
    }
}
