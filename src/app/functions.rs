//! What is done for uploaded functions that no client asks for: their schedules, and canaries that failed.
//!
//! Runs on the control thread and calls no function itself: the first worker does. With etcd, nodes agree on who runs a
//! schedule by one key per function, which is written under the condition that nobody else has; with the embedded store, and with a
//! file, which has no place for such a key, this node is the only one that it knows of.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    rc::Rc,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot},
    task::spawn_local,
    time::sleep,
};

use crate::{
    error::{Kind, Result},
    model::{self, Id},
    observe::functions::{self, BackOut},
    plugin::Errand,
    store::{
        Batch, Condition, Published, Store,
        revisions::{Note, Write, time_left},
        snapshot::Table,
    },
};

/// The clock may be set, so the longest sleep is bounded.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// A run that is noticed so late is a missed one: the process was stopped, or the clock was set.
const LATE_SECS: i64 = 10;

/// The store's own time for a write and the way to a node, beyond what a call may take.
const TURN_MARGIN_SECS: u64 = 30;

/// How long it is remembered that a run was done: longer than the clocks of nodes ever differ.
const TURN_MEMORY_SECS: u64 = 3600;

/// Who takes canaries back, where revisions say it.
const BACK_OUT_AUTHOR: &str = "canary back-out";

/// Between two tries to take a canary back.
const BACK_OUT_PAUSE: Duration = Duration::from_secs(5);

/// Keeps schedules, and answers for canaries.
#[derive(Clone)]
pub struct Keeper {
    store: Arc<dyn Store>,
    published: Arc<Published>,
    errands: Option<mpsc::Sender<Errand>>,
    /// Functions whose schedule's call has not ended.
    running: Rc<RefCell<HashSet<Id>>>,
}

/// `/moongate/function_runs/{id}`: who ran a schedule last.
#[derive(Debug, Deserialize, Serialize)]
struct Turn {
    /// The time that the run was for, in seconds since the epoch.
    at: i64,
    running: bool,
}

impl Keeper {
    pub fn new(store: Arc<dyn Store>, published: Arc<Published>, errands: Option<mpsc::Sender<Errand>>) -> Keeper {
        Keeper { store, published, errands, running: Rc::default() }
    }

    /// Until it is dropped.
    pub async fn run(self) {
        let schedules = self.clone().schedules();
        tokio::join!(self.back_outs(), schedules);
    }

    async fn schedules(self) {
        let mut changes = self.published.subscribe();
        let mut timetable = Timetable::default();
        loop {
            let snapshot = self.published.load();
            let now = now();
            if timetable.follow(&snapshot.functions, now) {
                functions::keep(|id| snapshot.functions.contains_key(id));
            }
            for (id, at) in timetable.due(now) {
                if let Some(function) = snapshot.functions.get(&id) {
                    self.clone().start(id, function.uid, at, function.value.limits.timeout);
                }
            }
            let wait = timetable.next().map_or(LONGEST_SLEEP, |at| until(at).min(LONGEST_SLEEP));
            tokio::select! {
                () = sleep(wait) => {}
                changed = changes.changed() => if changed.is_err() { return },
            }
        }
    }

    fn start(self, id: Id, uid: u64, at: i64, longest: Duration) {
        if !self.running.borrow_mut().insert(id.clone()) {
            return tracing::warn!("function {id}: its last scheduled call has not ended: this one is left out");
        }
        spawn_local(async move {
            if let Err(e) = self.take_turn(&id, uid, at, longest).await {
                tracing::error!("function {id}: its scheduled call is left out: {e}");
            }
            self.running.borrow_mut().remove(&id);
        });
    }

