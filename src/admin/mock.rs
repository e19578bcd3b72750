//! Requests and answers that are made up, for plugins and functions on trial, from JSON; and how many are on trial at once.

use ::http::{HeaderName, HeaderValue, Method};
use bytes::Bytes;
use serde_json::Value;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::http::{self, Answer};
use crate::plugin::{MockRequest, MockResponse};

type Outcome<T = Answer> = Result<T, Answer>;

/// Trials of a kind at once: each may keep a processor busy for as long as scripts may.
const TRIALS: usize = 2;
/// When to ask again, in seconds: most trials take milliseconds, a slow one ten or sixty.
const RETRY_AFTER: &str = "5";

/// Places for what is on trial.
pub(super) struct Places {
    free: Semaphore,
    what: &'static str,
}

pub(super) static PLUGINS: Places = Places::of("plugins");
pub(super) static FUNCTIONS: Places = Places::of("functions");

impl Places {
    const fn of(what: &'static str) -> Places {
        Places { free: Semaphore::const_new(TRIALS), what }
    }

    /// One of them, or 503.
    pub fn take(&'static self) -> Outcome<SemaphorePermit<'static>> {
        self.free.try_acquire().map_err(|_| {
            let text = format!("{TRIALS} {} are on trial already: try again later", self.what);
            Answer::refuse(503, text).header("retry-after", RETRY_AFTER)
        })
    }
}

fn wrong(property: &str, why: &str) -> Answer {
    Answer::refuse(400, format!("property \"{property}\" validation failed: {why}"))
}

fn text_of<'v>(value: &'v Value, property: &str, default: &'v str) -> Outcome<&'v str> {
    match value.get(property) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(wrong(property, "expected a string")),
    }
}

/// `method`, `uri`, `headers` and `body`: all may be left out.
pub(super) fn request(asked: &Value) -> Outcome<MockRequest> {
    let method = text_of(asked, "method", "GET")?;
    Method::from_bytes(method.as_bytes()).map_err(|_| wrong("method", "no HTTP method"))?;
    let uri = text_of(asked, "uri", "/")?;
    if !uri.starts_with('/') || uri.bytes().any(|b| b <= b' ' || b == 0x7f) {
        return Err(wrong("uri", "expected a path that starts with /, encoded"));
    }
    let (path, args) = uri.split_once('?').unwrap_or((uri, ""));
    Ok(MockRequest {
        method: method.into(),
        target: uri.into(),
        path: http::decode_path(path).into(),
        args: args.into(),
        headers: headers_of(asked)?,
        body: Bytes::from(text_of(asked, "body", "")?.to_owned()),
    })
}

/// `status`, `headers` and `body`: all may be left out.
pub(super) fn response(asked: &Value) -> Outcome<MockResponse> {
    let status = match asked.get("status") {
        None | Some(Value::Null) => 200,
        Some(status) => match status.as_u64().and_then(|n| u16::try_from(n).ok()).filter(|n| (200..=599).contains(n)) {
            Some(status) => status,
            None => return Err(wrong("upstream.status", "expected a number from 200 to 599")),
        },
    };
    let body = Bytes::from(text_of(asked, "body", "")?.to_owned());
    Ok(MockResponse { status, headers: headers_of(asked)?, body })
}

/// `{"X-A": "1", "X-B": ["2", "3"]}`
fn headers_of(asked: &Value) -> Outcome<Vec<(String, String)>> {
    let given = match asked.get("headers") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(given)) => given,
        Some(_) => return Err(wrong("headers", "expected an object")),
    };
    let mut headers = Vec::new();
    for (name, value) in given {
        HeaderName::from_bytes(name.as_bytes()).map_err(|_| wrong("headers", &format!("{name:?} is no name")))?;
        let values = match value {
            Value::Array(values) => values.as_slice(),
            one => std::slice::from_ref(one),
        };
        for value in values {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Number(n) => n.to_string(),
                _ => return Err(wrong("headers", &format!("{name}: expected a string"))),
            };
            HeaderValue::from_str(&text).map_err(|_| wrong("headers", &format!("{name}: no field value")))?;
            headers.push((name.clone(), text));
        }
    }
    Ok(headers)
}
