//! What is noted about one request whose operator wants to know what becomes of it: a trace, the `Apisix-Plugins` header of the
//! debug mode, its hooks. All others have none of it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{Exchange, Headers, Phase, secrets};

/// Entries of each kind that are kept of one request: a hundred plugins with all their phases fit.
const MAX_ENTRIES: usize = 1000;
/// Changed fields that are kept of one request.
const MAX_CHANGES: usize = 500;
/// Bytes of a field's value that are kept.
const MAX_VALUE: usize = 256;
/// Subrequests of one request that are told of, those within others included.
const MAX_CHILDREN: usize = 100;
/// Locations that were asked and are told of, in all looks for one of a request and its subrequests.
const MAX_TRIED: usize = 1000;

/// What is noted of a request.
#[derive(Debug, Default)]
pub struct Watch {
    /// It is traced: everything is noted.
    pub traced: bool,
    /// The response says which plugins ran: `Apisix-Plugins`.
    pub named: bool,
    /// The functions that conf/debug.yaml names tell of their calls.
    pub hooked: bool,
    /// Only for this request, which asked for it.
    pub dynamic: bool,
    /// Routes whose path fits, in the order in which they were looked at.
    pub candidates: Vec<Candidate>,
    /// Each look for a location, in their order: one, and one more for each jump.
    pub locations: Vec<Choice>,
    /// What was to run.
    pub plan: Rc<[Planned]>,
    /// What ran, in its order.
    pub ran: Vec<Ran>,
    /// The header that names what ran is in the response already.
    pub told: bool,
    /// Subrequests that have ended, as JSON.
    pub children: Children,
    /// Further names of fields and arguments that hold secrets.
    pub secrets: Rc<secrets::Named>,
    open: Option<Open>,
    changes: usize,
}

/// Traces of subrequests. Each of them has a clone, as it ends while the request that made it waits.
#[derive(Clone, Debug, Default)]
pub struct Children {
    ended: Rc<RefCell<Vec<Value>>>,
    /// Of all requests within the traced one.
    counted: Rc<Cell<usize>>,
    /// Locations that were asked for all of them.
    tried: Rc<Cell<usize>>,
}

impl Children {
    /// For a subrequest; `None`: there are too many.
    pub fn one_more(&self) -> Option<Children> {
        let n = self.counted.get();
        self.counted.set(n + 1);
        (n < MAX_CHILDREN).then(|| Children { ended: Rc::default(), ..self.clone() })
    }

    /// Whether one more location that was asked is to be told of.
    pub fn tells_location(&self) -> bool {
        let n = self.tried.get();
        self.tried.set(n + 1);
        n < MAX_TRIED
    }

    pub fn keep(&self, trace: Value) {
        self.ended.borrow_mut().push(trace);
    }

    pub fn take(&self) -> Vec<Value> {
        self.ended.take()
    }

    /// Subrequests that nobody will tell of.
    pub fn untold(&self) -> usize {
        self.counted.get().saturating_sub(MAX_CHILDREN)
    }
}

/// A look for the location of a path.
#[derive(Debug)]
pub struct Choice {
    pub path: String,
    pub tried: Vec<Tried>,
    pub chosen: Option<String>,
}

/// A location that was asked whether it is for a path.
#[derive(Debug)]
pub struct Tried {
    pub location: String,
    pub fits: bool,
}

impl Choice {
    pub fn of(path: &[u8]) -> Choice {
        Choice { path: String::from_utf8_lossy(path).into_owned(), tried: Vec::new(), chosen: None }
    }

    pub fn tried(&mut self, location: String, fits: bool) {
        self.tried.push(Tried { location, fits });
    }
}

/// A route that was looked at.
#[derive(Debug)]
pub struct Candidate {
    pub route: Box<str>,
    pub uri: Box<str>,
    /// What of the route the request does not fulfil: `host`, `uri`, `methods`, `remote_addrs`, `vars`, `filter_func`. `None`: it fits.
    pub refused: Option<&'static str>,
}

/// A plugin of a plan.
#[derive(Clone, Debug)]
pub struct Planned {
    pub name: Box<str>,
    pub priority: i64,
    /// `global_rule/1`, `route`.
    pub owner: Box<str>,
    pub is_global: bool,
    /// The resource that its configuration stands in: `/routes/1`.
    pub from: Box<str>,
    /// The phases that it has functions for.
    pub phases: Vec<Phase>,
}

