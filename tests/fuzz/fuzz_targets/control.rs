#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vhost_remap_fuzz::control(data));
