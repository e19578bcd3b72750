//! Which plugins run for a request: merged in APISIX's order, sorted, made once per combination of versions.
//!
//! Pure but for nothing: a `Key` names the versions, `owners` says what they come to. `run` turns that into Lua lists.

use std::{cmp::Reverse, collections::HashSet, rc::Rc, sync::Arc};

use smallvec::SmallVec;

use super::registry;
use crate::{
    exchange::{Exchange, watch::Planned},
    model::{self, Object, PluginConf, Plugins},
};

/// The versions that a plan depends on; 0 for what is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Key {
    pub global_rules: u64,
    pub route: u64,
    pub service: u64,
    pub plugin_config: u64,
    pub consumer: u64,
    pub credential: u64,
    pub group: u64,
    /// What of the request is noted: see `Watched`.
    pub watched: Watched,
}

/// What a plan does beside its plugins. Requests that nobody watches have plans that do not know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Watched {
    /// The calls of plugins are noted.
    pub noted: bool,
    /// The functions of `require("apisix")` are called that stand for the phases, so that hooks on them tell; `dynamic`: but for
    /// that which in APISIX decides on it.
    pub hooked: bool,
    pub dynamic: bool,
}

impl Watched {
    fn of(x: &Exchange) -> Watched {
        let Some(watch) = &x.watch else { return Watched::default() };
        Watched { noted: watch.traced || watch.named, hooked: watch.hooked, dynamic: watch.dynamic }
    }
}

/// What the plugins come from, found once per request.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    route: Option<&'a Arc<Object<model::Route>>>,
    service: Option<&'a Arc<Object<model::Service>>>,
    plugin_config: Option<&'a Arc<Object<model::PluginConfig>>>,
    consumer: Option<&'a Arc<Object<model::Consumer>>>,
    credential: Option<&'a Arc<Object<model::Credential>>>,
    group: Option<&'a Arc<Object<model::ConsumerGroup>>>,
    x: &'a Exchange,
}

