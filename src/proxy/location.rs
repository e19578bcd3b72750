//! Requests that a location of config.yaml serves: its scripts in nginx's order, and what answers.

use std::{
    net::IpAddr,
    rc::{Rc, Weak},
    sync::Arc,
};

use super::{
    Proxy, capture, files,
    forward::servers::{Named, forward_to},
    head, real_ip, request, rescue, watch,
};
use crate::{
    conf::{
        locations::{Content, Flag, Location, Pattern, Rewrite, Script, Template},
        outgoing::{ErrorPage, PageStatus},
    },
    error::{Error, Kind, Origin, Result},
    exchange::{
        BodyLength, Exchange, Jump, Phase, RequestBody, UpstreamState, Version,
        host::{Answered, Doing, Host, Sending, Subrequest},
    },
    location::Chosen,
    observe::log::Level,
    plugin::{Flow, PhaseMask, output},
};

/// Locations that one request may go through, as in nginx.
const MAX_JUMPS: u32 = 10;

/// Serves the request, if a location is there for its path; says whether one was.
pub(super) async fn serve(p: &Rc<Proxy>, x: &mut Exchange) -> bool {
    let rewritten = server_rewrites(p, x).await;
    let served = match (rewritten, choose(p, x)) {
        (Err(e), _) => Err(e),
        (Ok(Flow::Sent), _) => Ok(()),
        (Ok(_), Some(chosen)) => {
            x.lua.host = Some(host(p));
            enter(p, x, chosen).await
        }
        (Ok(_), None) => return false,
    };
    end(p, x, served).await;
    true
}

async fn end(p: &Proxy, x: &mut Exchange, served: Result<()>) {
    if let Err(e) = served {
        failed(p, x, e).await;
    }
    let phases = PhaseMask(x.lua.phases);
    request::end(p, x, phases).await;
}

/// Answers what was refused before it was a request, if the server has an error page for that; says whether it had one.
pub(super) async fn serve_refusal(p: &Rc<Proxy>, x: &mut Exchange, status: u16) -> bool {
    let Some(rest) = p.locations.rest().filter(|rest| page_for(rest, status).is_some()) else { return false };
    // The page is served as any request is: with the configuration of now, and the client's own address.
    p.pin(x);
    real_ip::apply(&p.settings.real_ip, x);
    p.runner.enter_location(x, rest.clone());
    x.lua.host = Some(host(p));
    let served = match refuse(p, x, status).await {
        Ok(Flow::Jump) => {
            let next = jump(p, x);
            run(p, x, next).await
        }
        flow => flow.map(drop),
    };
    end(p, x, served).await;
    true
}

