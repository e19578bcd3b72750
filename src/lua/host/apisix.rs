//! `native.apisix`: what the `apisix.*` Lua modules ask of the gateway: configuration, consumers, schemas, upstreams.
//!
//! Everything is read from the snapshot that the running request holds, so a request never sees two versions.

use std::{
    borrow::Cow,
    cell::RefCell,
    ffi::{c_int, c_void},
    io::Read,
    net::IpAddr,
    sync::Arc,
};

use serde_json::Value;
use smallvec::smallvec;

use super::Answer;
use crate::{
    error::{Error, Kind, Result},
    exchange::Exchange,
    lua::{
        api::{Api, Phases, Raise, Stack, Wait, request, script},
        convert::push_json,
        fast,
        ngx::{header::in_value, socket},
        sched::{self, Op, failed},
        vm::{self, Purpose},
    },
    model::{self, Id, Keyring, Object, ParseContext, Parsed, PluginConf, Plugins, Served, consumer::AuthKey, parse},
    observe::{append, metrics},
    schema,
    store::Snapshot,
};

pub(super) fn register(api: &mut Api) -> Result<()> {
    node(api)?;
    api.wait(
        "native.apisix.scrape",
        Phases::BEFORE_HEAD,
        "scrape() -> string: all metrics in Prometheus' format.",
        scrape,
    )?;
    schemas(api)?;
    consumers(api)?;
    metadata(api)?;
    secrets(api)?;
    heads(api)?;
    upstreams(api)
}

fn node(api: &mut Api) -> Result<()> {
    api.func("native.apisix.hostname", Phases::ANY, "hostname() -> string: the machine's name.", hostname)?;
    api.func(
        "native.apisix.write_log_line",
        Phases::ANY,
        "write_log_line(path, text) -> true | nil, err: queues text for the file at path.",
        write_log_line,
    )?;
    api.func(
        "native.apisix.waiting_slot",
        Phases::ANY,
        "waiting_slot(name, route_id, server_addr) -> integer | nil: where a batch processor's waiting entries are counted.",
        waiting_slot,
    )?;
    api.func(
        "native.apisix.add_waiting",
        Phases::ANY,
        "add_waiting(slot, n) -> boolean: so many more entries wait there, or, below 0, fewer; false: another is to be asked for.",
        add_waiting,
    )?;
    api.func(
        "native.apisix.inflate",
        Phases::ANY,
        "inflate(\"gzip\" | \"deflate\", bytes, max) -> string | nil, err, part: at most max bytes of the decoded text, or those before the error.",
        inflate,
    )?;
    api.wait(
        "native.apisix.resolve",
        Phases::ANY,
        "resolve(host) -> array of addresses | nil, err: by the gateway's resolver, which bounds the time.",
        resolve,
    )
}

fn resolve(s: &Stack) -> Result<Wait, Raise> {
    let host = s.arg_str(1)?.into_owned();
    Ok(Wait::Park(Op::future(async move {
        match socket::addresses(&host).await {
            Ok(addresses) => smallvec![sched::Value::Push(Box::new(move |s| push_addresses(s, &addresses)))],
            Err(text) => failed(text),
        }
    })))
}

fn push_addresses(s: &Stack, addresses: &[IpAddr]) {
    s.push_table(addresses.len(), 0);
    for (i, address) in addresses.iter().enumerate() {
        s.push_bytes(address.to_string());
        s.set_index(-2, i + 1);
    }
}

/// Put together on another thread: with thousands of series it takes milliseconds, and requests wait on this one.
fn scrape(_: &Stack) -> Result<Wait, Raise> {
    let page = || {
        let mut page = String::new();
        if let Some(metrics) = metrics::process() {
            metrics.scrape(&mut page);
        }
        page
    };
    Ok(Wait::Park(Op::future(async move {
        let page = tokio::task::spawn_blocking(page).await.unwrap_or_default();
        smallvec::smallvec![crate::lua::Value::text(page)]
    })))
}

fn waiting_slot(s: &Stack) -> Answer {
    let (name, route, address) = (s.arg_str(1)?, s.arg_str(2)?, s.arg_str(3)?);
    match metrics::process().and_then(|metrics| metrics.waiting_slot(&name, &route, &address)) {
        Some(slot) => Ok(s.push_number(slot as f64)),
        None => Ok(s.push_nil()),
    }
}