    /// Runs the function, unless another node does.
    async fn take_turn(&self, id: &Id, uid: u64, at: i64, longest: Duration) -> Result<()> {
        if self.store.name() != "etcd" {
            self.call(id, uid, at).await;
            return Ok(());
        }
        let key = format!("/moongate/function_runs/{id}");
        let last = self.store.get(&key).await?;
        let turn: Option<Turn> = last.as_ref().and_then(|entry| serde_json::from_str(&entry.value).ok());
        if turn.is_some_and(|turn| turn.at >= at || turn.running) {
            return Ok(());
        }
        let on = Condition::Unmodified(last.map_or(0, |entry| entry.mod_revision));
        // A node that dies meanwhile leaves the key, which goes by itself.
        let ttl = longest.as_secs() + TURN_MARGIN_SECS;
        let mine = match self.store.put(&key, text(at, true), on, Some(ttl)).await {
            Err(e) if e.kind() == Kind::Conflict => return Ok(()),
            mine => mine?,
        };
        self.call(id, uid, at).await;
        let on = Condition::Unmodified(mine.entry.mod_revision);
        match self.store.put(&key, text(at, false), on, Some(TURN_MEMORY_SECS)).await {
            // It took so long that the key was gone, and perhaps another's.
            Err(e) if e.kind() == Kind::Conflict => Ok(()),
            put => put.map(drop),
        }
    }

    async fn call(&self, id: &Id, uid: u64, at: i64) {
        let (done, ended) = oneshot::channel();
        let Some(errands) = &self.errands else { return };
        let errand = Errand { id: id.clone(), uid, at, done };
        if errands.try_send(errand).is_err() {
            return tracing::error!("function {id}: its scheduled call is left out: too many wait for the worker");
        }
        // The worker bounds it; it has ended, too, when the worker has.
        let _ = ended.await;
    }

    /// Takes failed canaries back, in the store: for all nodes.
    async fn back_outs(self) {
        let mut failed = functions::listen();
        while let Some(back_out) = failed.recv().await {
            let keeper = self.clone();
            spawn_local(async move { keeper.back_out(back_out).await });
        }
    }

    async fn back_out(&self, of: BackOut) {
        let BackOut { id, rule, calls, errors } = &of;
        let words = format!(
            "function {id}: the canary, revision {}, is backed out: {errors} of {calls} calls failed, more than max_error_rate {} allows",
            rule.revision, rule.max_error_rate
        );
        tracing::error!("{words}");
        functions::record(id).log(crate::observe::log::Level::Error, words.as_bytes());
        loop {
            match self.take_back(&of).await {
                Ok(()) => return,
                Err(e) if e.kind() == Kind::Conflict => {}
                Err(e) => {
                    tracing::error!("function {id}: the canary is left alone here, but stays in the store: {e}");
                    if matches!(self.store.name(), "file" | "standalone") {
                        return;
                    }
                    sleep(BACK_OUT_PAUSE).await;
                }
            }
        }
    }

    /// Removes the canary from the stored function, unless somebody has done so or set another one.
    async fn take_back(&self, of: &BackOut) -> Result<()> {
        let key = format!("/functions/{}", of.id);
        let Some(entry) = self.store.get(&key).await? else { return Ok(()) };
        let Some(text) = without_canary(&entry.value, of, now()) else { return Ok(()) };
        let write = Write {
            key: key.into(),
            value: Some(text.into()),
            on: Condition::Unmodified(entry.mod_revision),
            ttl_secs: time_left(&*self.store, &entry.key, entry.mod_revision).await?.of_what_is_there(),
            seen: Some(Some(entry)),
        };
        // As a revision, which tells who it was and can be taken back.
        let note = Note { who: BACK_OUT_AUTHOR.into(), refers_to: None };
        self.store.commit(Batch { writes: vec![write], note }).await.map(drop)
    }
}

fn text(at: i64, running: bool) -> String {
    // Two plain fields.
    serde_json::to_string(&Turn { at, running }).unwrap_or_default()
}

