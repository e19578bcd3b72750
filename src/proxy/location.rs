//! Requests that a location of config.yaml serves: its scripts in nginx's order, and what answers.

use std::{
    rc::{Rc, Weak},
    sync::Arc,
};

use super::{
    Proxy, capture, files,
    forward::servers::{Named, forward_to},
    head, request, rescue,
};
use crate::{
    conf::locations::{Content, Flag, Location, Pattern, Rewrite, Template},
    error::{Error, Kind, Result},
    exchange::{
        BodyLength, Exchange, Jump, Phase, Version,
        host::{Answered, Doing, Host, Sending, Subrequest},
    },
    location::Chosen,
    plugin::{Flow, PhaseMask, output},
};

/// Locations that one request may go through, as in nginx.
const MAX_JUMPS: u32 = 10;

/// Serves the request, if a location is there for its path; says whether one was.
pub(super) async fn serve(p: &Rc<Proxy>, x: &mut Exchange) -> bool {
    let Some(chosen) = choose(p, x) else { return false };
    x.lua.host = Some(host(p));
    if let Err(e) = enter(p, x, chosen).await {
        failed(p, x, e).await;
    }
    let phases = PhaseMask(x.lua.phases);
    request::end(p, x, phases).await;
    true
}

async fn failed(p: &Proxy, x: &mut Exchange, e: Error) {
    let exit = x.filter_exit.take().filter(|_| !x.response.head_sent);
    let ended = match exit {
        Some(status) => end_by_filter(p, x, status).await,
        None if x.response.ended => Ok(()),
        None => {
            rescue::answer(p, x, e).await;
            Ok(())
        }
    };
    if let (Err(_), Some(client)) = (ended, &mut x.client) {
        client.abort();
    }
}

/// Serves a subrequest; its answer stands in the exchange and with its client.
pub(super) async fn serve_child(p: &Rc<Proxy>, x: &mut Exchange) {
    x.lua.host = Some(host(p));
    let chosen = choose(p, x);
    let served = match (chosen, p.locations.rest()) {
        (Some(chosen), _) => Box::pin(run(p, x, chosen)).await,
        (None, Some(rest)) => serve_rest(p, x, rest).await,
        (None, None) => not_found(p, x).await,
    };
    if let Err(e) = served {
        failed(p, x, e).await;
    }
    if x.location.as_ref().is_some_and(|l| l.directives.log_subrequest) {
        x.phase = Phase::Log;
        p.runner.log(x).await;
    }
    x.lua.run = None;
}

/// What neither a location nor a route is for is looked up under the root, as nginx does.
pub(super) async fn serve_rest(p: &Proxy, x: &mut Exchange, location: &Arc<Location>) -> Result<()> {
    p.runner.enter_location(x, location.clone());
    match p.locations.is_folder(&x.request.path) {
        true => to_folder(p, x).await,
        false => files::serve(p, x, location).await,
    }
}

/// Sends the client to the same path with a slash.
pub(super) async fn to_folder(p: &Proxy, x: &mut Exchange) -> Result<()> {
    let mut target = Vec::new();
    if x.depth == 0 {
        // Absolute, with the port that the client has reached.
        let (scheme, default) = if x.conn.tls.is_some() { ("https", 443) } else { ("http", 80) };
        target.extend_from_slice(format!("{scheme}://").as_bytes());
        target.extend_from_slice(&x.request.host);
        let port = x.conn.local.port();
        if port != default {
            target.extend_from_slice(format!(":{port}").as_bytes());
        }
    }
    head::escape_path(&x.request.path, &mut target);
    target.push(b'/');
    if !x.request.args.is_empty() {
        target.push(b'?');
        target.extend_from_slice(&x.request.args);
    }
    x.response.headers.set("Location", &target);
    rescue::page(p, x, 301);
    output::answer(x, &p.runner).await
}

fn choose(p: &Proxy, x: &Exchange) -> Option<Chosen> {
    p.locations.choose(&x.request.path)
}