fn add_waiting(s: &Stack) -> Answer {
    let (slot, n) = (s.arg_int(1)?, s.arg_int(2)?);
    if let (Some(metrics), Ok(slot)) = (metrics::process(), usize::try_from(slot)) {
        return Ok(s.push_bool(metrics.add_waiting(slot, n)));
    }
    Ok(s.push_bool(true))
}

fn hostname(s: &Stack) -> Answer {
    let mut name = [0u8; 256];
    // SAFETY: the buffer outlives the call, which writes at most its length less one.
    let ok = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) } == 0;
    let end = name.iter().position(|b| *b == 0).unwrap_or(0);
    Ok(s.push_bytes(if ok { &name[..end] } else { b"" }))
}

fn write_log_line(s: &Stack) -> Answer {
    if is_function() {
        return s.fail("files are not open to functions");
    }
    let path = s.arg_str(1)?;
    match append::line(&path, s.arg_bytes(2)?) {
        Ok(()) => Ok(s.push_bool(true)),
        Err(reason) => s.fail(reason),
    }
}

fn inflate(s: &Stack) -> Answer {
    let (encoding, bytes, max) = (s.arg_bytes(1)?, s.arg_bytes(2)?, s.arg_int(3)?.max(0) as u64);
    let mut out = Vec::new();
    let read = match encoding {
        b"gzip" => flate2::read::MultiGzDecoder::new(bytes).take(max).read_to_end(&mut out),
        b"deflate" => flate2::read::ZlibDecoder::new(bytes).take(max).read_to_end(&mut out),
        _ => return s.fail("unknown encoding"),
    };
    match read {
        Ok(_) => Ok(s.push_bytes(out)),
        Err(e) => {
            s.fail(e.to_string())?;
            s.push_bytes(out);
            Ok(3)
        }
    }
}

fn schemas(api: &mut Api) -> Result<()> {
    api.func(
        "native.apisix.plugin_schema",
        Phases::ANY,
        "plugin_schema(name) -> { schema, consumer_schema, metadata_schema } | nil: a bundled plugin's published schemas.",
        |s| push_text(s, schema::plugin_json(&s.arg_str(1)?)),
    )?;
    api.func(
        "native.apisix.resource_schema",
        Phases::ANY,
        "resource_schema(name) -> table | nil: a resource's published schema.",
        |s| push_text(s, schema::resource_json(&s.arg_str(1)?)),
    )
}

fn consumers(api: &mut Api) -> Result<()> {
    let doc = "version of the configuration that the request holds: changes with everything; 0 without a request";
    api.fast("config_version", "double (void)", Phases::ANY, doc, config_version as *const c_void)?;
    let doc = "changes whenever a consumer or a credential does; 0 without a request";
    api.fast("consumers_version", "double (void)", Phases::ANY, doc, consumers_version as *const c_void)?;
    let doc = "the request is the consumer's that `keep_consumer` gave this number; 0: attach it by name";
    api.fast("attach_kept", "int (unsigned)", Phases::REWRITE | Phases::ACCESS, doc, attach_kept as *const c_void)?;
    api.func(
        "native.apisix.keep_consumer",
        Phases::REQUEST,
        "keep_consumer(username, credential_id | nil, custom_id | nil) -> number | nil: for `fast.attach_kept`.",
        keep_consumer,
    )?;
    api.func(
        "native.apisix.forget_consumers",
        Phases::REQUEST,
        "forget_consumers(): the numbers that `keep_consumer` gave mean nothing any more.",
        |_| {
            vm::current().ok_or("no VM runs")?.consumers.clear();
            Ok(0)
        },
    )?;
    api.func(
        "native.apisix.consumer",
        Phases::REQUEST,
        "consumer(plugin, field, value) -> consumer, username, revision, auth_conf, credential_id | nil: who has that value.",
        find_consumer,
    )?;
    api.func(
        "native.apisix.consumer_by_name",
        Phases::REQUEST,
        "consumer_by_name(username) -> consumer, revision | nil.",
        consumer_by_name,
    )?;
    api.func(
        "native.apisix.consumer_references",
        Phases::REQUEST,
        "consumer_references(plugin, field) -> array: the values of that field that refer to a secret.",
        consumer_references,
    )?;
    api.func(
        "native.apisix.consumers_with",
        Phases::ANY,
        "consumers_with(plugin) -> array of { consumer, username, revision, auth_conf, credential_id }.",
        consumers_with,
    )?;
    api.func(
        "native.apisix.attach_consumer",
        Phases::REWRITE | Phases::ACCESS,
        "attach_consumer(username, credential_id | nil): the request is this consumer's from here on.",
        attach_consumer,
    )
}

