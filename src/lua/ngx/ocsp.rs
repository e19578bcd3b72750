//! What `ngx.ocsp` stands on: the pure functions of `tls::ocsp` with today's clock.

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack},
        host::Answer,
    },
    tls::ocsp,
};

use super::time::now_ms;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let doc = "responder(chain in DER) -> its URL | nil without one | nil, err";
    api.func("native.ocsp.responder", any, doc, |s| match ocsp::responder_url(s.arg_bytes(1)?) {
        Ok(Some(url)) => Ok(s.push_bytes(url)),
        Ok(None) => Ok(s.push_nil()),
        Err(refusal) => s.fail(refusal.to_string()),
    })?;
    api.func("native.ocsp.request", any, "request(chain in DER) -> bytes | nil, err", |s| {
        match ocsp::request(s.arg_bytes(1)?) {
            Ok(request) => Ok(s.push_bytes(request)),
            Err(refusal) => s.fail(refusal.to_string()),
        }
    })?;
    let doc = "validate(response, chain in DER) -> true, the next update in seconds since the epoch or nil | nil, err";
    api.func("native.ocsp.validate", any, doc, validate)
}

fn validate(s: &Stack) -> Answer {
    match ocsp::validate(s.arg_bytes(1)?, s.arg_bytes(2)?, (now_ms() / 1000) as i64) {
        Ok(next_update) => {
            s.push_bool(true);
            next_update.map_or_else(|| s.push_nil(), |at| s.push_number(at as f64));
            Ok(2)
        }
        Err(refusal) => s.fail(refusal.to_string()),
    }
}