/// The proxy, as scripts reach it.
pub(super) fn host(p: &Rc<Proxy>) -> Rc<dyn Host> {
    p.host.get_or_init(|| Rc::new(Serving(Rc::downgrade(p)))).clone()
}

/// Weak, since the proxy keeps it; a request that runs keeps the proxy.
struct Serving(Weak<Proxy>);

impl Host for Serving {
    fn send<'a>(&'a self, x: &'a mut Exchange, what: Sending) -> Doing<'a, Result<()>> {
        let p = self.0.upgrade();
        Box::pin(async move {
            match p {
                Some(p) => send(&p, x, what).await,
                None => Err(Error::internal(Kind::Closed)),
            }
        })
    }

    fn subrequests(&self, x: &Exchange, list: Vec<Subrequest>) -> Doing<'static, Answered> {
        match self.0.upgrade() {
            Some(p) => capture::run(p, x, list),
            None => Box::pin(std::future::ready(Answered::default())),
        }
    }
}

/// Sends what scripts have printed so far.
async fn send(p: &Proxy, x: &mut Exchange, what: Sending) -> Result<()> {
    if x.response.ended {
        return Ok(());
    }
    if !x.response.head_sent && settle_head(p, x).await? {
        return Ok(());
    }
    if what == Sending::Head {
        return Ok(());
    }
    body(p, x, what == Sending::End).await?;
    match what {
        Sending::End => output::finish(x).await,
        _ => output::flush(x).await,
    }
}

/// Settles the head; says whether that was all of the response.
async fn settle_head(p: &Proxy, x: &mut Exchange) -> Result<bool> {
    if x.response.status == 0 {
        x.response.status = 200;
    }
    if x.location.is_none() {
        // A plugin's own answer has the length that it has, whatever it copied.
        x.response.headers.remove("content-length");
    }
    default_type(x);
    x.response.headers.set("Server", &p.settings.server);
    add_headers(x);
    if is_known_already(x) {
        x.response.status = 304;
        x.response.headers.remove("content-length");
        x.printed.clear();
    }
    if let BodyLength::Known(n) = length(x) {
        x.response.headers.set("Content-Length", n.to_string());
    }
    let filtered = output::filter_head(x, &p.runner).await;
    if let Some(status) = x.filter_exit.take() {
        end_by_filter(p, x, status).await?;
        return Ok(true);
    }
    if let Err(e) = filtered {
        // nginx has no answer left then, and says nothing.
        if let Some(client) = &mut x.client {
            client.abort();
        }
        x.response.ended = true;
        return Err(e);
    }
    let length = length(x);
    output::send_head(x, length)?;
    Ok(false)
}

/// A header filter has ended the response with a status: what it was goes.
async fn end_by_filter(p: &Proxy, x: &mut Exchange, status: u16) -> Result<()> {
    x.response.status = status;
    x.printed.clear();
    for about_the_body in ["content-length", "content-encoding", "last-modified", "etag"] {
        x.response.headers.remove(about_the_body);
    }
    if status >= 300 && status != 444 {
        rescue::page(p, x, status);
    }
    output::plain(x).await
}

/// The client has what would be sent (RFC 9110, 13.1.3), as exactly as nginx asks.
fn is_known_already(x: &Exchange) -> bool {
    let since = x.request.headers.get("if-modified-since");
    x.depth == 0
        && !x.response.bypasses_if
        && x.response.status == 200
        && since.is_some()
        && since == x.response.headers.get("last-modified")
}

/// `add_header name value [always]`
pub(super) fn add_headers(x: &mut Exchange) {
    let Some(location) = x.location.clone() else { return };
    let usual = matches!(x.response.status, 200 | 201 | 204 | 206 | 301 | 302 | 303 | 304 | 307 | 308);
    for added in &location.directives.add_header {
        if usual || added.always {
            let mut text = Vec::new();
            x.fill(&added.value, &mut text);
            x.response.headers.append(&*added.name, &text);
        }
    }
}