/// The stored function without the canary, and with what became of it; `None`: it has another one, or none.
fn without_canary(stored: &str, of: &BackOut, now: i64) -> Option<String> {
    let mut value: Value = serde_json::from_str(stored).ok()?;
    let function = value.as_object_mut()?;
    let revision = function.get("canary")?.get("revision").and_then(Value::as_u64);
    if revision.unwrap_or(0) != of.rule.revision {
        return None;
    }
    function.remove("canary");
    let told = serde_json::json!({
        "revision": of.rule.revision, "calls": of.calls, "errors": of.errors, "time": now,
    });
    function.insert("backed_out".into(), told);
    function.insert("update_time".into(), now.into());
    Some(value.to_string())
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

/// How long it is until a second begins.
fn until(at: i64) -> Duration {
    let at = UNIX_EPOCH + Duration::from_secs(u64::try_from(at).unwrap_or(0));
    at.duration_since(SystemTime::now()).unwrap_or_default()
}

/// When which function is to run next. Pure: the time is an argument.
#[derive(Default)]
struct Timetable {
    functions: Table<model::Function>,
    next: HashMap<Id, (u64, i64)>,
}

impl Timetable {
    /// Takes over which functions there are; says whether that has changed. One whose version is the same keeps its time.
    fn follow(&mut self, functions: &Table<model::Function>, now: i64) -> bool {
        if self.functions.ptr_eq(functions) {
            return false;
        }
        self.functions = functions.clone();
        let mut next = HashMap::new();
        for (id, function) in functions {
            let Some(schedule) = &function.value.schedule else { continue };
            let known = self.next.get(id).filter(|(uid, _)| *uid == function.uid).map(|(_, at)| *at);
            if let Some(at) = known.or_else(|| schedule.next(now)) {
                next.insert(id.clone(), (function.uid, at));
            }
        }
        self.next = next;
        true
    }

    /// Those whose time has come, with the time that they were to run at; missed ones are left out.
    fn due(&mut self, now: i64) -> Vec<(Id, i64)> {
        let mut due = Vec::new();
        let functions = &self.functions;
        self.next.retain(|id, (_, at)| {
            let next_now = || functions.get(id)?.value.schedule.as_ref()?.next(now);
            if *at > now {
                // A clock that was set back: what was far ahead is nearer now.
                if let Some(next) = next_now().filter(|next| next < at) {
                    *at = next;
                }
                return true;
            }
            if now - *at <= LATE_SECS {
                due.push((id.clone(), *at));
            }
            let schedule = functions.get(id).and_then(|function| function.value.schedule.as_ref());
            match schedule.and_then(|schedule| schedule.next(now)) {
                Some(next) => *at = next,
                None => return false,
            }
            true
        });
        due
    }

    fn next(&self) -> Option<i64> {
        self.next.values().map(|(_, at)| *at).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::{Object, cron::Cron},
        observe::functions::Rule,
        store::{BoxFuture, ChangeSink, Entry, Written, embedded::Embedded},
    };

    fn table(functions: &[(&str, u64, &str)]) -> Table<model::Function> {
        let object = |(id, uid, schedule): &(&str, u64, &str)| {
            let schedule = Some(Cron::parse(schedule).expect("valid"));
            let value = model::Function { schedule, ..model::Function::default() };
            let id: Id = (*id).into();
            let (create_revision, mod_revision, json) = (1, 1, "{}".into());
            (id.clone(), Arc::new(Object { id, uid: *uid, create_revision, mod_revision, json, value }))
        };
        functions.iter().map(object).collect()
    }

    /// An embedded store that several nodes share, as they do an etcd.
    struct Shared(Arc<dyn Store>);

    impl Store for Shared {
        fn name(&self) -> &'static str {
            "etcd"
        }

        fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>>> {
            self.0.get(key)
        }

        fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Vec<Entry>, i64)>> {
            self.0.list(prefix)
        }

        fn put<'a>(
            &'a self,
            key: &'a str,
            value: String,
            on: Condition,
            ttl_secs: Option<u64>,
        ) -> BoxFuture<'a, Result<Written>> {
            self.0.put(key, value, on, ttl_secs)
        }

        fn delete<'a>(&'a self, key: &'a str, on: Condition) -> BoxFuture<'a, Result<Option<(Entry, i64)>>> {
            self.0.delete(key, on)
        }

        fn watch(self: Arc<Self>, changes: ChangeSink) -> BoxFuture<'static, ()> {
            self.0.clone().watch(changes)
        }
    }

    #[tokio::test]
    async fn of_several_nodes_one_runs_and_none_while_another_still_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Embedded::open(&dir.path().join("moongate.redb")).expect("a store");
        let store = Arc::new(Shared(store));
        let (errands, mut inbox) = mpsc::channel(4);
        let node = || Keeper::new(store.clone(), Published::new(Default::default()), Some(errands.clone()));
        let ((a, b), id) = ((node(), node()), Id::from("f"));
        let turn = async |node: &Keeper, at| node.take_turn(&id, 1, at, Duration::from_secs(1)).await.expect("decided");
        let runs = async {
            let Some(Errand { at: 60, done, .. }) = inbox.recv().await else { panic!("the first run") };
            turn(&b, 60).await;
            turn(&b, 120).await;
            done.send(()).expect("is waited for");
        };
        tokio::join!(turn(&a, 60), runs);
        assert!(inbox.try_recv().is_err(), "neither the same run nor one beside it");
        turn(&b, 60).await;
        assert!(inbox.try_recv().is_err(), "it was done");
        let runs = async {
            let Some(Errand { at: 180, done, .. }) = inbox.recv().await else { panic!("the next run") };
            done.send(()).expect("is waited for");
        };
        tokio::join!(turn(&b, 180), runs);
    }

    #[test]
    fn each_runs_when_its_minute_begins_and_missed_runs_are_left_out() {
        let mut timetable = Timetable::default();
        let functions = table(&[("a", 1, "* * * * *"), ("b", 2, "*/5 * * * *")]);
        assert!(timetable.follow(&functions, 0) && !timetable.follow(&functions, 1));
        assert_eq!((timetable.next(), timetable.due(59)), (Some(60), vec![]));
        assert_eq!((timetable.due(60), timetable.due(61)), (vec![("a".into(), 60)], vec![]));
        // The process slept: at the bound it is late, past it the run is missed.
        let mut late = timetable.due(300 + LATE_SECS);
        late.sort();
        assert_eq!(late, [("b".into(), 300)], "a has missed several");
        assert_eq!(timetable.due(360 + LATE_SECS + 1), vec![]);
        assert_eq!(timetable.next(), Some(420));
    }

    #[test]
    fn a_new_version_starts_anew_and_one_that_is_gone_runs_no_more() {
        let mut timetable = Timetable::default();
        timetable.follow(&table(&[("a", 1, "* * * * *"), ("b", 2, "* * * * *")]), 0);
        timetable.follow(&table(&[("a", 1, "* * * * *"), ("b", 3, "30 * * * *")]), 70);
        assert_eq!(timetable.due(70), [("a".into(), 60)], "its version is the same");
        timetable.follow(&table(&[("b", 3, "30 * * * *")]), 71);
        assert_eq!(timetable.next(), Some(1800));
    }

    #[test]
    fn only_the_canary_that_failed_is_taken_back() {
        let rule = Rule { uid: 1, revision: 7, max_error_rate: 0.05, min_calls: 20 };
        let of = BackOut { id: "f".into(), rule, calls: 20, errors: 9 };
        let stored = r#"{"source":"s","canary":{"revision":7,"weight":5}}"#;
        let text = without_canary(stored, &of, 100).expect("it is the one");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["backed_out"]["errors"], 9);
        assert!(value.get("canary").is_none() && value["source"] == "s");
        for other in [r#"{"source":"s"}"#, r#"{"canary":{"revision":8,"weight":5}}"#, "no JSON"] {
            assert_eq!(without_canary(other, &of, 100), None, "{other}");
        }
    }
}