impl<'a> Sources<'a> {
    pub fn of(x: &'a Exchange) -> Sources<'a> {
        let route = x.matched.as_ref().map(|m| m.route());
        let service = x.matched.as_ref().and_then(|m| m.service.as_ref());
        let plugin_config =
            route.and_then(|r| r.value.plugin_config_id.as_ref()).and_then(|id| x.snapshot.plugin_configs.get(id));
        let group = x
            .consumer
            .as_ref()
            .and_then(|c| c.value.group_id.as_ref())
            .and_then(|id| x.snapshot.consumer_groups.get(id));
        let (consumer, credential) = (x.consumer.as_ref(), x.credential.as_ref());
        Sources { route, service, plugin_config, consumer, credential, group, x }
    }

    pub fn key(&self) -> Key {
        fn uid<T>(o: Option<&Arc<Object<T>>>) -> u64 {
            o.map_or(0, |o| o.uid)
        }
        Key {
            global_rules: self.x.snapshot.global_rules_uid,
            route: uid(self.route),
            service: uid(self.service),
            plugin_config: uid(self.plugin_config),
            consumer: uid(self.consumer),
            credential: uid(self.credential),
            group: uid(self.group),
            watched: Watched::of(self.x),
        }
    }

    /// Whether the consumer, its credential or its group bring plugins that run: what they authenticate with does not.
    pub fn consumer_joins(&self, plugins: &registry::Plugins, broken: &registry::Broken) -> bool {
        let runs = |conf: &Arc<PluginConf>| match plugins.get(&*conf.name) {
            Some(plugin) => !plugin.auth,
            None => broken.why(&conf.name).is_some(),
        };
        let any = |of: Option<&Plugins>| of.is_some_and(|of| of.0.iter().any(runs));
        any(self.consumer.map(|o| &o.value.plugins))
            || any(self.credential.map(|o| &o.value.plugins))
            || any(self.group.map(|o| &o.value.plugins))
    }

    /// Whether nothing has any plugin.
    pub fn is_empty(&self) -> bool {
        self.x.watch.as_ref().is_none_or(|watch| !watch.hooked)
            && self.x.snapshot.global_rules.is_empty()
            && self.route.is_none_or(|o| o.value.plugins.is_empty())
            && self.service.is_none_or(|o| o.value.plugins.is_empty())
            && self.plugin_config.is_none()
            && self.consumer.is_none()
    }

    /// A plugin of these that would run, and does not load: its name, and where it stands (`/routes/1`). What a credential has are
    /// plugins to authenticate with, which do not run for it.
    pub fn first_broken(&self, plugins: &registry::Plugins, broken: &registry::Broken) -> Option<(Arc<str>, String)> {
        let mut items = Sources { credential: None, ..*self }.merged(plugins).items;
        for rule in self.x.snapshot.global_rules.iter() {
            let mut of_rule = Vec::new();
            overlay(&mut of_rule, &rule.value.plugins, || owner_of("global_rules", rule), Layer::Route);
            items.append(&mut of_rule);
        }
        let found = items.into_iter().find(|i| !i.conf.meta.disable && broken.why(&i.conf.name).is_some())?;
        Some((found.conf.name.clone(), found.key))
    }

    /// The owners of plugins in the order in which they run: each global rule, then the route with all that is merged
    /// into it.
    pub fn owners(&self, plugins: &registry::Plugins) -> Vec<Owner> {
        let route = self.merged(plugins);
        let mut owners = Vec::new();
        let twice = self.in_several_rules();
        for rule in self.x.snapshot.global_rules.iter() {
            let mut items: Vec<Item> = Vec::new();
            overlay(&mut items, &rule.value.plugins, || owner_of("global_rules", rule), Layer::Route);
            items.retain(|item| {
                if twice.contains(&&*item.conf.name) {
                    return false;
                }
                let prefers = plugins.get(&*item.conf.name).is_some_and(|p| p.prefer_route);
                !(prefers && route.items.iter().any(|r| r.conf.name == item.conf.name && !r.conf.meta.disable))
            });
            owners.push(Owner {
                global: true,
                conf_type: "global_rule".into(),
                conf_id: rule.id.to_string(),
                conf_version: rule.mod_revision.to_string(),
                items: sorted(items, plugins),
            });
        }
        owners.push(Owner { items: sorted(route.items, plugins), ..route });
        owners
    }

    /// Plugins of more than one global rule: which one counts nobody has said, so none runs.
    fn in_several_rules(&self) -> Vec<&str> {
        let (mut seen, mut twice) = (HashSet::new(), Vec::new());
        for conf in self.x.snapshot.global_rules.iter().flat_map(|rule| rule.value.plugins.0.iter()) {
            if !seen.insert(&*conf.name) && !twice.contains(&&*conf.name) {
                let name = &conf.name;
                tracing::error!(
                    "Found {name} configured across different global rules. Removing it from execution list"
                );
                twice.push(&**name);
            }
        }
        twice
    }

    /// Consumer over consumer_group over route over plugin_config over service.
    fn merged(&self, plugins: &registry::Plugins) -> Owner {
        let mut owner = Owner::default();
        let mut items = Vec::new();
        if let Some(service) = self.service {
            overlay(&mut items, &service.value.plugins, || owner_of("services", service), Layer::Route);
        }
        if let Some(config) = self.plugin_config {
            overlay(&mut items, &config.value.plugins, || owner_of("plugin_configs", config), Layer::Route);
        }
        if let Some(route) = self.route {
            overlay(&mut items, &route.value.plugins, || owner_of("routes", route), Layer::Route);
            owner.join("route", &route.id, route.mod_revision);
        }
        if let Some(config) = self.plugin_config {
            owner.conf_version.push_str(&format!("#{}", config.mod_revision));
        }
        if let Some(service) = self.service {
            owner.join("service", &service.id, service.mod_revision);
        }
        // What a consumer authenticates with is not what the route's auth plugin runs with.
        let is_auth = |name: &str| plugins.get(name).is_some_and(|p| p.auth);
        if let Some(group) = self.group {
            let layer = Layer::Consumer { consumer_schema: false, skip: &is_auth };
            overlay(&mut items, &group.value.plugins, || owner_of("consumer_groups", group), layer);
        }
        if let Some(consumer) = self.consumer {
            let layer = Layer::Consumer { consumer_schema: true, skip: &is_auth };
            overlay(&mut items, &consumer.value.plugins, || owner_of("consumers", consumer), layer);
            let version = self.x.snapshot.consumers_uid as i64;
            owner.join("consumer", &consumer.value.username, version);
        }
        if let Some(credential) = self.credential {
            let layer = Layer::Consumer { consumer_schema: true, skip: &is_auth };
            overlay(&mut items, &credential.value.plugins, || owner_of("consumers", credential), layer);
        }
        if let Some(group) = self.group {
            owner.join("consumer_group", &group.id, group.mod_revision);
        }
        owner.items = items;
        owner
    }
}

/// An owner of plugins and what `ctx` says while they run.
#[derive(Debug, Default)]
pub struct Owner {
    pub global: bool,
    /// `route&service`
    pub conf_type: String,
    pub conf_id: String,
    pub conf_version: String,
    /// In the order in which they run.
    pub items: Vec<Item>,
}

impl Owner {
    /// `global_rule/1`, `route`: as those are told who watch.
    pub fn name(&self) -> Box<str> {
        if self.global { format!("global_rule/{}", self.conf_id).into() } else { "route".into() }
    }

