//! `ngx.now`, `ngx.http_time` and their like. The clock is read each time, so `ngx.update_time` has nothing to do.

use std::{
    ffi::c_void,
    time::{SystemTime, UNIX_EPOCH},
};

use chrono::{Local, NaiveDateTime, TimeZone, Utc};

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Stack},
        host::Answer,
    },
};

/// Milliseconds since the epoch.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_millis() as u64)
}

crate::export! {
    fn time_now() -> f64, 0.0 => {
        // Milliseconds are what nginx gives.
        now_ms() as f64 / 1000.0
    }
}

crate::export! {
    fn time_monotonic() -> f64, 0.0 => {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the clock exists on every Linux, and the place is the kernel's to fill.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
        time.tv_sec as f64 * 1000.0 + (time.tv_nsec / 1_000_000) as f64
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let doc = "seconds since the epoch, with milliseconds";
    api.fast("now", "double (void)", any, doc, time_now as *const c_void)?;
    let doc = "milliseconds since the machine was started";
    api.fast("monotonic", "double (void)", any, doc, time_monotonic as *const c_void)?;
    api.func("ngx.today", any, "today(): local date, yyyy-mm-dd", |s| local(s, "%Y-%m-%d"))?;
    api.func("ngx.localtime", any, "localtime(): yyyy-mm-dd hh:mm:ss", |s| local(s, "%Y-%m-%d %H:%M:%S"))?;
    api.func("ngx.utctime", any, "utctime(): yyyy-mm-dd hh:mm:ss", |s| {
        Ok(s.push_bytes(Utc::now().format("%Y-%m-%d %H:%M:%S").to_string()))
    })?;
    api.func("ngx.cookie_time", any, "cookie_time(sec): Thu, 18-Nov-10 11:27:35 GMT", |s| {
        at(s, "%a, %d-%b-%y %T GMT")
    })?;
    api.func("ngx.http_time", any, "http_time(sec): Thu, 18 Nov 2010 11:27:35 GMT", |s| at(s, "%a, %d %b %Y %T GMT"))?;
    api.func("ngx.parse_http_time", any, "parse_http_time(text): seconds, or nil", parse)
}

fn local(s: &Stack, format: &str) -> Answer {
    Ok(s.push_bytes(Local::now().format(format).to_string()))
}

fn at(s: &Stack, format: &str) -> Answer {
    let secs = s.number(1).ok_or("number argument only")? as i64;
    match Utc.timestamp_opt(secs, 0).single() {
        Some(time) => Ok(s.push_bytes(time.format(format).to_string())),
        None => Err(s.argument_error(1, "time out of range")),
    }
}

/// The three forms of RFC 9110, 5.6.7, and the one of cookies.
fn parse(s: &Stack) -> Answer {
    const FORMS: [&str; 4] = ["%a, %d %b %Y %T GMT", "%A, %d-%b-%y %T GMT", "%a, %d-%b-%y %T GMT", "%a %b %e %T %Y"];
    let text = s.bytes(1).map(String::from_utf8_lossy).ok_or("string argument only")?;
    match FORMS.iter().find_map(|form| NaiveDateTime::parse_from_str(text.trim(), form).ok()) {
        Some(time) => Ok(s.push_number(time.and_utc().timestamp() as f64)),
        None => Ok(s.push_nil()),
    }
}

#[cfg(test)]
mod tests {
    use crate::lua::host::tests::check;

    #[test]
    fn formats_and_parses_dates() {
        for (lua, expected) in [
            ("ngx.http_time(1290079655)", "Thu, 18 Nov 2010 11:27:35 GMT"),
            ("ngx.cookie_time(1290079655)", "Thu, 18-Nov-10 11:27:35 GMT"),
            ("ngx.parse_http_time('Thu, 18 Nov 2010 11:27:35 GMT')", "1290079655"),
            ("ngx.parse_http_time('nonsense')", "nil"),
            ("ngx.now() > 1.7e9 and ngx.time() == math.floor(ngx.time()) and #ngx.today() == 10", "true"),
        ] {
            check(&format!("return tostring({lua})"), expected);
        }
    }
}
