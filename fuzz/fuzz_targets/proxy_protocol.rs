//! PROXY protocol headers: never a panic, and never more bytes taken than there are.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moongate::net::proxy_protocol::parse;

fuzz_target!(|data: &[u8]| {
    if let Ok(Some(header)) = parse(data) {
        assert!(header.len <= data.len());
        assert_eq!(parse(&data[..header.len]), Ok(Some(header)));
    }
});
