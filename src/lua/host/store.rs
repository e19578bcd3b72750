//! `native.store`: the store of the gateway's configuration, for `apisix.core.etcd`.
//!
//! The store's own thread does the work: its connections and tasks outlive the worker whose script asked. What is written is
//! served when the script goes on, as after a call of the Admin API.

use std::{
    future::Future,
    sync::{Arc, OnceLock},
    time::Duration,
};

use smallvec::smallvec;
use tokio::{runtime::Handle, sync::Semaphore, time::timeout};

use crate::{
    error::{Error, Kind as ErrorKind, Result},
    lua::{
        api::{Api, Phases, Raise, Stack, Wait},
        sched::{self, Op, Value, Values, failed},
        vm::{self, Purpose},
    },
    model::Kind,
    store::{
        Batch, Committed, Condition, Entry, Published, Store, Written,
        revisions::{Note, Write},
    },
};

/// Calls of scripts that the store works on at once. More wait in their coroutines.
const MAX_RUNNING: usize = 256;
/// The longest key and value, in bytes: what etcd takes in one request by default, as for the Admin API.
const MAX_KEY: usize = 4096;
const MAX_VALUE: usize = 1_572_864;
/// How long a write waits for being served: a source that lags does not hold a script for ever.
const SERVED_PATIENCE: Duration = Duration::from_secs(5);

/// The store as scripts reach it.
struct Access {
    store: Arc<dyn Store>,
    published: Arc<Published>,
    /// Of the store's thread.
    runtime: Handle,
    running: Arc<Semaphore>,
}

static ACCESS: OnceLock<Arc<Access>> = OnceLock::new();

/// Scripts reach `store` from now on; before, their calls fail. Called on the store's thread; the first one stays.
pub fn open_to_scripts(store: Arc<dyn Store>, published: Arc<Published>) {
    let access =
        Access { store, published, runtime: Handle::current(), running: Arc::new(Semaphore::new(MAX_RUNNING)) };
    let _ = ACCESS.set(Arc::new(access));
}

/// What is served, once the store is open.
pub(super) fn published() -> Option<Arc<Published>> {
    ACCESS.get().map(|access| access.published.clone())
}

pub(super) fn register(api: &mut Api) -> Result<()> {
    let phases = Phases::INIT | Phases::SSL | Phases::BEFORE_HEAD | Phases::TIMER;
    let doc = "get(key) -> { value, created, modified } | false, revision | nil, err: the stored text under a key.";
    api.wait("native.store.get", phases, doc, get)?;
    let doc = "list(prefix) -> array of { key, value, created, modified }, revision | nil, err: in the order of keys.";
    api.wait("native.store.list", phases, doc, list)?;
    api.wait(
        "native.store.put",
        phases,
        "put(key, value, modified | nil, ttl_secs | nil) -> revision, previous, lease | nil, err, conflict: `modified`: the \
         revision that it must have, 0 for a key that must not exist. `previous`: as of get, false when there was none.",
        put,
    )?;
    let doc = "delete(key) -> previous | false, revision | nil, err: takes a key away.";
    api.wait("native.store.delete", phases, doc, delete)?;
    let doc = "keep_alive(lease) -> ttl_secs | false | nil, err: an entry's time begins anew; false: it is gone.";
    api.wait("native.store.keep_alive", phases, doc, keep_alive)?;
    let doc = "version() -> string | nil, err: the version of the server that stores.";
    api.wait("native.store.version", phases, doc, version)
}

fn get(s: &Stack) -> Result<Wait, Raise> {
    let key = key(s, 1)?;
    let work = |access: Arc<Access>| async move {
        let entry = access.store.get(&key).await?;
        let seen = entry.as_ref().map_or(0, |e| e.mod_revision);
        Ok((entry, access.published.load().revision.max(seen)))
    };
    parked(work, |(entry, revision)| smallvec![entry_or_false(entry), Value::Number(revision as f64)])
}

fn list(s: &Stack) -> Result<Wait, Raise> {
    let prefix = key(s, 1)?;
    let work = |access: Arc<Access>| async move { access.store.list(&prefix).await };
    parked(work, |(entries, revision)| {
        let push = move |s: &Stack| {
            s.push_table(entries.len(), 0);
            for (i, entry) in entries.iter().enumerate() {
                push_entry(s, entry);
                s.set_index(-2, i + 1);
            }
        };
        smallvec![Value::Push(Box::new(push)), Value::Number(revision as f64)]
    })
}