fn find_consumer(s: &Stack) -> Answer {
    let key = AuthKey { plugin: arg(s, 1)?, field: arg(s, 2)?, value: arg(s, 3)? };
    let Some(config) = snapshot() else { return Ok(s.push_nil()) };
    let Some((consumer_id, credential_id)) = config.auth_index.get(&key) else { return Ok(s.push_nil()) };
    let Some(consumer) = config.consumers.get(consumer_id) else { return Ok(s.push_nil()) };
    let credential = credential_id.as_ref().and_then(|id| config.credentials.get(id));
    let plugins = credential.map_or(&consumer.value.plugins, |c| &c.value.plugins);
    let Some(conf) = plugins.get(&key.plugin) else { return Ok(s.push_nil()) };
    push_json(s, &consumer.value.plugins.in_clear(&consumer.json))?;
    s.push_bytes(consumer.value.username.as_bytes());
    s.push_number(consumer.mod_revision as f64);
    push_object(s, &conf.json)?;
    push_credential_id(s, credential_id.as_ref());
    Ok(5)
}

fn consumer_by_name(s: &Stack) -> Answer {
    let name = s.arg_str(1)?;
    let Some(config) = snapshot() else { return Ok(s.push_nil()) };
    let Some(consumer) = config.consumers.get(&*name) else { return Ok(s.push_nil()) };
    push_json(s, &consumer.value.plugins.in_clear(&consumer.json))?;
    s.push_number(consumer.mod_revision as f64);
    Ok(2)
}

fn consumer_references(s: &Stack) -> Answer {
    let (plugin, field) = (s.arg_str(1)?, s.arg_str(2)?);
    s.push_table(0, 0);
    let Some(config) = snapshot() else { return Ok(1) };
    let refers =
        |key: &&AuthKey| *key.plugin == *plugin && *key.field == *field && model::crypt::is_reference(&key.value);
    for (n, key) in config.auth_index.keys().filter(refers).enumerate() {
        s.push_bytes(key.value.as_bytes());
        s.set_index(-2, n + 1);
    }
    Ok(1)
}

fn consumers_with(s: &Stack) -> Answer {
    let plugin = s.arg_str(1)?;
    s.push_table(0, 0);
    let Some(config) = snapshot() else { return Ok(1) };
    let mut n = 0;
    for consumer in config.consumers.values() {
        if let Some(conf) = consumer.value.plugins.get(&plugin) {
            n += 1;
            push_entry(s, consumer, conf, None)?;
            s.set_index(-2, n);
        }
    }
    for (id, credential) in &config.credentials {
        let owner = config.consumers.get(&*credential.value.username);
        if let (Some(conf), Some(consumer)) = (credential.value.plugins.get(&plugin), owner) {
            n += 1;
            push_entry(s, consumer, conf, Some(id))?;
            s.set_index(-2, n);
        }
    }
    Ok(1)
}

fn push_entry(
    s: &Stack,
    consumer: &Object<model::Consumer>,
    conf: &PluginConf,
    credential: Option<&Id>,
) -> Result<(), Raise> {
    s.push_table(0, 5);
    push_json(s, &consumer.value.plugins.in_clear(&consumer.json))?;
    s.set(-2, "consumer");
    s.push_bytes(consumer.value.username.as_bytes());
    s.set(-2, "username");
    s.push_number(consumer.mod_revision as f64);
    s.set(-2, "revision");
    push_object(s, &conf.json)?;
    s.set(-2, "auth_conf");
    push_credential_id(s, credential);
    s.set(-2, "credential_id");
    Ok(())
}

