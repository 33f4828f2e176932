//! What the fuzz targets run, as a library: see `harness`.

mod harness;

/// See `harness`.
pub fn chains(data: &[u8]) {
    harness::chains(data);
}

/// See `harness`.
pub fn metadata(data: &[u8]) {
    harness::metadata(data);
}

/// See `harness`.
pub fn messages(data: &[u8]) {
    harness::messages(data);
}

/// See `harness`.
pub fn control(data: &[u8]) {
    harness::control(data);
}