fn put(s: &Stack) -> Result<Wait, Raise> {
    let (key, value) = (key(s, 1)?, s.arg_str(2)?.into_owned());
    let on = s.opt_number(3)?.map_or(Condition::Always, |revision| Condition::Unmodified(revision as i64));
    let ttl_secs = s.opt_number(4)?.filter(|secs| *secs >= 1.0).map(|secs| secs as u64);
    if value.len() > MAX_VALUE {
        return Ok(ready(failed(format!("{key}: the value is longer than {MAX_VALUE} bytes"))));
    }
    let work = move |access: Arc<Access>| async move {
        let written = match access.put(&key, value, on, ttl_secs).await {
            Err(e) if e.kind() == ErrorKind::Conflict => return Ok(Err(e.to_string())),
            done => done?,
        };
        access.served(written.revision).await;
        Ok(Ok(written))
    };
    parked(work, |done: std::result::Result<Written, String>| match done {
        Ok(Written { previous, revision, lease, .. }) => {
            smallvec![Value::Number(revision as f64), entry_or_false(previous), lease.map_or(Value::Nil, Value::text)]
        }
        Err(conflict) => smallvec![Value::Nil, Value::text(conflict), Value::Bool(true)],
    })
}

fn delete(s: &Stack) -> Result<Wait, Raise> {
    let key = key(s, 1)?;
    let work = |access: Arc<Access>| async move {
        let Some((entry, revision)) = access.delete(&key).await? else {
            return Ok((None, access.published.load().revision));
        };
        access.served(revision).await;
        Ok((Some(entry), revision))
    };
    parked(work, |(entry, revision)| smallvec![entry_or_false(entry), Value::Number(revision as f64)])
}

fn keep_alive(s: &Stack) -> Result<Wait, Raise> {
    let lease = s.arg_str(1)?.into_owned();
    let work = |access: Arc<Access>| async move { access.store.keep_alive(&lease).await };
    parked(work, |secs| smallvec![secs.map_or(Value::Bool(false), |secs| Value::Number(secs as f64))])
}

fn version(_: &Stack) -> Result<Wait, Raise> {
    parked(|access| async move { access.store.version().await }, |version| smallvec![Value::text(version)])
}

/// Who writes, where revisions say it: which plugin it was is not known here.
const AUTHOR: &str = "core.etcd";

/// What is written of the gateway's objects is a revision, as it is by the Admin API.
fn batch(write: Write) -> Batch {
    Batch { writes: vec![write], note: Note { who: AUTHOR.into(), refers_to: None } }
}

impl Access {
    async fn put(&self, key: &str, value: String, on: Condition, ttl_secs: Option<u64>) -> Result<Written> {
        if Kind::of_key(key).is_none() {
            return self.store.put(key, value, on, ttl_secs).await;
        }
        let write = Write { key: key.into(), value: Some(value.into()), on, ttl_secs, seen: None };
        let Committed { done, revision, lease } = self.store.commit(batch(write)).await?;
        match done.into_iter().next() {
            Some((previous, Some(entry))) => Ok(Written { entry, previous, revision, lease }),
            _ => Err(Error::internal(ErrorKind::Other).context("a write without a result")),
        }
    }

    async fn delete(&self, key: &str) -> Result<Option<(Entry, i64)>> {
        if Kind::of_key(key).is_none() {
            return self.store.delete(key, Condition::Always).await;
        }
        let write = Write { key: key.into(), value: None, on: Condition::Always, ttl_secs: None, seen: None };
        let committed = self.store.commit(batch(write)).await?;
        let previous = committed.done.into_iter().next().and_then(|(previous, _)| previous);
        Ok(previous.map(|entry| (entry, committed.revision)))
    }

    async fn served(&self, revision: i64) {
        if timeout(SERVED_PATIENCE, self.published.reached(revision)).await.is_err() {
            tracing::warn!("revision {revision} is stored but not served after {SERVED_PATIENCE:?}");
        }
    }
}

/// A key relative to the prefix.
fn key(s: &Stack, i: std::ffi::c_int) -> Result<String, Raise> {
    let key = s.arg_str(i)?;
    if key.starts_with('/') && key.len() <= MAX_KEY {
        return Ok(key.into_owned());
    }
    Err(s.argument_error(i, &format!("a key begins with / and has at most {MAX_KEY} bytes")))
}

/// Has the store's thread do it, which goes on though the script is cut off: a write is done or not, never half.
fn parked<F, T>(work: impl FnOnce(Arc<Access>) -> F, answer: impl FnOnce(T) -> Values + 'static) -> Result<Wait, Raise>
where
    F: Future<Output = Result<T>> + Send + 'static,
    T: Send + 'static,
{
    if vm::current().is_some_and(|vm| vm.config.purpose == Purpose::Functions) {
        return Err("the store is not open to functions".into());
    }
    let Some(access) = ACCESS.get() else { return Ok(ready(failed("the store is not open yet"))) };
    let work = work(access.clone());
    let access = access.clone();
    Ok(Wait::Park(Op::future(async move {
        let done = in_turn(&access.running, &access.runtime, work).await;
        done.map_or_else(|e| failed(e.to_string()), answer)
    })))
}

/// Runs `work` on the store's thread when there is a place, which it has to its end, though nobody waits for that any more.
async fn in_turn<T: Send + 'static>(
    running: &Arc<Semaphore>,
    runtime: &Handle,
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let gone = |why: &str| Error::internal(ErrorKind::Unavailable).context(why.to_owned());
    let place = running.clone().acquire_owned().await.map_err(|_| gone("the store is closed"))?;
    let placed = async move {
        let _place = place;
        work.await
    };
    runtime.spawn(placed).await.unwrap_or_else(|_| Err(gone("the store's thread has ended")))
}

