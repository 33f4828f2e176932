//! The `vhost-remap` program: see `vhost-remap --help`.

fn main() {
    println!("vhost-remap {}", env!("CARGO_PKG_VERSION"));
}