/// What was printed, through the body filters.
async fn body(p: &Proxy, x: &mut Exchange, eof: bool) -> Result<()> {
    std::mem::swap(&mut x.chunk.data, &mut x.printed);
    x.printed.clear();
    x.chunk.eof = eof;
    match output::remaining_length(x) {
        BodyLength::None => x.chunk.data.clear(),
        // A client that was promised so much gets no more.
        BodyLength::Known(n) => x.chunk.data.truncate(n.saturating_sub(x.body_bytes_sent) as usize),
        BodyLength::Unknown => {}
    }
    output::chunk(x, &p.runner).await
}

/// What the server does first, then the locations.
async fn enter(p: &Proxy, x: &mut Exchange, chosen: Chosen) -> Result<()> {
    let Some(script) = &p.server_rewrite else { return run(p, x, chosen).await };
    p.runner.enter_location(x, chosen.location.clone());
    match p.runner.script(x, script, Phase::ServerRewrite).await {
        // Its path may be another one now.
        Flow::Next | Flow::Jump => {
            x.jump = None;
            let chosen = choose(p, x).unwrap_or(chosen);
            run(p, x, chosen).await
        }
        flow => finish(p, x, flow).await,
    }
}

/// From location to location, until one answers.
async fn run(p: &Proxy, x: &mut Exchange, chosen: Chosen) -> Result<()> {
    let mut next = Some(chosen);
    loop {
        let Some(Chosen { location, captures }) = next else { return not_found(p, x).await };
        if location.internal && !x.internal {
            return not_found(p, x).await;
        }
        for (name, value) in captures {
            set(x, &name, value);
        }
        p.runner.enter_location(x, location.clone());
        let flow = phases(p, x, &location).await?;
        if flow != Flow::Jump {
            return finish(p, x, flow).await;
        }
        x.jumps += 1;
        if x.jumps > MAX_JUMPS {
            let path = String::from_utf8_lossy(&x.request.path);
            let what = format!("rewrite or internal redirection cycle while processing \"{path}\"");
            return Err(Error::internal(Kind::Other).context(what));
        }
        next = jump(p, x);
    }
}

/// Goes where a script sent the request.
fn jump(p: &Proxy, x: &mut Exchange) -> Option<Chosen> {
    match x.jump.take()? {
        Jump::Again => {
            p.runner.forget_location(x);
            choose(p, x)
        }
        Jump::Exec { path, args } => {
            x.internal = true;
            x.request.path = path;
            x.request.args = args.unwrap_or_default();
            x.request.uri_changed = true;
            p.runner.forget_location(x);
            choose(p, x)
        }
        Jump::Named(name) => {
            x.internal = true;
            let location = p.locations.named(&name)?;
            Some(Chosen { location, captures: Vec::new() })
        }
    }
}

async fn phases(p: &Proxy, x: &mut Exchange, location: &Arc<Location>) -> Result<Flow> {
    for (name, value) in &location.set {
        let mut text = Vec::new();
        x.fill(value, &mut text);
        set(x, name, text);
    }
    for one in &location.set_by_lua {
        let value = p.runner.set_by_lua(x, one).await?;
        set(x, &one.var, value);
    }
    if location.directives.lua_need_request_body {
        p.runner.read_body(x).await?;
    }
    if let Some(flow) = rewrite(p, x, location).await? {
        return Ok(flow);
    }
    for (script, phase) in [
        (&location.rewrite, Phase::RewriteByLua),
        (&location.access, Phase::Access),
        (&location.precontent, Phase::Precontent),
    ] {
        if phase == Phase::Access && x.depth == 0 && is_denied(x, location) {
            rescue::page(p, x, 403);
            output::answer(x, &p.runner).await?;
            return Ok(Flow::Sent);
        }
        // A subrequest is as welcome as the request that made it.
        let Some(script) = script.as_ref().filter(|_| phase != Phase::Access || x.depth == 0) else { continue };
        let flow = p.runner.script(x, script, phase).await;
        if flow != Flow::Next {
            return Ok(flow);
        }
    }
    x.phase = Phase::Content;
    match &location.content {
        Content::Lua(script) => Ok(p.runner.script(x, script, Phase::Content).await),
        Content::Return { status, body } => {
            let mut text = Vec::new();
            x.fill(body, &mut text);
            returned(p, x, *status, text).await?;
            Ok(Flow::Sent)
        }
        Content::Proxy(target) => {
            proxy(p, x, location, target).await?;
            Ok(Flow::Sent)
        }
        Content::Nothing => {
            files::serve(p, x, location).await?;
            Ok(Flow::Sent)
        }
    }
}

