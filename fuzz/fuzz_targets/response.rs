//! Response heads: never a panic, the end is where the scan finds it, and what is accepted can be sent on as it is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moongate::{
    exchange::{Response, framing::HeadScan},
    upstream::response::{self, LIMITS},
};

fuzz_target!(|data: &[u8]| {
    let mut read = Response::default();
    let Ok(Some((_, len))) = response::parse(data, false, &mut read) else { return };
    if len <= LIMITS.line {
        assert_eq!(HeadScan::default().next(data, LIMITS), Ok(Some(len)));
    }
    assert!(!read.reason.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)));
    let mut out = Vec::new();
    let lines = read.headers.write_to(&mut out, |_, _| true);
    assert_eq!(out.iter().filter(|b| **b == b'\n').count(), lines);
    assert_eq!(out.iter().filter(|b| **b == b'\r').count(), lines);
});