/// One plugin's function.
#[derive(Debug)]
pub struct Ran {
    pub plugin: Box<str>,
    pub phase: Box<str>,
    pub owner: Box<str>,
    /// How long after the request's start it was called first.
    pub at: Duration,
    /// A body filter is called for each piece.
    pub calls: u64,
    /// Of all calls, waits included.
    pub took: Duration,
    /// The status with which it has answered.
    pub answered: Option<u16>,
    /// Its last call did not come to an end.
    pub cut_off: bool,
    pub changes: Vec<Change>,
}

/// A field of the request's head, or the response's, that a plugin has changed.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    pub of_response: bool,
    pub name: String,
    /// Several fields of that name are joined. `None`: it is gone.
    pub value: Option<String>,
}

/// A call that has not come back.
#[derive(Debug)]
struct Open {
    entry: usize,
    request: Headers,
    response: Headers,
    since: Instant,
}

impl Exchange {
    /// A plugin's function is about to be called.
    pub fn watch_start(&mut self, plugin: &str, phase: &str, owner: &str) {
        let Some(watch) = self.watch.as_deref_mut() else { return };
        watch.cut_off();
        let same = |ran: &Ran| &*ran.plugin == plugin && &*ran.phase == phase && &*ran.owner == owner;
        // Pieces of a body follow each other: what was called before is near the end.
        let entry = match watch.ran.iter().rposition(same) {
            Some(entry) => entry,
            None if watch.ran.len() >= MAX_ENTRIES => return,
            None => {
                watch.ran.push(Ran {
                    plugin: plugin.into(),
                    phase: phase.into(),
                    owner: owner.into(),
                    at: self.started.elapsed(),
                    calls: 0,
                    took: Duration::ZERO,
                    answered: None,
                    cut_off: false,
                    changes: Vec::new(),
                });
                watch.ran.len() - 1
            }
        };
        let head = |headers: &Headers| if watch.traced { headers.clone() } else { Headers::default() };
        let (request, response) = (head(&self.request.headers), head(&self.response.headers));
        watch.open = Some(Open { entry, request, response, since: Instant::now() });
    }

    /// The same function has come back, with the status of an answer if it gives one. True: this was its first call.
    pub fn watch_end(&mut self, answered: Option<u16>) -> bool {
        let now = Instant::now();
        let Some(watch) = self.watch.as_deref_mut() else { return false };
        let Some(open) = watch.open.take() else { return false };
        let (traced, secrets) = (watch.traced, watch.secrets.clone());
        let Some(ran) = watch.ran.get_mut(open.entry) else { return false };
        ran.calls += 1;
        ran.took += now - open.since;
        ran.answered = answered.or(ran.answered);
        if traced {
            let heads = [(false, &open.request, &self.request.headers), (true, &open.response, &self.response.headers)];
            for (of_response, before, after) in heads {
                let room = MAX_CHANGES.saturating_sub(watch.changes);
                let from = ran.changes.len();
                differences((of_response, &secrets), before, after, room, &mut ran.changes);
                watch.changes += ran.changes.len() - from;
            }
        }
        ran.calls == 1
    }
}

impl Watch {
    /// A call that never came back: an error, `ngx.exit`, or a client that went away.
    pub fn cut_off(&mut self) {
        if let Some(open) = self.open.take()
            && let Some(ran) = self.ran.get_mut(open.entry)
        {
            ran.calls += 1;
            ran.took += open.since.elapsed();
            ran.cut_off = true;
        }
    }
}

type Fields<'a> = BTreeMap<Vec<u8>, Vec<&'a [u8]>>;

fn fields(headers: &Headers) -> Fields<'_> {
    let mut all = Fields::new();
    for (name, value) in headers.iter() {
        all.entry(name.to_ascii_lowercase()).or_default().push(value);
    }
    all
}

fn differences(
    (of_response, secrets): (bool, &secrets::Named),
    before: &Headers,
    after: &Headers,
    room: usize,
    out: &mut Vec<Change>,
) {
    let (old, new) = (fields(before), fields(after));
    let set = new.iter().filter(|(name, values)| old.get(*name) != Some(values));
    let gone = old.keys().filter(|name| !new.contains_key(*name));
    let changes = set.map(|(name, values)| (name, Some(values))).chain(gone.map(|name| (name, None)));
    for (name, values) in changes.take(room) {
        let name = String::from_utf8_lossy(name).into_owned();
        let value = values.map(|values| shown(&name, values, secrets));
        out.push(Change { of_response, name, value });
    }
}