/// The id without its consumer's part, as APISIX shows it; nil for none.
fn push_credential_id(s: &Stack, id: Option<&Id>) {
    match id {
        Some(id) => s.push_bytes(id.rsplit('/').next().unwrap_or(id)),
        None => s.push_nil(),
    };
}

fn attach_consumer(s: &Stack) -> Answer {
    let x = request()?;
    (x.consumer, x.credential) = named_consumer(s, &x.snapshot)?;
    Ok(0)
}

type Named = (Option<Arc<Object<model::Consumer>>>, Option<Arc<Object<model::Credential>>>);

/// The consumer and the credential of arguments 1 and 2.
fn named_consumer(s: &Stack, config: &Snapshot) -> Result<Named, Raise> {
    let username = s.arg_str(1)?;
    let credential = s
        .opt_bytes(2)?
        .map(|id| format!("{username}/credentials/{}", String::from_utf8_lossy(id)))
        .and_then(|id| config.credentials.get(id.as_str()).cloned());
    Ok((config.consumers.get(&*username).cloned(), credential))
}

/// Consumers that a VM attaches by number. The Lua side starts anew at the same bound.
const MAX_KEPT: usize = 10_000;

/// Consumers of one version as scripts attach them.
#[derive(Default)]
pub struct KeptConsumers(RefCell<Vec<KeptConsumer>>);

struct KeptConsumer {
    consumer: Arc<Object<model::Consumer>>,
    credential: Option<Arc<Object<model::Credential>>>,
    fields: [Field; 3],
}