    fn join(&mut self, kind: &str, id: &str, version: i64) {
        let joint = if self.conf_type.is_empty() { "" } else { "&" };
        self.conf_type.push_str(&format!("{joint}{kind}"));
        self.conf_id.push_str(&format!("{joint}{id}"));
        self.conf_version.push_str(&format!("{joint}{version}"));
    }
}

/// One plugin of an owner.
#[derive(Debug)]
pub struct Item {
    pub conf: Arc<PluginConf>,
    /// The resource that the conf stands in, and its revision: `_meta.parent`.
    pub key: String,
    pub version: i64,
    /// Checked against the plugin's consumer schema.
    pub consumer_schema: bool,
    /// The route has no such plugin: its rewrite runs once the consumer is known.
    pub consumer_only: bool,
}

#[derive(Clone, Copy)]
enum Layer<'a> {
    Route,
    Consumer { consumer_schema: bool, skip: &'a dyn Fn(&str) -> bool },
}

fn owner_of<T>(plural: &str, o: &Object<T>) -> (String, i64) {
    (format!("/{plural}/{}", o.id), o.mod_revision)
}

/// Puts `over` on `items`: the later one of a name wins.
fn overlay(items: &mut Vec<Item>, over: &Plugins, owner: impl Fn() -> (String, i64), layer: Layer<'_>) {
    for conf in over.0.iter() {
        let (consumer, consumer_schema) = match layer {
            Layer::Consumer { skip, .. } if skip(&conf.name) => continue,
            Layer::Consumer { consumer_schema, .. } => (true, consumer_schema),
            Layer::Route => (false, false),
        };
        let at = items.iter().position(|i| i.conf.name == conf.name);
        let consumer_only = consumer && at.is_none_or(|i| items[i].consumer_only);
        let (key, version) = owner();
        let item = Item { conf: conf.clone(), key, version, consumer_schema, consumer_only };
        match at {
            Some(at) => items[at] = item,
            None => items.push(item),
        }
    }
}

/// Without what is disabled or not loaded, by falling priority; equal ones by name, so that every worker agrees.
fn sorted(mut items: Vec<Item>, plugins: &registry::Plugins) -> Vec<Item> {
    items.retain(|i| !i.conf.meta.disable && plugins.contains_key(&*i.conf.name));
    items.sort_by_key(|i| {
        let own = plugins.get(&*i.conf.name).map_or(0, |p| p.priority);
        (Reverse(i.conf.meta.priority.unwrap_or(own)), i.conf.name.clone())
    });
    items
}

/// What is to run, for those who watch.
pub fn planned(owners: &[Owner], plugins: &registry::Plugins) -> Rc<[Planned]> {
    let of_owner = |owner: &'_ Owner| {
        let (name, is_global) = (owner.name(), owner.global);
        let of_item = move |item: &Item| {
            let info = plugins.get(&*item.conf.name);
            Planned {
                name: (&*item.conf.name).into(),
                priority: item.conf.meta.priority.unwrap_or(info.map_or(0, |info| info.priority)),
                owner: name.clone(),
                is_global,
                from: item.key.as_str().into(),
                phases: registry::PHASES
                    .into_iter()
                    .filter(|phase| info.is_some_and(|i| i.phases.has(*phase)))
                    .collect(),
            }
        };
        owner.items.iter().map(of_item).collect::<Vec<_>>()
    };
    owners.iter().flat_map(of_owner).collect()
}

/// Names of the plugins that stand in any owner, disabled ones left out.
pub fn names(owners: &[Owner]) -> SmallVec<[&str; 8]> {
    owners.iter().flat_map(|o| o.items.iter().map(|i| &*i.conf.name)).collect()
}