fn shown(name: &str, values: &[&[u8]], secrets: &secrets::Named) -> String {
    let joined = values.join(&b", "[..]);
    if secrets::is_secret(name.as_bytes(), secrets) {
        return format!("({} bytes)", joined.len());
    }
    // It may be a URI with a query.
    let text = secrets::masked_target(&joined, secrets);
    match text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= MAX_VALUE).last() {
        Some(end) if text.len() > MAX_VALUE => format!("{}… ({} bytes)", &text[..end], joined.len()),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::exchange::Connection;

    fn watched(traced: bool) -> Exchange {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        let mut x = Exchange::new(Rc::new(Connection::new(1, addr, addr)), Arc::default());
        x.watch = Some(Box::new(Watch { traced, ..Watch::default() }));
        x
    }

    fn ran(x: &Exchange) -> &[Ran] {
        &x.watch.as_ref().expect("watched").ran
    }

    #[test]
    fn a_function_has_its_calls_counted_and_its_changes_told_without_secrets() {
        let mut x = watched(true);
        x.request.headers.append("Gone", "1");
        x.request.headers.append("Same", "1");
        x.watch_start("a", "access", "route");
        x.request.headers.remove("gone");
        x.request.headers.append("New", "1");
        x.request.headers.append("New", "2");
        x.request.headers.append("Authorization", "secret");
        x.response.headers.append("Long", "v".repeat(MAX_VALUE + 1));
        assert!(x.watch_end(Some(403)));
        x.watch_start("a", "access", "route");
        assert!(!x.watch_end(None), "the second call");
        let one = &ran(&x)[0];
        assert_eq!((one.calls, one.answered, one.cut_off), (2, Some(403), false));
        let told: Vec<_> = one.changes.iter().map(|c| (c.of_response, &*c.name, c.value.as_deref())).collect();
        let long = format!("{}… (257 bytes)", "v".repeat(MAX_VALUE));
        assert_eq!(
            told,
            [
                (false, "authorization", Some("(6 bytes)")),
                (false, "new", Some("1, 2")),
                (false, "gone", None),
                (true, "long", Some(&*long)),
            ]
        );
    }

    #[test]
    fn what_does_not_come_back_is_cut_off_by_what_follows() {
        let mut x = watched(false);
        x.watch_start("a", "access", "route");
        x.watch_start("b", "log", "route");
        x.watch_end(None);
        assert_eq!(ran(&x).iter().map(|r| (r.calls, r.cut_off)).collect::<Vec<_>>(), [(1, true), (1, false)]);
    }

    #[test]
    fn subrequests_and_locations_are_told_up_to_bounds_of_the_whole_tree() {
        let request = Children::default();
        let child = request.one_more().expect("the first one");
        let told =
            (0..MAX_TRIED).filter(|n| if n % 2 == 0 { child.tells_location() } else { request.tells_location() });
        assert_eq!((told.count(), request.tells_location(), child.tells_location()), (MAX_TRIED, false, false));
        assert!((1..MAX_CHILDREN).all(|_| child.one_more().is_some()));
        assert!(request.one_more().is_none() && child.one_more().is_none());
        assert_eq!(request.untold(), 2);
        child.keep(Value::Null);
        assert_eq!((request.take().len(), child.take().len()), (0, 1));
    }

    #[test]
    fn entries_and_changes_have_bounds() {
        let mut x = watched(true);
        for n in 0..=MAX_CHANGES {
            x.watch_start("a", &n.to_string(), "route");
            x.request.headers.append(format!("H{n}"), "1");
            x.watch_end(None);
        }
        assert_eq!(ran(&x).iter().map(|r| r.changes.len()).sum::<usize>(), MAX_CHANGES);
        for n in 0..2 * MAX_ENTRIES {
            x.watch_start("b", &n.to_string(), "route");
            assert_eq!(x.watch_end(None), n < MAX_ENTRIES - MAX_CHANGES - 1);
        }
        assert_eq!(ran(&x).len(), MAX_ENTRIES);
    }
}