fn ready(values: Values) -> Wait {
    Wait::Park(Op::future(std::future::ready(values)))
}

fn entry_or_false(entry: Option<Entry>) -> sched::Value {
    match entry {
        Some(entry) => Value::Push(Box::new(move |s| push_entry(s, &entry))),
        None => Value::Bool(false),
    }
}

fn push_entry(s: &Stack, entry: &Entry) {
    s.push_table(0, 4);
    s.push_bytes(entry.key.as_bytes());
    s.set(-2, "key");
    s.push_bytes(entry.value.as_bytes());
    s.set(-2, "value");
    s.push_number(entry.create_revision as f64);
    s.set(-2, "created");
    s.push_number(entry.mod_revision as f64);
    s.set(-2, "modified");
}

#[cfg(test)]
mod tests {
    use std::{future::pending, sync::Arc, time::Duration};

    use tokio::{
        runtime::Handle,
        sync::{Semaphore, oneshot},
        time::timeout,
    };

    use super::{super::tests::check, in_turn};

    #[tokio::test]
    async fn work_keeps_its_place_though_its_script_has_gone() {
        let running = Arc::new(Semaphore::new(1));
        let (begun, begins) = oneshot::channel();
        let (end, ended) = oneshot::channel::<()>();
        let work = async move {
            let _ = begun.send(());
            let _ = ended.await;
            Ok(())
        };
        let here = Handle::current();
        tokio::select! {
            _ = in_turn(&running, &here, work) => panic!("nothing has ended it"),
            _ = begins => {}
        }
        assert_eq!(running.available_permits(), 0, "the script has gone, its work goes on");
        let second = in_turn(&running, &here, pending::<crate::error::Result<()>>());
        assert!(timeout(Duration::ZERO, second).await.is_err(), "it waits for the place");
        let _ = end.send(());
        assert_eq!(in_turn(&running, &here, async { Ok(7) }).await.ok(), Some(7), "who only waited has no place");
    }

    #[test]
    fn answers_of_etcd_become_results() {
        let run = |source: &str| format!("local etcd = require('apisix.core.etcd') {source}");
        let res = "{ headers = {}, body = { header = { revision = '9' }, kvs = {
            { key = '/apisix/a/', value = 'init_dir' },
            { key = '/apisix/a/b', value = 7, create_revision = '1', mod_revision = '2' } } } }";
        for (source, expected) in [
            (
                "local ok, err = etcd.get_format({ headers = {}, body = {} }, '/a', false) return err",
                "etcd response missing header.revision",
            ),
            (
                "local ok, err = etcd.get_format({ body = { error = 'etcdserver: user name is empty' } }) return err",
                "insufficient credentials code: 401",
            ),
            (
                "local ok, err = etcd.get_format({ body = { error = 'etcdserver: permission denied' } }) return err",
                "etcd forbidden code: 403",
            ),
            (
                "local res = etcd.get_format({ headers = {}, body = { header = { revision = '3' } } }, '/a', false)
                 return res.status .. res.body.message .. res.headers['X-Etcd-Index']",
                "404Key not found3",
            ),
            (
                &format!(
                    "local res = etcd.get_format({res}, '/apisix/a', true) local node = res.body.list[1]
                     return res.body.total .. node.key .. node.value .. node.createdIndex .. node.modifiedIndex"
                ),
                "1/apisix/a/b712",
            ),
            (
                &format!("return etcd.get_format({res}, '/apisix/a', true, function(r) return #r.body.kvs .. '' end)"),
                "2",
            ),
            (
                "local res = etcd.watch_format({ result = { header = { revision = '5' }, events = {
                     { type = 'DELETE', kv = { key = '/a', value = 1, mod_revision = '5' } },
                     { type = 'PUT', kv = { key = '/b', value = 2, create_revision = '4', mod_revision = '5' } } } } })
                 local gone, put = res.body.node[1], res.body.node[2]
                 return tostring(gone.value) .. gone.modifiedIndex .. put.key .. put.value .. put.createdIndex",
                "nil5/b24",
            ),
        ] {
            check(&run(source), expected);
        }
    }
}
