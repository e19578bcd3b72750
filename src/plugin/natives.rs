//! `native.plugin`: what the Lua side of the runner asks of the request and its plan.

use std::ffi::c_int;

use bytes::Bytes;
use serde_json::Value;

use super::{registered, run::Run, upstream, watch};
use crate::{
    error::Result,
    exchange::{
        Exchange, RequestBody,
        asked::{self, About, BodyText},
        posted::Posted,
    },
    expr::path::{Found, Path},
    lua::{
        Api, Phases, Raise, Stack,
        api::request,
        convert::{mark_array, push_json},
        fast,
        vm::{self, Purpose},
    },
    model::{Consumer, Id, Kind, Object, Plugins, Served},
    observe::log::Level,
};

type Answer = Result<c_int, Raise>;

pub(super) fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.plugin.decode", any, "decode(json) -> value.", |s| {
        let value = serde_json::from_slice(s.arg_bytes(1)?).map_err(|e| e.to_string())?;
        push_json(s, &value).map(|()| 1)
    })?;
    api.func(
        "native.plugin.matched_uid",
        any,
        "matched_uid(kind) -> number: the version of the matched route or service; 0: none.",
        |s| {
            let kind = s.arg_bytes(1)?;
            let uid = fast::exchange().and_then(|x| matched(x, kind)).map_or(0, |m| m.uid);
            Ok(s.push_number(uid as f64))
        },
    )?;
    api.func(
        "native.plugin.matched",
        any,
        "matched(kind) -> value, id, modified, created, has_domain: the matched route or service as it is in force: with defaults, its \
         plugins' confs decrypted, nodes as a list, one of which is a name or not.",
        |s| {
            let x = request()?;
            let Some(m) = matched(x, s.arg_bytes(1)?) else { return Ok(s.push_nil()) };
            let served = Served::of_value(m.kind, m.id, m.shown()).with_priorities();
            push_json(s, &served.value)?;
            s.push_bytes(m.id.as_bytes());
            s.push_number(m.modified as f64);
            s.push_number(m.created as f64);
            s.push_bool(served.has_domain);
            Ok(5)
        },
    )?;
    consumer(api)?;
    api.func("native.plugin.register_var", any, "register_var(name): this VM gives the variable.", |s| {
        registered::add(&s.arg_str(1)?);
        Ok(0)
    })?;
    api.func(
        "native.plugin.learn",
        any,
        "learn(variable, max_bytes) -> boolean: looks into the body that was read for what the variable is about; false: nobody \
         has read it yet.",
        learn,
    )?;
    api.func(
        "native.plugin.posted",
        any,
        "posted(variable) -> boolean, value: whether the body that was looked into is JSON, and what it has where `post_arg.x` leads, as \
         its own type; an array where the path has a star.",
        posted,
    )?;
    api.func("native.plugin.captures", any, "captures() -> table: what of the request the route matched.", captures)?;
    api.func(
        "native.plugin.filter",
        Phases::REQUEST,
        "filter(n, name?, value?, …) -> boolean, graphql, posted, name: whether the plan's nth filter passes, where the registered \
         variables are these; what it has asked of a body in vain, and a registered variable that it has asked for in vain.",
        |s| {
            let n = s.arg_int(1)?;
            let given = |name: &str| (2..s.top()).step_by(2).find(|at| s.bytes(*at) == Some(name.as_bytes()));
            let given = |name: &str| given(name).map(|at| s.bytes(at + 1).map(<[u8]>::to_vec));
            let (passed, asked, wanted) = Run::filter(request()?, n, given);
            s.push_bool(passed);
            for about in [About::Graphql, About::Posted] {
                s.push_bool(asked.each().any(|a| a == about));
            }
            match wanted {
                Some(name) => s.push_bytes(name.as_bytes()),
                None => s.push_nil(),
            };
            Ok(4)
        },
    )?;
    upstream::register(api)?;
    watches(api)?;
    api.func("native.plugin.log_error", any, "log_error(text).", |s| {
        let text = s.arg_str(1)?;
        match fast::exchange() {
            Some(x) => crate::lua::log_error(x, &text),
            None => tracing::error!(target: "lua", "{text}"),
        }
        Ok(0)
    })?;
    api.func("native.plugin.log_exit", any, "log_exit(plugin, status): a plugin refused the request.", |s| {
        let text = format!("[lua] {} exits with http status code {}", s.arg_str(1)?, s.arg_int(2)?);
        match fast::exchange() {
            Some(x) => x.log(Level::Warn, text.as_bytes()),
            None => tracing::warn!(target: "lua", "{text}"),
        }
        Ok(0)
    })
}

fn learn(s: &Stack) -> Answer {
    let (name, most) = (s.arg_str(1)?, s.number(2).unwrap_or(f64::INFINITY));
    let x = request()?;
    let Some(about) = About::of(&name).filter(|about| !about.is_known(x)) else { return Ok(s.push_bool(true)) };
    let body = if about.is_in_body(x) {
        asked::read_body(&x.body, most as u64)
    } else {
        Some(Ok(BodyText::Here(Bytes::new())))
    };
    let body = match body {
        None => return Ok(s.push_bool(!matches!(x.body, RequestBody::Streaming { .. }))),
        Some(Err(why)) => Err(why),
        Some(Ok(BodyText::Here(bytes))) => Ok(bytes),
        Some(Ok(BodyText::At(path))) => {
            std::fs::read(path).map(Bytes::from).map_err(|e| format!("read {}: {e}", path.display()))
        }
    };
    about.learn(x, body);
    Ok(s.push_bool(true))
}