/// What the node is told: a name and a value, or that there is none.
type Field = (&'static str, Option<Box<[u8]>>);

impl KeptConsumers {
    fn clear(&self) {
        self.0.borrow_mut().clear();
    }

    fn add(&self, kept: KeptConsumer) -> Option<usize> {
        let mut all = self.0.borrow_mut();
        all.push(kept);
        if all.len() > MAX_KEPT {
            all.pop();
            return None;
        }
        Some(all.len() - 1)
    }

    fn attach(&self, at: usize, x: &mut Exchange) -> bool {
        let all = self.0.borrow();
        let Some(kept) = all.get(at) else { return false };
        x.consumer = Some(kept.consumer.clone());
        x.credential.clone_from(&kept.credential);
        for (name, value) in &kept.fields {
            match value {
                Some(value) => x.request.headers.set(name, value),
                // What the client says of itself does not count.
                None => drop(x.request.headers.remove(name)),
            }
        }
        true
    }
}

/// nil: there is no such consumer, or what the node is to be told of it cannot stand in a field.
fn keep_consumer(s: &Stack) -> Answer {
    let x = request()?;
    let (Some(consumer), credential) = named_consumer(s, &x.snapshot)? else { return Ok(s.push_nil()) };
    let fields: [Field; 3] = [
        ("X-Consumer-Username", s.opt_bytes(1)?.map(Into::into)),
        ("X-Credential-Identifier", s.opt_bytes(2)?.map(Into::into)),
        ("X-Consumer-Custom-Id", s.opt_bytes(3)?.map(Into::into)),
    ];
    if fields.iter().filter_map(|(_, value)| value.as_ref()).any(|value| !value.iter().all(|b| in_value(*b))) {
        return Ok(s.push_nil());
    }
    let vm = vm::current().ok_or("no VM runs")?;
    match vm.consumers.add(KeptConsumer { consumer, credential, fields }) {
        Some(at) => Ok(s.push_number(at as f64)),
        None => Ok(s.push_nil()),
    }
}

crate::export! {
    fn config_version() -> f64, 0.0 => {
        with_snapshot(|c| c.version).or_else(|| in_force().map(|c| c.version)).unwrap_or(0) as f64
    }

    fn consumers_version() -> f64, 0.0 => {
        with_snapshot(|c| c.consumers_uid).unwrap_or(0) as f64
    }

    fn attach_kept(at: u32) -> c_int, 0 => {
        let Some(x) = fast::exchange().filter(|x| (Phases::REWRITE | Phases::ACCESS).has(x.phase)) else { return 0 };
        vm::current().map_or(0, |vm| c_int::from(vm.consumers.attach(at as usize, x)))
    }
}

fn metadata(api: &mut Api) -> Result<()> {
    api.func(
        "native.apisix.metadata_uid",
        Phases::ANY,
        "metadata_uid(plugin) -> number: changes with the plugin's metadata; 0 when there is none.",
        |s| {
            let name = s.arg_str(1)?;
            let uid = in_force().and_then(|c| c.plugin_metadata.get(&*name).map(|o| o.uid));
            Ok(s.push_number(uid.unwrap_or(0) as f64))
        },
    )?;
    api.func(
        "native.apisix.metadata",
        Phases::ANY,
        "metadata(plugin) -> table, revision | nil: `/plugin_metadata/{plugin}`.",
        |s| {
            let name = s.arg_str(1)?;
            let Some(object) = in_force().and_then(|c| c.plugin_metadata.get(&*name).cloned()) else {
                return Ok(s.push_nil());
            };
            push_object(s, &object.value.json)?;
            s.push_number(object.mod_revision as f64);
            Ok(2)
        },
    )?;
    api.func(
        "native.apisix.object",
        Phases::ANY,
        "object(kind, id) -> table, revision | nil: an object of the configuration as it is in force, its plugins' confs decrypted, kind as \
         in the Admin API: \"upstreams\".",
        |s| {
            let (kind, id) = named_kind(s)?;
            let Some(found) = in_force().and_then(|c| stored(&c, kind, &id)) else { return Ok(s.push_nil()) };
            let clear = found.plugins.unwrap_or_default().in_clear(&found.json);
            push_json(s, &Served::of_value(kind, &id, clear).with_priorities().value)?;
            s.push_number(found.revision as f64);
            Ok(2)
        },
    )?;
    api.func(
        "native.apisix.object_uid",
        Phases::ANY,
        "object_uid(kind, id) -> number: changes with the object; 0 when there is none.",
        |s| {
            let found = in_force().and_then(|c| named(s, &c).transpose()).transpose()?;
            Ok(s.push_number(found.map_or(0, |found| found.uid) as f64))
        },
    )?;
    api.func(
        "native.apisix.object_revision",
        Phases::ANY,
        "object_revision(kind, id) -> number: of the object's last change that the worker has seen; 0 when there is none.",
        |s| {
            let revision = named(s, &newest())?.map_or(0, |found| found.revision);
            Ok(s.push_number(revision as f64))
        },
    )
}

/// The object of arguments 1 and 2, kind and id.
fn named(s: &Stack, config: &Snapshot) -> Result<Option<Stored>, Raise> {
    let (kind, id) = named_kind(s)?;
    Ok(stored(config, kind, &id))
}

fn named_kind<'a>(s: &'a Stack) -> Result<(model::Kind, Cow<'a, str>), Raise> {
    let (kind, id) = (s.arg_str(1)?, s.arg_str(2)?);
    match model::Kind::ALL.into_iter().find(|k| k.plural() == kind) {
        Some(kind) => Ok((kind, id)),
        None => Err(format!("there are no {kind}").into()),
    }
}

/// What scripts read of an object.
struct Stored {
    json: Arc<str>,
    plugins: Option<Plugins>,
    revision: i64,
    uid: u64,
}

fn stored(config: &Snapshot, kind: model::Kind, id: &str) -> Option<Stored> {
    fn of<T>(object: &Arc<Object<T>>) -> Stored {
        Stored { json: object.json.clone(), plugins: None, revision: object.mod_revision, uid: object.uid }
    }
    let with = |found: Stored, plugins: &Plugins| Stored { plugins: Some(plugins.clone()), ..found };
    use model::Kind;
    match kind {
        Kind::Route => config.routes.get(id).map(|o| with(of(o), &o.value.plugins)),
        Kind::Service => config.services.get(id).map(|o| with(of(o), &o.value.plugins)),
        Kind::Upstream => config.upstreams.get(id).map(of),
        Kind::Consumer => config.consumers.get(id).map(|o| with(of(o), &o.value.plugins)),
        Kind::Credential => config.credentials.get(id).map(|o| with(of(o), &o.value.plugins)),
        Kind::ConsumerGroup => config.consumer_groups.get(id).map(|o| with(of(o), &o.value.plugins)),
        Kind::PluginConfig => config.plugin_configs.get(id).map(|o| with(of(o), &o.value.plugins)),
        Kind::GlobalRule => config.global_rules.iter().find(|o| *o.id == *id).map(|o| with(of(o), &o.value.plugins)),
        Kind::PluginMetadata => config.plugin_metadata.get(id).map(|o| Stored { json: o.value.json.clone(), ..of(o) }),
        // Keys, sources of code and secrets are not for every plugin to read.
        Kind::Ssl | Kind::Secret | Kind::Function | Kind::PluginSource => None,
        Kind::StreamRoute => config.stream_routes.get(id).map(of),
        Kind::Proto | Kind::GraphqlCostDecoration => config.others.get(&(kind, id.into())).map(of),
    }
}