async fn failed(p: &Proxy, x: &mut Exchange, e: Error) {
    if x.depth > 0 && e.origin() == Origin::Upstream && e.kind() == Kind::ReadTimeout {
        capture::forget_last_piece(x);
    }
    let of_body = x.phase == Phase::BodyFilter;
    if of_body && x.depth > 0 {
        capture::fail(x);
    }
    let exit = x.filter_exit.take().filter(|_| of_body || !x.response.head_sent);
    let ended = match exit {
        Some(_) if of_body => {
            if let Some(client) = &mut x.client {
                client.abort();
            }
            Ok(())
        }
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
    let served = match server_rewrites(p, x).await {
        Ok(Flow::Sent) => Ok(()),
        Ok(_) => {
            let chosen = choose_or_rest(p, x);
            Box::pin(run(p, x, chosen)).await
        }
        Err(e) => Err(e),
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
pub(super) async fn serve_rest(p: &Rc<Proxy>, x: &mut Exchange, location: &Arc<Location>) -> Result<()> {
    x.lua.host = Some(host(p));
    Box::pin(run(p, x, Ok(plain(location)))).await
}

fn plain(location: &Arc<Location>) -> Chosen {
    Chosen { location: location.clone(), captures: Vec::new() }
}

/// Sends the client to the same path with a slash.
pub(super) async fn to_folder(p: &Proxy, x: &mut Exchange) -> Result<Flow> {
    let mut target = Vec::new();
    head::escape_path(&x.request.path, &mut target);
    target.push(b'/');
    if !x.request.args.is_empty() {
        target.push(b'?');
        target.extend_from_slice(&x.request.args);
    }
    redirect(p, x, 301, &target).await
}

/// Sends the client to `target`. The filters see a path as it is; what leaves names scheme, host and the port that was reached.
async fn redirect(p: &Proxy, x: &mut Exchange, status: u16, target: &[u8]) -> Result<Flow> {
    x.response.headers.set("Location", target);
    rescue::page(p, x, status);
    output::answer_with(x, &p.runner, |x| {
        make_absolute(x, target);
        true
    })
    .await?;
    Ok(Flow::Sent)
}

/// `absolute_redirect`, for a target that the filters have left alone.
fn make_absolute(x: &mut Exchange, target: &[u8]) {
    let absolute = x.location.as_ref().is_some_and(|l| l.directives.absolute_redirect);
    if x.depth > 0 || !absolute || !target.starts_with(b"/") || x.response.headers.get("location") != Some(target) {
        return;
    }
    let (scheme, default) = if x.conn.tls.is_some() { ("https", 443) } else { ("http", 80) };
    let mut whole = format!("{scheme}://").into_bytes();
    let local = x.conn.local;
    match (&x.request.host[..], local.ip().to_canonical()) {
        // HTTP/1.0 may name none: the address that was reached.
        (b"", IpAddr::V4(ip)) => whole.extend_from_slice(ip.to_string().as_bytes()),
        (b"", IpAddr::V6(ip)) => whole.extend_from_slice(format!("[{ip}]").as_bytes()),
        (host, _) => whole.extend_from_slice(host),
    }
    let port = local.port();
    if port != default {
        whole.extend_from_slice(format!(":{port}").as_bytes());
    }
    whole.extend_from_slice(target);
    x.response.headers.set("Location", whole);
}

/// Answers with nginx's page for a status, or goes where `error_page` says.
pub(super) async fn refuse(p: &Proxy, x: &mut Exchange, status: u16) -> Result<Flow> {
    if let Some(flow) = error_page(p, x, status).await? {
        return Ok(flow);
    }
    rescue::page(p, x, status);
    output::answer(x, &p.runner).await?;
    Ok(Flow::Sent)
}

fn page_for(location: &Location, status: u16) -> Option<&ErrorPage> {
    location.directives.error_page.iter().find(|page| page.codes.contains(&status))
}

/// Whether the request goes to a page when it ends with this status.
pub(super) fn has_page(x: &Exchange, status: u16) -> bool {
    takes_page(x) && x.location.as_ref().is_some_and(|location| page_for(location, status).is_some())
}

fn takes_page(x: &Exchange) -> bool {
    x.error_status.is_none() && !x.response.head_sent
}

/// Goes to the page for a status: once per request, as nginx does.
async fn error_page(p: &Proxy, x: &mut Exchange, status: u16) -> Result<Option<Flow>> {
    let Some(location) = x.location.clone().filter(|_| takes_page(x)) else { return Ok(None) };
    let Some(page) = page_for(&location, status) else { return Ok(None) };
    let mut target = Vec::new();
    x.fill(&page.target, &mut target);
    x.printed.clear();
    rescue::forget_body(x);
    if !target.starts_with(b"/") && !target.starts_with(b"@") {
        let status = match page.status {
            PageStatus::Given(status @ (301 | 302 | 303 | 307 | 308)) => status,
            _ => 302,
        };
        x.error_status = Some(0);
        return redirect(p, x, status, &target).await.map(Some);
    }
    let answered = match page.status {
        PageStatus::Same => status,
        PageStatus::Own => 0,
        PageStatus::Given(status) => status,
    };
    x.error_status = Some(answered);
    x.response.status = answered;
    x.jump = Some(match target.strip_prefix(b"@") {
        Some(_) => Jump::Named(String::from_utf8_lossy(&target).into()),
        None => {
            if x.request.method != b"HEAD" {
                x.request.set_method(b"GET");
            }
            if matches!(x.body, RequestBody::Lost) {
                x.body = RequestBody::Forgone;
            }
            let mut parts = target.splitn(2, |b| *b == b'?').map(<[u8]>::to_vec);
            Jump::Exec { path: parts.next().unwrap_or_default(), args: parts.next() }
        }
    });
    Ok(Some(Flow::Jump))
}

fn choose(p: &Proxy, x: &mut Exchange) -> Option<Chosen> {
    match &x.watch {
        None => p.locations.choose(&x.request.path),
        Some(_) => watch::choose(p, x),
    }
}

/// For a request that has left the client's path: no route is for it. An error is a status.
fn choose_or_rest(p: &Proxy, x: &mut Exchange) -> Result<Chosen, u16> {
    choose(p, x).or_else(|| p.locations.rest().map(plain)).ok_or(404)
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
    if what != Sending::End || is_short(x) {
        output::flush(x).await?;
    }
    match what {
        Sending::End => output::finish(x).await,
        _ => Ok(()),
    }
}

/// Less was printed than the head promises: it goes out all the same, and the connection ends with it.
fn is_short(x: &Exchange) -> bool {
    matches!(output::remaining_length(x), BodyLength::Known(n) if n > x.body_bytes_sent)
}

/// Settles the head; says whether that was all of the response.
async fn settle_head(p: &Proxy, x: &mut Exchange) -> Result<bool> {
    if x.response.status == 0 {
        x.response.status = 200;
    }
    output::settle_status(x);
    if x.location.is_none() {
        // A plugin's own answer has the length that it has, whatever it copied.
        x.response.headers.remove("content-length");
    }
    default_type(x);
    x.response.headers.set("Server", &p.settings.server);
    add_headers(x);
    if is_known_already(x) {
        x.set_status(304);
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
    rescue::forget_body(x);
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
    let Some(script) = &p.server_rewrite else { return run(p, x, Ok(chosen)).await };
    p.runner.enter_location(x, chosen.location.clone());
    match run_script(p, x, script, Phase::ServerRewrite).await {
        // Its path may be another one now.
        Flow::Next | Flow::Declined | Flow::Jump => {
            x.jump = None;
            let chosen = choose(p, x).unwrap_or(chosen);
            run(p, x, Ok(chosen)).await
        }
        flow => match finish(p, x, flow).await? {
            Flow::Jump => {
                let next = jump(p, x);
                run(p, x, next).await
            }
            _ => Ok(()),
        },
    }
}

/// `rewrite` of the server, before a location is chosen. `Flow::Sent`: the client was sent elsewhere.
async fn server_rewrites(p: &Proxy, x: &mut Exchange) -> Result<Flow> {
    let Some(rest) = p.locations.rest().filter(|_| !p.server_rewrites.is_empty()) else { return Ok(Flow::Next) };
    // For the variables of the server alone: most requests go on, and have no use for a VM here.
    x.location = Some(rest.clone());
    let rewritten = rewrite(x, &p.server_rewrites);
    x.location = None;
    let Rewritten::Redirect(status, target) = rewritten else { return Ok(Flow::Next) };
    p.runner.enter_location(x, rest.clone());
    returned(p, x, status, target).await
}

/// From location to location, until one answers. `next`: the first, or why there is none, as a status.
async fn run(p: &Proxy, x: &mut Exchange, mut next: Result<Chosen, u16>) -> Result<()> {
    loop {
        let flow = match next {
            Ok(chosen) => match visit(p, x, chosen).await {
                Ok(flow) => flow,
                Err(e) => rescued(p, x, e).await?,
            },
            Err(status) => refuse(p, x, status).await?,
        };
        if flow != Flow::Jump {
            return Ok(());
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

/// Runs one location. `Flow::Jump`: the request goes on to another one.
async fn visit(p: &Proxy, x: &mut Exchange, chosen: Chosen) -> Result<Flow> {
    let Chosen { location, captures } = chosen;
    // Its own error pages and filters, also for who must not come in.
    p.runner.enter_location(x, location.clone());
    if location.internal && !x.internal {
        return refuse(p, x, 404).await;
    }
    for (name, value) in captures {
        set(x, &name, value);
    }
    bound_body(x, &location)?;
    let flow = phases(p, x, &location).await?;
    finish(p, x, flow).await
}

/// `client_max_body_size`, for a body that is still to come.
fn bound_body(x: &mut Exchange, location: &Location) -> Result<()> {
    let (Some(max), RequestBody::Streaming { length }) = (location.directives.client_max_body_size, &x.body) else {
        return Ok(());
    };
    if let Some(length) = length.filter(|length| max != 0 && *length > max) {
        let told = format!("client intended to send too large body: {length} bytes");
        return Err(Error::client(Kind::TooLarge).context(told));
    }
    if let Some(client) = &mut x.client {
        client.limit_body(max);
    }
    Ok(())
}

/// An error that `error_page` has something for; any other stays one.
async fn rescued(p: &Proxy, x: &mut Exchange, e: Error) -> Result<Flow> {
    if x.filter_exit.is_some() || x.response.ended {
        return Err(e);
    }
    match error_page(p, x, rescue::status_of(&e)).await? {
        Some(flow) => {
            x.log(Level::Error, e.to_string().as_bytes());
            Ok(flow)
        }
        None => Err(e),
    }
}

/// Goes where a script sent the request. An error is a status: there is nothing.
fn jump(p: &Proxy, x: &mut Exchange) -> Result<Chosen, u16> {
    match x.jump.take().ok_or(404_u16)? {
        Jump::Again => {
            p.runner.forget_location(x);
            choose_or_rest(p, x)
        }
        Jump::Exec { path, args } => {
            x.internal = true;
            x.request.path = path;
            x.request.args = args.unwrap_or_default();
            x.request.args_set = false;
            x.request.uri_changed = true;
            p.runner.forget_location(x);
            choose_or_rest(p, x)
        }
        Jump::Named(name) => {
            x.internal = true;
            let Some(location) = p.locations.named(&name) else {
                x.log(Level::Error, format!("could not find named location \"{name}\"").as_bytes());
                return Err(500);
            };
            Ok(plain(&location))
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
    match rewrite(x, &location.rewrites) {
        Rewritten::Stays => {}
        Rewritten::Again => {
            x.jump = Some(Jump::Again);
            return Ok(Flow::Jump);
        }
        Rewritten::Redirect(status, target) => return returned(p, x, status, target).await,
    }
    if let Some(flow) = script(p, x, &location.rewrite, Phase::RewriteByLua).await {
        return Ok(flow);
    }
    // A subrequest is as welcome as the request that made it.
    if x.depth == 0
        && let Some(flow) = access(p, x, location).await?
    {
        return Ok(flow);
    }
    if let Some(flow) = script(p, x, &location.precontent, Phase::Precontent).await {
        return Ok(flow);
    }
    x.phase = Phase::Content;
    match &location.content {
        Content::Lua(script) => Ok(run_script(p, x, script, Phase::Content).await),
        Content::Return { status, body } => {
            let mut text = Vec::new();
            x.fill(body, &mut text);
            returned(p, x, *status, text).await
        }
        Content::Proxy(target) => proxy(p, x, location, target).await,
        Content::Nothing => match p.locations.folder(&x.request.path).cloned() {
            // Its filters are those of the location that the client is sent to.
            Some(folder) => {
                p.runner.enter_location(x, folder);
                to_folder(p, x).await
            }
            None => files::serve(p, x, location).await,
        },
    }
}

/// Runs a script, and notes it where somebody wants to know.
async fn run_script(p: &Proxy, x: &mut Exchange, script: &Arc<Script>, phase: Phase) -> Flow {
    if x.watch.is_none() {
        return p.runner.script(x, script, phase).await;
    }
    watch::script_starts(x, phase);
    let flow = p.runner.script(x, script, phase).await;
    watch::script_ends(x, flow);
    flow
}

/// Runs a script of the location. `None`: the request goes on here.
async fn script(p: &Proxy, x: &mut Exchange, script: &Option<Arc<Script>>, phase: Phase) -> Option<Flow> {
    let flow = run_script(p, x, script.as_ref()?, phase).await;
    (!matches!(flow, Flow::Next | Flow::Declined)).then_some(flow)
}

/// Whether the request may come in: `allow` and `deny`, `auth_request`, `access_by_lua`. All of them must agree, or with
/// `satisfy any` the first that does. `None`: it may.
async fn access(p: &Proxy, x: &mut Exchange, location: &Location) -> Result<Option<Flow>> {
    let any = location.directives.satisfy_any;
    let mut refused = None;
    match (is_allowed(x, location), any) {
        (Some(true), true) => return Ok(agreed(x)),
        (Some(false), true) => refused = Some(403),
        (Some(false), false) => return forbid(p, x, 403).await.map(Some),
        _ => {}
    }
    if let Some(path) = &location.directives.auth_request {
        match (authorize(x, path).await, any) {
            (200..300, true) => return Ok(agreed(x)),
            (200..300, false) => {}
            // A 401 stays one, whoever refuses beside it: the client can do something about that.
            (status @ (401 | 403), true) => refused = refused.filter(|before| *before == 401).or(Some(status)),
            (status @ (401 | 403), false) => return refuse(p, x, status).await.map(Some),
            (status, _) => {
                x.log(Level::Error, format!("auth request unexpected status: {status}").as_bytes());
                return refuse(p, x, 500).await.map(Some);
            }
        }
    }
    if let Some(script) = &location.access {
        match run_script(p, x, script, Phase::Access).await {
            Flow::Next if any => return Ok(agreed(x)),
            Flow::Next | Flow::Declined => {}
            Flow::Answer if any && x.printed.is_empty() && matches!(x.response.status, 401 | 403) => {
                refused = refused.filter(|before| *before == 401).or(Some(x.response.status));
            }
            flow => return Ok(Some(flow)),
        }
    }
    match refused {
        Some(status) => forbid(p, x, status).await.map(Some),
        None => Ok(None),
    }
}

/// With `satisfy any` one has let the request in: what another one asked for is moot.
fn agreed(x: &mut Exchange) -> Option<Flow> {
    x.response.headers.remove("www-authenticate");
    None
}

async fn forbid(p: &Proxy, x: &mut Exchange, status: u16) -> Result<Flow> {
    if status == 403 {
        x.log(Level::Error, b"access forbidden by rule");
    }
    refuse(p, x, status).await
}

/// The status of the subrequest that `auth_request` makes. What a 401 asks for goes to the client.
async fn authorize(x: &mut Exchange, path: &str) -> u16 {
    let Some(host) = x.lua.host.clone() else { return 500 };
    let asked = Subrequest {
        method: b"GET".to_vec(),
        path: path.as_bytes().to_vec(),
        args: Vec::new(),
        body: None,
        forward_body: false,
        vars: Vec::new(),
        copy_vars: false,
        share_vars: true,
        ctx: None,
        header_only: true,
    };
    let answered = host.subrequests(x, vec![asked]).await;
    if let Some(vars) = answered.vars {
        x.custom_vars = vars;
    }
    let Some(answer) = answered.list.into_iter().next() else { return 500 };
    if let Some(asks) = answer.headers.get("www-authenticate").filter(|_| answer.status == 401) {
        x.response.headers.set("WWW-Authenticate", asks);
    }
    answer.status
}

fn set(x: &mut Exchange, name: &str, value: Vec<u8>) {
    // What nginx does not let change, it does not let a configuration set either.
    let _ = x.set_var(name, &value);
}

/// Answers as the phases have decided. `Flow::Jump`: another location does.
async fn finish(p: &Proxy, x: &mut Exchange, flow: Flow) -> Result<Flow> {
    match flow {
        Flow::Sent | Flow::Jump => return Ok(flow),
        Flow::Close if x.depth > 0 => x.response.status = 500,
        Flow::Close => {
            if let Some(client) = &mut x.client {
                client.abort();
            }
        }
        // A script that ends has answered; one that exits with a status may have left the words to nginx.
        Flow::Next | Flow::Declined => send(p, x, Sending::End).await?,
        Flow::Answer => return answer(p, x).await,
    }
    Ok(Flow::Sent)
}

/// Where rules send a request.
enum Rewritten {
    Stays,
    /// To the location of its new path.
    Again,
    /// Elsewhere, with that status.
    Redirect(u16, Vec<u8>),
}

/// `rewrite regex replacement [flag]`, each of them in turn.
fn rewrite(x: &mut Exchange, rules: &[Rewrite]) -> Rewritten {
    if rules.is_empty() {
        return Rewritten::Stays;
    }
    let before = x.request.path.clone();
    for rule in rules {
        let Some((mut path, args)) = replacement(x, rule) else { continue };
        if let Flag::Redirect(status) = rule.flag {
            if let Some(args) = args {
                path.push(b'?');
                path.extend_from_slice(&args);
            }
            return Rewritten::Redirect(status, path);
        }
        change_target(x, path, args);
        match rule.flag {
            Flag::Break => return Rewritten::Stays,
            Flag::Last => return Rewritten::Again,
            Flag::None | Flag::Redirect(_) => {}
        }
    }
    // Without a flag the last one ends like `last`: the path is not the one that the location was chosen for.
    if x.request.path == before { Rewritten::Stays } else { Rewritten::Again }
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

/// `allow`, `deny`: the first rule that the address is in decides; about who is in none they say nothing.
fn is_allowed(x: &Exchange, location: &Location) -> Option<bool> {
    let remote = x.remote().ip().to_canonical();
    let mut rules = location.rules.iter();
    rules.find(|rule| rule.network.is_none_or(|network| network.contains(&remote))).map(|rule| rule.allow)
}

/// Sends what the scripts printed, or nginx's page for a status that nobody has printed anything for.
async fn answer(p: &Proxy, x: &mut Exchange) -> Result<Flow> {
    if x.response.status == 0 {
        x.response.status = 200;
    }
    let status = x.response.status;
    if x.printed.is_empty() && !x.response.head_sent && status >= 300 && status != 304 {
        if let Some(flow) = error_page(p, x, status).await? {
            // A page with a status of its own has the script's until it says another one.
            if x.response.status == 0 {
                x.response.status = status;
            }
            return Ok(flow);
        }
        if x.depth == 0 {
            return refuse(p, x, status).await;
        }
        // What ends an error page is an error of its own.
        x.set_status(status);
    }
    send(p, x, Sending::End).await?;
    Ok(Flow::Sent)
}

fn length(x: &Exchange) -> BodyLength {
    match output::remaining_length(x) {
        BodyLength::Unknown if x.request.version == Version::Http10 && buffers(x) && !changes_body(x) => {
            BodyLength::Known(x.printed.len() as u64)
        }
        length => length,
    }
}

/// Nobody knows ahead how long the filter makes it.
fn changes_body(x: &Exchange) -> bool {
    output::has_body_filter(PhaseMask(x.lua.phases)) || x.encoder.is_some()
}

/// `lua_http10_buffering`
fn buffers(x: &Exchange) -> bool {
    x.location.as_ref().is_none_or(|l| l.directives.lua_http10_buffering)
}

/// `default_type`, for answers of Lua's.
fn default_type(x: &mut Exchange) {
    let Some(location) = &x.location else { return output::default_type(x, output::LUA_TYPE) };
    if x.untyped || !location.directives.lua_use_default_type || x.response.headers.contains("content-type") {
        return;
    }
    let default = location.directives.default_type.as_deref().unwrap_or("text/plain");
    if !default.is_empty() {
        x.response.headers.set("Content-Type", default);
    }
}

/// `return status body`
async fn returned(p: &Proxy, x: &mut Exchange, status: u16, body: Vec<u8>) -> Result<Flow> {
    x.response.status = status;
    if matches!(status, 301 | 302 | 303 | 307 | 308) && !body.is_empty() {
        return redirect(p, x, status, &body).await;
    }
    let without_words = body.is_empty() && status >= 300 && status != 304;
    if x.depth > 0 && body.is_empty() {
        if without_words {
            if let Some(flow) = error_page(p, x, status).await? {
                return Ok(flow);
            }
            x.set_status(status);
        }
        // No filter sees it, but an error page keeps the status that it is for.
        output::settle_status(x);
        output::plain(x).await?;
        return Ok(Flow::Sent);
    }
    if without_words {
        return refuse(p, x, status).await;
    }
    x.printed = body;
    default_type(x);
    rescue::stamp(p, x);
    output::answer(x, &p.runner).await?;
    Ok(Flow::Sent)
}

/// `proxy_pass http://host:port/uri`. Of a URI without variables the part of the path behind the location's prefix follows.
async fn proxy(p: &Proxy, x: &mut Exchange, location: &Location, target: &Template) -> Result<Flow> {
    let mut text = Vec::new();
    x.fill(target, &mut text);
    let shown = String::from_utf8_lossy(&text).into_owned();
    let bad = || Error::config(Kind::Invalid).context(format!("proxy_pass: {shown:?} is not http://host:port/uri"));
    let (scheme, rest) = shown.split_once("://").ok_or_else(bad)?;
    let host = &rest[..rest.find(['/', '?']).unwrap_or(rest.len())];
    // Bytes that are no text may stand in the URI only, which is what follows the same start.
    let uri = text.get(scheme.len() + 3 + host.len()..).ok_or_else(bad)?;
    let named = Named::find(p, scheme, host).ok_or_else(bad)?;
    forget_upstream(x);
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

/// What holds for the upstream of a location that was tried before. The tries are the request's: the log tells of all.
fn forget_upstream(x: &mut Exchange) {
    let tries = std::mem::take(&mut x.upstream.tries);
    let (another_group, buffering) = (!tries.is_empty(), x.upstream.buffering);
    x.upstream = UpstreamState { tries, another_group, buffering, ..UpstreamState::default() };
}
