//! Bodies that conditions of routes ask about: `graphql_*` and `post_arg*` in `vars`. They are read before a route is found, up to
//! a bound each, and only for a request that has met a route which asks.

use super::Proxy;
use crate::{
    error::Result,
    exchange::{
        Exchange, RequestBody,
        graphql::{self, Operation},
        posted::{self, Posted},
        vars,
    },
    observe::log::Level,
};

/// Bytes of a JSON body that routes look into: read whole it takes some ten times as much, before anybody has said who asks.
const MAX_JSON: usize = 4 << 20;
/// Characters of a document that cannot be read that its line of error.log shows.
const MAX_SHOWN: usize = 256;

/// What the conditions that were met have asked for and nobody knows yet.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asked {
    pub graphql: bool,
    pub posted: bool,
}

impl Asked {
    /// Notes a variable that is about the body.
    pub fn note(&mut self, x: &Exchange, name: &str) {
        self.graphql |= x.graphql.is_none() && name.starts_with("graphql_");
        self.posted |= x.posted.is_none() && name.starts_with("post_arg");
    }

    pub fn any(self) -> bool {
        self.graphql || self.posted
    }
}

/// Reads what is asked for. What cannot be had is logged and stays unknown: the route that asks does not match.
pub(super) async fn read(p: &Proxy, x: &mut Exchange, asked: Asked) -> Result<()> {
    if asked.graphql {
        let operation = match graphql_text(p, x).await? {
            Ok(text) => parse(x, &text),
            Err(why) => {
                x.log(Level::Error, format!("failed to read graphql data, {why}").as_bytes());
                None
            }
        };
        // Empty: not asked again.
        x.graphql = Some(Box::new(operation.unwrap_or_default()));
    }
    if asked.posted {
        x.posted = Some(Box::new(posted(p, x).await?));
    }
    Ok(())
}

fn parse(x: &Exchange, text: &str) -> Option<Operation> {
    match graphql::parse(text) {
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
async fn graphql_text(p: &Proxy, x: &mut Exchange) -> Result<Result<String, String>> {
    let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if x.request.method == b"GET" {
        let text = vars::arg(&x.request.args, "query").map(posted::unescape);
        return Ok(text.map(|text| lossy(&text)).ok_or("args[query] is nil".to_owned()));
    }
    if x.request.method != b"POST" {
        return Ok(Err(format!("graphql not support `{}` request", lossy(&x.request.method))));
    }
    let body = match body(p, x, p.settings.graphql_max).await? {
        Ok(body) if body.is_empty() => return Ok(Err("request body has zero size".into())),
        Ok(body) => body,
        Err(why) => return Ok(Err(why)),
    };
    if !media_type(x).starts_with("application/json") {
        return Ok(Ok(lossy(&body)));
    }
    let json: serde_json::Value = match serde_json::from_slice(&body) {
        Ok(json) => json,
        Err(e) => return Ok(Err(format!("the body is no JSON: {e}"))),
    };
    Ok(json["query"].as_str().map(str::to_owned).ok_or("json body[query] is nil".to_owned()))
}

async fn posted(p: &Proxy, x: &mut Exchange) -> Result<Posted> {
    let kind = media_type(x);
    let is_form = kind.starts_with("application/x-www-form-urlencoded");
    let (is_json, is_multipart) = (kind.starts_with("application/json"), kind.starts_with("multipart/form-data"));
    if !is_form && !is_json && !is_multipart {
        x.log(Level::Info, format!("no post_arg of a body of unsupported content-type: {kind}").as_bytes());
        return Ok(Posted::Nothing);
    }
    let body = match body(p, x, p.settings.posted_max).await? {
        Ok(body) => body,
        Err(why) => {
            x.log(Level::Error, format!("failed to read the body for post_arg: {why}").as_bytes());
            return Ok(Posted::Nothing);
        }
    };
    if is_form {
        return Ok(posted::form(&body));
    }
    if is_multipart {
        return Ok(posted::multipart(&kind, &body));
    }
    if body.len() > MAX_JSON {
        let line = format!(
            "failed to parse JSON body: {} bytes are more than the {MAX_JSON} that routes look into",
            body.len()
        );
        x.log(Level::Error, line.as_bytes());
        return Ok(Posted::Nothing);
    }
    Ok(match serde_json::from_slice(&body) {
        Ok(json) => Posted::Json(json),
        Err(e) => {
            x.log(Level::Error, format!("failed to parse JSON body: {e}").as_bytes());
            Posted::Nothing
        }
    })
}

fn media_type(x: &Exchange) -> String {
    x.request.headers.get("content-type").map(String::from_utf8_lossy).unwrap_or_default().into_owned()
}

/// The whole body, or why it is not for us. `most`: bytes; one that is longer without having said so is refused, since what was
/// read of it is no request any more. An error is the client's.
async fn body(p: &Proxy, x: &mut Exchange, most: u64) -> Result<Result<Vec<u8>, String>> {
    let too_long = |n: u64| format!("request size {n} is greater than the maximum size {most} allowed");
    if let RequestBody::Streaming { length: Some(n) } = x.body
        && n > most
    {
        return Ok(Err(too_long(n)));
    }
    p.runner.read_body_within(x, most).await?;
    Ok(match &x.body {
        RequestBody::Memory(bytes) if bytes.len() as u64 > most => Err(too_long(bytes.len() as u64)),
        RequestBody::Memory(bytes) => Ok(bytes.to_vec()),
        RequestBody::File { length, .. } if *length > most => Err(too_long(*length)),
        RequestBody::File { path, .. } => {
            tokio::fs::read(&**path).await.map_err(|e| format!("read {}: {e}", path.display()))
        }
        _ => Ok(Vec::new()),
    })
}
