//! OCSP: certificate chains and responses, one behind the other: never a panic, and a request is a DER sequence that names its chain.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moongate::tls::ocsp;

fuzz_target!(|data: &[u8]| {
    let (first, rest) = data.split_at(data.len() / 2);
    for chain in [data, first, rest] {
        let request = ocsp::request(chain);
        assert_eq!(request.is_ok(), ocsp::responder_url(chain).is_ok());
        assert!(request.is_err() || request.is_ok_and(|request| request.starts_with(&[0x30])));
    }
    let _ = (ocsp::validate(first, rest, 0), ocsp::validate(rest, first, 0));
});