fn set(x: &mut Exchange, name: &str, value: Vec<u8>) {
    // What nginx does not let change, it does not let a configuration set either.
    let _ = x.set_var(name, &value);
}

async fn finish(p: &Proxy, x: &mut Exchange, flow: Flow) -> Result<()> {
    match flow {
        Flow::Sent | Flow::Jump => Ok(()),
        Flow::Close if x.depth > 0 => {
            x.response.status = 500;
            Ok(())
        }
        Flow::Close => {
            if let Some(client) = &mut x.client {
                client.abort();
            }
            Ok(())
        }
        // A script that ends has answered; one that exits with a status may have left the words to nginx.
        Flow::Next => send(p, x, Sending::End).await,
        Flow::Answer => answer(p, x).await,
    }
}

/// `rewrite regex replacement [flag]`, each of them in turn. `None`: the request goes on here.
async fn rewrite(p: &Proxy, x: &mut Exchange, location: &Location) -> Result<Option<Flow>> {
    if location.rewrites.is_empty() {
        return Ok(None);
    }
    let before = x.request.path.clone();
    for rule in &location.rewrites {
        let Some((mut path, args)) = replacement(x, rule) else { continue };
        if let Flag::Redirect(status) = rule.flag {
            if let Some(args) = args {
                path.push(b'?');
                path.extend_from_slice(&args);
            }
            returned(p, x, status, path).await?;
            return Ok(Some(Flow::Sent));
        }
        change_target(x, path, args);
        match rule.flag {
            Flag::Break => return Ok(None),
            Flag::Last => return Ok(Some(look_again(x))),
            Flag::None | Flag::Redirect(_) => {}
        }
    }
    // Without a flag the last one ends like `last`: the path is not the one that the location was chosen for.
    Ok((x.request.path != before).then(|| look_again(x)))
}

fn look_again(x: &mut Exchange) -> Flow {
    x.jump = Some(Jump::Again);
    Flow::Jump
}

/// What a rule makes of the path, if it is for it: a path and arguments. Its captures become `$1` and on.
fn replacement(x: &mut Exchange, rule: &Rewrite) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let found = rule.regex.captures(&x.request.path).ok().flatten()?;
    let groups: Vec<_> = (1..10).filter_map(|at| Some((at, found.get(at)?.as_bytes().to_vec()))).collect();
    for (at, value) in groups {
        set(x, &at.to_string(), value);
    }
    let filled = |template: &Template| {
        let mut text = Vec::new();
        x.fill(template, &mut text);
        text
    };
    Some((filled(&rule.path), rule.args.as_ref().map(filled)))
}

/// The request's own arguments stay behind those of the target.
fn change_target(x: &mut Exchange, path: Vec<u8>, args: Option<Vec<u8>>) {
    if let Some(mut args) = args {
        if !args.is_empty() && !x.request.args.is_empty() {
            args.push(b'&');
            args.extend_from_slice(&x.request.args);
        }
        x.request.args = args;
    }
    x.request.path = path;
    x.request.uri_changed = true;
}

/// `allow`, `deny`: the first rule that the address is in decides; who is in none may come in.
fn is_denied(x: &Exchange, location: &Location) -> bool {
    let remote = x.remote().ip().to_canonical();
    let mut rules = location.rules.iter();
    rules.find(|rule| rule.network.is_none_or(|network| network.contains(&remote))).is_some_and(|rule| !rule.allow)
}