fn secrets(api: &mut Api) -> Result<()> {
    api.func(
        "native.apisix.secret_uid",
        Phases::ANY,
        "secret_uid(\"manager/id\") -> number: changes with the manager's configuration; 0 when there is none.",
        |s| {
            let uid = secret(&newest(), &s.arg_str(1)?).map_or(0, |o| o.uid);
            Ok(s.push_number(uid as f64))
        },
    )?;
    api.func(
        "native.apisix.secret",
        Phases::ANY,
        "secret(\"manager/id\") -> table, revision | nil: `/secrets/{manager}/{id}`.",
        |s| {
            let Some(object) = secret(&newest(), &s.arg_str(1)?) else { return Ok(s.push_nil()) };
            push_object(s, &object.json)?;
            s.push_number(object.mod_revision as f64);
            Ok(2)
        },
    )?;
    api.func(
        "native.apisix.secrets",
        Phases::ANY,
        "secrets() -> array of { value, key, modifiedIndex }, version: all managers' configurations; the version changes with each.",
        all_secrets,
    )
}

fn secret(config: &Snapshot, id: &str) -> Option<Arc<Object<()>>> {
    config.others.get(&(model::Kind::Secret, id.into())).cloned()
}

/// One number for several, that a Lua number holds (FNV-1a, cut to 52 bits).
fn mixed(all: u64, one: u64) -> u64 {
    ((all ^ one).wrapping_mul(0x100_0000_01b3)) & ((1 << 52) - 1)
}

fn all_secrets(s: &Stack) -> Answer {
    let config = newest();
    let mut all: Vec<_> = config.others.iter().filter(|((kind, _), _)| *kind == model::Kind::Secret).collect();
    all.sort_by_key(|(_, o)| o.uid);
    let mut version = 0;
    s.push_table(all.len(), 0);
    for (i, ((_, id), object)) in all.iter().enumerate() {
        s.push_table(0, 3);
        push_object(s, &object.json)?;
        s.set(-2, "value");
        s.push_bytes(format!("/secrets/{id}"));
        s.set(-2, "key");
        s.push_number(object.mod_revision as f64);
        s.set(-2, "modifiedIndex");
        s.set_index(-2, i + 1);
        version = mixed(version, object.uid);
    }
    s.push_number(version as f64);
    Ok(2)
}

fn heads(api: &mut Api) -> Result<()> {
    api.func(
        "native.apisix.content_type_set",
        Phases::REQUEST,
        "content_type_set() -> boolean: whether the response has a Content-Type.",
        |s| Ok(s.push_bool(request()?.response.headers.contains("content-type"))),
    )?;
    api.func(
        "native.apisix.response_source",
        Phases::REQUEST,
        "response_source() -> \"upstream\" | \"apisix\" | \"nginx\": who made the response.",
        |s| Ok(s.push_bytes(request()?.source_name())),
    )
}

/// An upstream that a plugin described, parsed once.
struct Handle(Arc<model::Upstream>);

impl mlua::UserData for Handle {}

