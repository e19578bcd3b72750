//! Bodies that somebody asks about by name: conditions of routes and filters of plugins, and plugins themselves, ask for
//! `graphql_*` and `post_arg*`. What is asked for is learnt once per request, from a body that was read, up to a bound each.

use bytes::Bytes;

use super::{
    Exchange, RequestBody,
    graphql::{self, Operation},
    posted::{self, Posted},
    vars,
};
use crate::observe::log::Level;

/// Bytes of a JSON body that is looked into: read whole it takes some ten times as much, before anybody has said who asks.
const MAX_JSON: usize = 4 << 20;
/// Characters of a document that cannot be read that its line of error.log shows.
const MAX_SHOWN: usize = 256;

/// What is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// `graphql_operation`, `graphql_name`, `graphql_root_fields`
    Graphql,
    /// `post_arg_x`, `post_arg.x`
    Posted,
}

/// What was asked for in vain.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked {
    graphql: bool,
    posted: bool,
}

impl Asked {
    /// Notes a variable that is about a body nobody has looked into.
    pub fn note(&mut self, x: &Exchange, name: &str) {
        match About::of(name) {
            Some(About::Graphql) => self.graphql |= x.graphql.is_none(),
            Some(About::Posted) => self.posted |= x.posted.is_none(),
            None => {}
        }
    }

    /// Whether there is anything.
    pub fn any(self) -> bool {
        self.graphql || self.posted
    }

    /// Each thing that was asked for.
    pub fn each(self) -> impl Iterator<Item = About> {
        [(self.graphql, About::Graphql), (self.posted, About::Posted)]
            .into_iter()
            .filter(|(is, _)| *is)
            .map(|(_, of)| of)
    }
}

impl About {
    /// What a variable of that name is about; `None`: no body.
    pub fn of(name: &str) -> Option<About> {
        match name.as_bytes().first()? {
            b'g' if name.starts_with("graphql_") => Some(About::Graphql),
            b'p' if name.starts_with("post_arg") => Some(About::Posted),
            _ => None,
        }
    }

    /// Whether it was learnt, or there was nothing to learn.
    pub fn is_known(self, x: &Exchange) -> bool {
        match self {
            About::Graphql => x.graphql.is_some(),
            About::Posted => x.posted.is_some(),
        }
    }

    /// Whether the body holds the answer: not where the query does, or the head says that there is none.
    pub fn is_in_body(self, x: &Exchange) -> bool {
        match self {
            About::Graphql => x.request.method == b"POST",
            About::Posted => Encoding::of(&media_type(x)).is_some(),
        }
    }

    /// Learns it from the whole body, or from why that cannot be had. What cannot be read is logged and stays empty.
    pub fn learn(self, x: &mut Exchange, body: Result<Bytes, String>) {
        match self {
            // Empty: not asked again.
            About::Graphql => x.graphql = Some(Box::new(operation(x, body).unwrap_or_default())),
            About::Posted => x.posted = Some(Box::new(fields(x, body))),
        }
    }
}

/// Another body has taken the place of the one that was looked into: who asks now has it learnt anew.
pub fn forget(x: &mut Exchange) {
    x.graphql = None;
    x.posted = None;
}

/// Why a body of so many bytes is not looked into.
pub fn too_long(length: u64, most: u64) -> String {
    format!("request size {length} is greater than the maximum size {most} allowed")
}

/// The body that was read, if it has at most so many bytes; a file is for the caller to read. `None`: it is with the client still,
/// or was given away.
pub fn read_body(body: &RequestBody, most: u64) -> Option<Result<BodyText<'_>, String>> {
    let (length, text) = match body {
        RequestBody::None => (0, BodyText::Here(Bytes::new())),
        RequestBody::Memory(bytes) => (bytes.len() as u64, BodyText::Here(bytes.clone())),
        RequestBody::File { path, length } => (*length, BodyText::At(path)),
        RequestBody::Streaming { length: Some(n) } if *n > most => (*n, BodyText::Here(Bytes::new())),
        _ => return None,
    };
    Some(if length > most { Err(too_long(length, most)) } else { Ok(text) })
}