/// Sends what the scripts printed, or nginx's page for a status that nobody has printed anything for.
async fn answer(p: &Proxy, x: &mut Exchange) -> Result<()> {
    if x.response.status == 0 {
        x.response.status = 200;
    }
    let status = x.response.status;
    if x.printed.is_empty() && !x.response.head_sent && status >= 300 && status != 304 && x.depth == 0 {
        rescue::page(p, x, status);
        return output::answer(x, &p.runner).await;
    }
    send(p, x, Sending::End).await
}

fn length(x: &Exchange) -> BodyLength {
    match output::remaining_length(x) {
        BodyLength::Unknown if x.request.version == Version::Http10 && buffers(x) && !has_body_filter(x) => {
            BodyLength::Known(x.printed.len() as u64)
        }
        length => length,
    }
}

/// Nobody knows ahead how long the filter makes it.
fn has_body_filter(x: &Exchange) -> bool {
    output::has_body_filter(PhaseMask(x.lua.phases))
}

/// `lua_http10_buffering`
fn buffers(x: &Exchange) -> bool {
    x.location.as_ref().is_none_or(|l| l.directives.lua_http10_buffering)
}

/// `default_type`, for answers of Lua's.
fn default_type(x: &mut Exchange) {
    let Some(location) = &x.location else { return };
    if x.untyped || !location.directives.lua_use_default_type || x.response.headers.contains("content-type") {
        return;
    }
    let default = location.directives.default_type.as_deref().unwrap_or("text/plain");
    if !default.is_empty() {
        x.response.headers.set("Content-Type", default);
    }
}

/// `return status body`
async fn returned(p: &Proxy, x: &mut Exchange, status: u16, body: Vec<u8>) -> Result<()> {
    x.response.status = status;
    if x.depth > 0 && body.is_empty() {
        return output::plain(x).await;
    }
    if matches!(status, 301 | 302 | 303 | 307 | 308) && !body.is_empty() {
        x.response.headers.set("Location", &body);
        rescue::page(p, x, status);
    } else if body.is_empty() && status >= 300 && status != 304 {
        rescue::page(p, x, status);
    } else {
        x.printed = body;
        default_type(x);
        rescue::stamp(p, x);
    }
    output::answer(x, &p.runner).await
}

pub(super) async fn not_found(p: &Proxy, x: &mut Exchange) -> Result<()> {
    rescue::page(p, x, 404);
    output::answer(x, &p.runner).await
}

/// `proxy_pass http://host:port/uri`. Of a URI without variables the part of the path behind the location's prefix follows.
async fn proxy(p: &Proxy, x: &mut Exchange, location: &Location, target: &Template) -> Result<()> {
    let mut text = Vec::new();
    x.fill(target, &mut text);
    let shown = String::from_utf8_lossy(&text).into_owned();
    let bad = || Error::config(Kind::Invalid).context(format!("proxy_pass: {shown:?} is not http://host:port/uri"));
    let (scheme, rest) = shown.split_once("://").ok_or_else(bad)?;
    let host = &rest[..rest.find(['/', '?']).unwrap_or(rest.len())];
    // Bytes that are no text may stand in the URI only, which is what follows the same start.
    let uri = text.get(scheme.len() + 3 + host.len()..).ok_or_else(bad)?;
    let named = Named::find(p, scheme, host).ok_or_else(bad)?;
    x.upstream.scheme = scheme.as_bytes().to_vec();
    x.upstream.host = host.as_bytes().to_vec();
    if !uri.is_empty() {
        let mut uri = uri.to_vec();
        if let (Pattern::Prefix { prefix, .. }, false) = (&location.pattern, target.has_variables()) {
            head::escape_path(x.request.path.get(prefix.len()..).unwrap_or_default(), &mut uri);
        }
        if !uri.contains(&b'?') && !x.request.args.is_empty() {
            uri.push(b'?');
            uri.extend_from_slice(&x.request.args);
        }
        x.upstream.uri = uri;
    }
    forward_to(p, x, &named, location.directives.next_upstream).await
}
