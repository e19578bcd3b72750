//! Request heads: never a panic, and what is accepted holds what the rest of the gateway relies on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moongate::{
    exchange::{
        LastHost, Request,
        framing::{HeadLimits, HeadScan},
    },
    net::head,
};

const LIMITS: HeadLimits = HeadLimits { line: 8 * 1024, total: 32 * 1024 };

fuzz_target!(|data: &[u8]| {
    let whole = HeadScan::default().next(data, LIMITS);
    // Cut anywhere, the scan says the same.
    let mut scan = HeadScan::default();
    let halves = scan.next(&data[..data.len() / 2], LIMITS).and_then(|end| match end {
        Some(end) => Ok(Some(end)),
        None => scan.next(data, LIMITS),
    });
    assert_eq!(whole, halves);
    // The parser finds the end itself, in what ends with an empty line: it is where the scan finds it, and what the scan refuses
    // is refused.
    if data.ends_with(b"\r\n\r\n") && data[0].is_ascii_uppercase() && data.len() <= LIMITS.line {
        let mut guessed = Request::default();
        if head::parse(data, &LastHost::default(), &mut guessed).is_ok() {
            assert_eq!(whole, Ok(Some(guessed.head_len as usize)));
        }
    }
    let Ok(Some(end)) = whole else { return };
    let (last, mut request) = (LastHost::default(), Request::default());
    if head::parse(&data[..end], &last, &mut request).is_err() {
        return;
    }
    // A second one on the connection is read in the same way.
    let mut again = Request::default();
    assert!(head::parse(&data[..end], &last, &mut again).is_ok());
    assert_eq!(again.host, request.host);
    assert_eq!(request.head_len as usize, end);
    assert!(request.path == b"*" || request.path.starts_with(b"/"));
    assert!(!request.path.windows(2).any(|w| w == b"//") && !request.path.contains(&0));
    assert!(request.path.split(|b| *b == b'/').all(|s| s != b"." && s != b".."));
    assert!(!request.host.iter().any(|b| b.is_ascii_uppercase() || b.is_ascii_whitespace()));
    for (name, value) in request.headers.iter() {
        assert!(!name.is_empty() && !value.iter().any(|b| matches!(b, b'\r' | b'\n' | 0)));
    }
});