fn posted(s: &Stack) -> Answer {
    let (x, name) = (request()?, s.arg_str(1)?);
    let found = match (x.posted.as_deref(), name.strip_prefix("post_arg.")) {
        (Some(Posted::Json(json)), Some(path)) => Path::parse(path).and_then(|path| path.found(json)),
        _ => return Ok(s.push_bool(false)),
    };
    s.push_bool(true);
    match found {
        None | Some(Found::One(Value::Null)) => {
            s.push_nil();
        }
        Some(Found::One(value)) => push_json(s, value)?,
        Some(Found::Several(values)) => {
            s.push_table(values.len(), 0);
            for (i, value) in values.into_iter().enumerate() {
                push_json(s, value)?;
                s.set_index(-2, i + 1);
            }
            mark_array(s);
        }
    }
    Ok(2)
}

/// What plans of watched requests have beside their plugins.
fn watches(api: &mut Api) -> Result<()> {
    api.func(
        "native.plugin.watch_start",
        Phases::REQUEST,
        "watch_start(plugin, phase, owner): that function of a plugin is about to run, in a request that is watched.",
        |s| {
            let (plugin, phase, owner) = (s.arg_str(1)?, s.arg_str(2)?, s.arg_str(3)?);
            request()?.watch_start(&plugin, &phase, &owner);
            Ok(0)
        },
    )?;
    api.func(
        "native.plugin.watch_end",
        Phases::REQUEST,
        "watch_end(plugin, phase, global, code): it has come back with this first result.",
        |s| {
            let code = s.number(4).map(|code| code as u16);
            let x = request()?;
            if x.watch_end(code) {
                watch::tell_late(x, &s.arg_str(1)?, &s.arg_str(2)?, s.boolean(3));
            }
            Ok(0)
        },
    )?;
    api.func(
        "native.plugin.debugged",
        Phases::ANY,
        "debugged() -> boolean, boolean: whether the hooks of conf/debug.yaml tell of the request that runs, and whether its answer \
         names the plugins.",
        |s| {
            let watch = fast::exchange().and_then(|x| x.watch.as_ref());
            s.push_bool(watch.is_some_and(|watch| watch.hooked));
            s.push_bool(watch.is_some_and(|watch| watch.named));
            Ok(2)
        },
    )
}

/// The request's consumer, for functions: whoever asks for it in a plugin has been given it by the auth plugin.
fn consumer(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func(
        "native.plugin.consumer",
        any,
        "consumer() -> table | nil: what the Admin API has of the request's consumer, without its plugins, whose confs are its keys.",
        |s| {
            let Some(consumer) = fast::exchange().and_then(|x| x.consumer.clone()) else { return Ok(s.push_nil()) };
            push_json(s, &without_keys(&consumer)).map(|()| 1)
        },
    )?;
    api.func(
        "native.plugin.credential_id",
        any,
        "credential_id() -> string | nil: the credential by which the request's consumer was known.",
        |s| {
            let id = fast::exchange().and_then(|x| x.credential.as_ref()).and_then(|c| c.id.rsplit('/').next());
            Ok(id.map_or_else(|| s.push_nil(), |id| s.push_bytes(id)))
        },
    )
}

fn without_keys(consumer: &Object<Consumer>) -> Value {
    let mut value: Value = serde_json::from_str(&consumer.json).unwrap_or_default();
    if let Value::Object(map) = &mut value {
        map.remove("plugins");
        let custom_id = map.get("labels").and_then(|labels| labels.get("custom_id")).cloned();
        map.extend(custom_id.map(|id| ("custom_id".into(), id)));
        map.insert("consumer_name".into(), (*consumer.value.username).into());
    }
    value
}

fn is_function() -> bool {
    vm::current().is_some_and(|vm| vm.config.purpose == Purpose::Functions)
}

/// A resource that the request matched.
struct Matched<'a> {
    kind: Kind,
    uid: u64,
    json: &'a str,
    plugins: &'a Plugins,
    id: &'a Id,
    modified: i64,
    created: i64,
}

impl Matched<'_> {
    /// Its JSON, plugins' confs decrypted: not for functions without trust, which keys are not for.
    fn shown(&self) -> Value {
        match is_function() {
            false => self.plugins.in_clear(self.json),
            true => serde_json::from_str(self.json).unwrap_or_default(),
        }
    }
}

fn matched<'a>(x: &'a Exchange, kind: &[u8]) -> Option<Matched<'a>> {
    fn of<'o, T>(kind: Kind, o: &'o Object<T>, plugins: &'o Plugins) -> Matched<'o> {
        let (modified, created) = (o.mod_revision, o.create_revision);
        Matched { kind, uid: o.uid, json: &o.json, plugins, id: &o.id, modified, created }
    }
    let m = x.matched.as_ref()?;
    match kind {
        b"route" => Some(of(Kind::Route, m.route(), &m.route().value.plugins)),
        b"service" => m.service.as_ref().map(|service| of(Kind::Service, service, &service.value.plugins)),
        _ => None,
    }
}

/// `ctx.curr_req_matched`
fn captures(s: &Stack) -> Answer {
    let Some(m) = fast::exchange().and_then(|x| x.matched.as_ref()) else { return Ok(s.push_nil()) };
    s.push_table(0, 2 + m.found.params().len());
    s.push_bytes(m.found.path_pattern().as_bytes());
    s.set(-2, "_path");
    if let Some(host) = m.found.host_pattern() {
        s.push_bytes(host.as_bytes());
        s.set(-2, "_host");
    }
    for (name, value) in m.found.params() {
        s.push_bytes(value);
        s.set(-2, name.as_bytes());
    }
    Ok(1)
}
