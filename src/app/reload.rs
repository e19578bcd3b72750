//! SIGHUP: the configuration file is read again. What plugins, locations and the proxy go by is taken over at once, with new
//! VMs beside the old ones, which end with their last request; shared dictionaries stay. Of the rest (listeners, stores, the APIs) the
//! log says that it waits for a restart.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use serde_json::Value;
use tokio::sync::watch;

use super::{plugins::Plugins, worker::Blueprint};
use crate::{
    conf::{self, Config, Warning, admin_key},
    observe::log::{self, Level},
    plugin::{Setup, Watching},
    shdict,
    store::{Handle, RELOAD},
};

/// What is read once, when the gateway starts: these keys and what is below them.
const AT_START: &[&str] = &[
    "apisix.control",
    "apisix.data_encryption",
    "apisix.dns_resolver",
    "apisix.dns_resolver_valid",
    "apisix.enable_admin",
    "apisix.enable_control",
    "apisix.enable_http2",
    "apisix.enable_ipv6",
    "apisix.node_listen",
    "apisix.proxy_mode",
    "apisix.proxy_protocol",
    "apisix.resolver_timeout",
    "apisix.router",
    "apisix.ssl",
    "apisix.status",
    "apisix.stream_proxy",
    "apisix.trace",
    "deployment",
    "lua.preload",
    "lua_listen",
    "lua_options.lua_capture_error_log",
    "nginx_config.enable_cpu_affinity",
    "nginx_config.envs",
    "nginx_config.error_log",
    "nginx_config.event",
    "nginx_config.http.access_log",
    "nginx_config.http.access_log_buffer",
    "nginx_config.http.access_log_format",
    "nginx_config.http.access_log_format_escape",
    "nginx_config.http.client_body_timeout",
    "nginx_config.http.client_header_timeout",
    "nginx_config.http.client_max_body_size",
    "nginx_config.http.enable_access_log",
    "nginx_config.http.keepalive_timeout",
    "nginx_config.http.send_timeout",
    "nginx_config.http.underscores_in_headers",
    "nginx_config.stream",
    "nginx_config.worker_processes",
    "nginx_config.worker_shutdown_timeout",
    "plugin_attr.prometheus",
    "test_node",
];
/// What decides which plugins there are, and what their confs are checked by.
const OF_PLUGINS: &[&str] = &[
    "apisix.extra_lua_path",
    "apisix.extra_lua_cpath",
    "apisix.lua_module_hook",
    "lua_package_path",
    "lua_package_cpath",
    "plugins",
    "plugin_attr",
];
/// Keys named in one line of the log.
const MAX_NAMED: usize = 20;

pub struct Reload {
    /// What the gateway started with.
    first: Config,
    /// Where the Admin and the control API listen.
    places: (Option<SocketAddr>, Option<SocketAddr>),
    /// What was read last.
    last: Arc<Value>,
    plugins: Plugins,
    pipeline: Handle,
    watching: Arc<Watching>,
}

impl Reload {
    pub fn new(
        config: &Config,
        places: (Option<SocketAddr>, Option<SocketAddr>),
        plugins: Plugins,
        (pipeline, watching): (Handle, Arc<Watching>),
    ) -> Reload {
        Reload { first: config.clone(), places, last: config.json.clone(), plugins, pipeline, watching }
    }