fn upstreams(api: &mut Api) -> Result<()> {
    let make = api.lua().create_function(|_, text: String| Ok(made(parse_upstream(&text).map(Handle))));
    api.value(
        "native.apisix.make_upstream",
        "make_upstream(json) -> handle | nil, err: an upstream to choose for requests.",
        make.map_err(script)?,
    )?;
    let check = api.lua().create_function(|_, text: String| Ok(made(parse_upstream(&text).map(|_| true))));
    api.value(
        "native.apisix.check_upstream",
        "check_upstream(json) -> true | nil, err: whether it describes an upstream.",
        check.map_err(script)?,
    )?;
    api.func(
        "native.apisix.served_upstream",
        Phases::ANY,
        "served_upstream(json) -> table: an upstream that has passed its check as it is in force: with defaults, its nodes a list.",
        |s| {
            let served = Served::of(model::Kind::Upstream, "", &s.arg_str(1)?).with_priorities();
            push_json(s, &served.value).map(|()| 1)
        },
    )?;
    let choose = api.lua().create_function(|_, handle: mlua::UserDataRef<Handle>| {
        if let Some(x) = fast::exchange() {
            x.upstream.chosen = Some(handle.0.clone());
        }
        Ok(())
    });
    api.value(
        "native.apisix.choose_upstream",
        "choose_upstream(handle): the request goes to this upstream.",
        choose.map_err(script)?,
    )
}

fn made<T>(result: Result<T>) -> (Option<T>, Option<String>) {
    match result {
        Ok(value) => (Some(value), None),
        Err(e) => (None, Some(e.to_string())),
    }
}

fn parse_upstream(text: &str) -> Result<Arc<model::Upstream>> {
    // A conf that reaches Lua is decrypted already.
    let keyring = Keyring::default();
    match parse(model::Kind::Upstream, "", text, &ParseContext::new(&keyring))? {
        Parsed::Upstream(mut upstream) => {
            if let Some(upstream) = Arc::get_mut(&mut upstream) {
                upstream.id = None;
            }
            Ok(upstream)
        }
        _ => Err(Error::config(Kind::Invalid).context("not an upstream")),
    }
}

/// What is stored is not for uploaded functions, by whichever module they come.
fn snapshot() -> Option<Arc<Snapshot>> {
    if is_function() {
        return None;
    }
    fast::exchange().map(|x| x.snapshot.clone())
}

/// The request's configuration; in timers, at the start and in checks the newest.
fn in_force() -> Option<Arc<Snapshot>> {
    snapshot().or_else(|| (!is_function()).then(newest))
}

fn is_function() -> bool {
    vm::current().is_some_and(|vm| vm.config.purpose == Purpose::Functions)
}

/// What references to secrets are resolved by: the newest of the request's configuration, the one that the worker has seen
/// last, and what is served. A conf is one version's, a secret is what its manager says now.
fn newest() -> Arc<Snapshot> {
    let seen = vm::current().map(|vm| vm.snapshot());
    let served = super::store::published().map(|published| published.load());
    [snapshot(), seen, served].into_iter().flatten().max_by_key(|c| c.version).unwrap_or_default()
}

fn with_snapshot<R>(read: impl FnOnce(&Snapshot) -> R) -> Option<R> {
    fast::exchange().map(|x| read(&x.snapshot))
}

fn arg(s: &Stack, i: c_int) -> Result<Box<str>, Raise> {
    Ok(s.arg_str(i)?.into())
}

fn push_text(s: &Stack, json: Option<&str>) -> Answer {
    match json {
        Some(text) => push_object(s, text).map(|()| 1),
        None => Ok(s.push_nil()),
    }
}

/// Stored texts are valid JSON; one that is not reads as null.
fn push_object(s: &Stack, json: &str) -> Result<(), Raise> {
    push_json(s, &serde_json::from_str(json).unwrap_or(Value::Null))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn consumers_with_a_number_are_bounded() {
        let keyring = Keyring::default();
        let context = ParseContext::new(&keyring);
        let Ok(Parsed::Consumer(value)) = parse(model::Kind::Consumer, "jack", r#"{"username": "jack"}"#, &context)
        else {
            panic!("a consumer")
        };
        let consumer = Arc::new(Object {
            id: "jack".into(),
            uid: 1,
            create_revision: 1,
            mod_revision: 1,
            json: "{}".into(),
            value,
        });
        let kept = KeptConsumers::default();
        let add = || {
            let fields = ["a", "b", "c"].map(|name| (name, None));
            kept.add(KeptConsumer { consumer: consumer.clone(), credential: None, fields })
        };
        assert!((0..MAX_KEPT).all(|at| add() == Some(at)));
        assert_eq!(add(), None);
        assert_eq!(kept.0.borrow().len(), MAX_KEPT);
        kept.clear();
        assert_eq!(add(), Some(0));
    }
}