/// Where the text of a body is.
pub enum BodyText<'a> {
    Here(Bytes),
    At(&'a std::path::Path),
}

fn operation(x: &Exchange, body: Result<Bytes, String>) -> Option<Operation> {
    let text = match graphql_text(x, body) {
        Ok(text) => text,
        Err(why) => {
            x.log(Level::Error, format!("failed to read graphql data, {why}").as_bytes());
            return None;
        }
    };
    match graphql::parse(&text) {
        Ok(operation) => {
            if operation.others {
                x.log(Level::Error, b"Multiple operations are not supported; the first one counts");
            }
            Some(operation)
        }
        Err(e) => {
            let start: String = text.chars().take(MAX_SHOWN).collect();
            let line =
                format!("failed to parse graphql: Syntax error near line {} body: {}", e.line, start.escape_debug());
            x.log(Level::Error, line.as_bytes());
            None
        }
    }
}

/// The document: of the query's `query` with GET, of JSON's `query`, or the body itself.
fn graphql_text(x: &Exchange, body: Result<Bytes, String>) -> Result<String, String> {
    let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if x.request.method == b"GET" {
        let text = vars::arg(&x.request.args, "query").map(posted::unescape);
        return text.map(|text| lossy(&text)).ok_or("args[query] is nil".to_owned());
    }
    if x.request.method != b"POST" {
        return Err(format!("graphql not support `{}` request", lossy(&x.request.method)));
    }
    let body = body?;
    if body.is_empty() {
        return Err("request body has zero size".into());
    }
    if !media_type(x).starts_with("application/json") {
        return Ok(lossy(&body));
    }
    let json: serde_json::Value = serde_json::from_slice(&body).map_err(|e| format!("the body is no JSON: {e}"))?;
    json["query"].as_str().map(str::to_owned).ok_or("json body[query] is nil".to_owned())
}

/// How a body says its names.
enum Encoding {
    Form,
    Json,
    Multipart,
}

impl Encoding {
    fn of(media_type: &str) -> Option<Encoding> {
        let known = [
            ("application/x-www-form-urlencoded", Encoding::Form),
            ("application/json", Encoding::Json),
            ("multipart/form-data", Encoding::Multipart),
        ];
        known.into_iter().find(|(name, _)| media_type.starts_with(name)).map(|(_, encoding)| encoding)
    }
}

fn fields(x: &Exchange, body: Result<Bytes, String>) -> Posted {
    let kind = media_type(x);
    let Some(encoding) = Encoding::of(&kind) else {
        x.log(Level::Info, format!("no post_arg of a body of unsupported content-type: {kind}").as_bytes());
        return Posted::Nothing;
    };
    let body = match body {
        Ok(body) => body,
        Err(why) => {
            x.log(Level::Error, format!("failed to read the body for post_arg: {why}").as_bytes());
            return Posted::Nothing;
        }
    };
    match encoding {
        Encoding::Form => posted::form(&body),
        Encoding::Multipart => posted::multipart(&kind, &body),
        Encoding::Json => match json(&body) {
            Ok(json) => Posted::Json(json),
            Err(why) => {
                x.log(Level::Error, format!("failed to parse JSON body: {why}").as_bytes());
                Posted::Nothing
            }
        },
    }
}

fn json(body: &[u8]) -> Result<serde_json::Value, String> {
    if body.len() > MAX_JSON {
        return Err(format!("{} bytes are more than the {MAX_JSON} that are looked into", body.len()));
    }
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

fn media_type(x: &Exchange) -> String {
    x.request.headers.get("content-type").map(String::from_utf8_lossy).unwrap_or_default().into_owned()
}
