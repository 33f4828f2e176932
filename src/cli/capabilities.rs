//! `--print-capabilities` of the vhost-user backend program conventions.

use std::ffi::OsString;

/// What a management layer reads (QEMU, docs/interop/vhost-user.json): the type and the optional options
/// `--read-only` and `--blk-file`.
pub const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// Whether the arguments ask for them. All other options are ignored then, even wrong ones, so this
/// looks before they are parsed.
pub fn asked_for(argv: &[OsString]) -> bool {
    let serving = argv.get(1).is_some_and(|first| first == "serve" || first.as_encoded_bytes().starts_with(b"-"));
    serving && argv.iter().skip(1).take_while(|arg| *arg != "--").any(|arg| arg == "--print-capabilities")
}