    /// Takes over what can change. A file with mistakes changes nothing: each of them is logged. `plugins`: those are loaded anew for
    /// the control thread even if nothing says that they have changed; where one that is loaded does not load any more, nothing
    /// changes either. The number of the new blueprint, or why there is none.
    pub async fn reload(&mut self, blueprints: &watch::Sender<Blueprint>, plugins: bool) -> Result<u64, String> {
        let Some(next) = self.read() else {
            tracing::error!("the configuration was not reloaded, the old one goes on");
            return Err("the configuration file has mistakes, which error.log names: nothing was reloaded".into());
        };
        for (name, size) in &next.shared_dicts {
            shdict::store().declare(name, *size);
        }
        let setup = Setup::of(&next).watched(self.watching.clone());
        let changed = differences_of(&self.last, &next.json);
        let (reloading, snapshot) = {
            let blueprint = blueprints.borrow();
            (blueprint.reloading.clone(), blueprint.published.load())
        };
        reloading.store(true, Ordering::Release);
        // Also where nothing changes for plugins now: what a reload of plugins reads is for the workers, too.
        let before = self.plugins.checker().setup();
        self.plugins.set_up(setup.clone());
        // Nor has what was new for them been taken over where the last reload has failed.
        let is_due = plugins || snapshot.errors.contains_key(RELOAD);
        let loaded = match is_due || changed.iter().any(|path| is_under(path, OF_PLUGINS)) {
            true => self.pipeline.reload_plugins_here().await.map(drop),
            false => self.plugins.checker().would_load(&snapshot),
        };
        if let Err(e) = loaded {
            self.plugins.set_up(before);
            reloading.store(false, Ordering::Release);
            tracing::error!("the configuration was not reloaded, the old one goes on: {e}");
            return Err(e.to_string());
        }
        if let Some(level) = Level::from_name(&next.error_log_level) {
            log::set_level(level);
        }
        self.last = next.json.clone();
        tell(&differences_of(&self.first.json, &next.json));
        blueprints.send_modify(|blueprint| {
            blueprint.setup = setup;
            blueprint.config = Arc::new(next);
            blueprint.number += 1;
        });
        reloading.store(false, Ordering::Release);
        Ok(blueprints.borrow().number)
    }

    fn read(&self) -> Option<Config> {
        let (mut next, warnings) = match conf::load(&self.first.prefix, self.first.file.as_deref()) {
            Ok(loaded) => loaded,
            Err(mistakes) => {
                mistakes.0.iter().for_each(|mistake| tracing::error!("{mistake}"));
                return None;
            }
        };
        if let Err(e) = admin_key::ensure(&mut next) {
            tracing::error!("{e}");
            return None;
        }
        conf::note_places(&mut next, &self.first.json, self.places.0, self.places.1);
        warnings.iter().for_each(|Warning(text)| tracing::warn!("{text}"));
        Some(next)
    }
}

fn is_under(path: &str, keys: &[&str]) -> bool {
    keys.iter().any(|key| path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

fn differences_of(old: &Value, new: &Value) -> Vec<String> {
    let mut changed = Vec::new();
    differences(old, new, "", &mut changed);
    changed
}

fn tell(changed: &[String]) {
    let waiting: Vec<&str> = changed.iter().map(String::as_str).filter(|path| is_under(path, AT_START)).collect();
    if waiting.is_empty() {
        return tracing::warn!("the configuration was reloaded");
    }
    tracing::warn!("the configuration was reloaded; these changes need a restart: {}", named(&waiting));
}

/// The first of them, and how many more there are.
fn named(waiting: &[&str]) -> String {
    match waiting.len().saturating_sub(MAX_NAMED) {
        0 => waiting.join(", "),
        more => format!("{} and {more} more", waiting[..MAX_NAMED].join(", ")),
    }
}

/// The paths whose values differ.
fn differences(old: &Value, new: &Value, path: &str, out: &mut Vec<String>) {
    let (Value::Object(a), Value::Object(b)) = (old, new) else {
        if old != new {
            out.push(path.to_owned());
        }
        return;
    };
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    for (key, value) in a {
        differences(value, b.get(key).unwrap_or(&Value::Null), &below(key), out);
    }
    for key in b.keys().filter(|key| !a.contains_key(*key)) {
        out.push(below(key));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_differs_is_named_by_its_path() {
        let old = json!({"a": {"b": 1, "c": [1]}, "d": true});
        let new = json!({"a": {"b": 2, "c": [1], "e": {}}});
        let mut found = Vec::new();
        differences(&old, &new, "", &mut found);
        assert_eq!(found, ["a.b", "a.e", "d"]);
        found.clear();
        differences(&old, &old, "", &mut found);
        assert!(found.is_empty());
    }

    #[test]
    fn what_is_read_once_is_told_with_what_is_below_it() {
        for path in ["nginx_config.stream.real_ip_from", "nginx_config.envs", "test_node.serve_on_node"] {
            assert!(is_under(path, AT_START), "{path}");
        }
        for path in ["nginx_config.streams", "lua_locations", "nginx_config"] {
            assert!(!is_under(path, AT_START), "{path}");
        }
    }

    #[test]
    fn only_so_many_are_named() {
        let mut waiting = ["a"; MAX_NAMED].to_vec();
        let all = named(&waiting);
        assert_eq!(all.matches('a').count(), MAX_NAMED);
        waiting.extend(["b", "c"]);
        assert_eq!(named(&waiting), all + " and 2 more");
    }
}
