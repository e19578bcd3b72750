//! From a store's changes to published snapshots: parse, validate, skip what is invalid, publish, keep the last good
//! state.
//!
//! One local task on the control thread. Changes that queued up meanwhile make one snapshot. While the source is
//! away, what was served goes on; a gateway that starts then serves the last good state from disk, or nothing.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep_until, timeout},
};

use super::{
    Change, Condition, Published, Snapshot, Store,
    builder::{Builder, Parser, PluginChecker, RELOAD},
    last_good::LastGood,
    source::SourceState,
};
use crate::{
    error::{Error, Kind, Result},
    router::RouterKind,
};

/// Messages between a store and the pipeline; a store that is further ahead waits, and coalesces what it can.
const MAX_CHANGES: usize = 64;
/// Changes that make one snapshot. Bounds how long the first of a burst waits.
const MAX_BATCH: usize = 256;
/// Commands of the APIs that may wait.
const MAX_COMMANDS: usize = 64;
/// How long a start waits for the source before it serves the last good state.
const SOURCE_PATIENCE: Duration = Duration::from_secs(3);
/// How long a reload of plugins waits for the cluster before it happens on this node alone.
const CLUSTER_PATIENCE: Duration = Duration::from_secs(5);

/// What the pipeline needs to know of the rest.
pub struct Setup {
    pub parser: Parser,
    /// `None`: plugin confs are not checked.
    pub checker: Option<Box<dyn PluginChecker>>,
    pub router: RouterKind,
    /// `deployment.etcd.prefix`: stands before keys in the log.
    pub shown_prefix: String,
    /// Whether the store's list of plugins (`/plugins`) says which ones are loaded.
    pub follows_plugin_list: bool,
    /// Where the last good state is kept; `None`, or a store that is its own: nowhere.
    pub last_good: Option<PathBuf>,
}

/// A running pipeline.
pub struct Started {
    pub published: Arc<Published>,
    pub source: Arc<SourceState>,
    pub handle: Handle,
}

/// Reaches the pipeline from any thread.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    store: Arc<dyn Store>,
    published: Arc<Published>,
}

enum Command {
    ReloadPlugins(oneshot::Sender<Result<u64>>),
}

impl Handle {
    /// Loads the plugins anew, on every node of a cluster; returns when every request that starts here runs by them,
    /// with their generation. An error names the plugin that does not load any more: then nothing has changed.
    pub async fn reload_plugins(&self) -> Result<u64> {
        if self.store.name() == "etcd" {
            match timeout(CLUSTER_PATIENCE, self.tell_cluster()).await {
                Ok(Ok(())) => return reloaded(&self.published.load()),
                Ok(Err(e)) => tracing::warn!("plugins are loaded anew on this node only: {e}"),
                Err(_) => tracing::warn!("plugins are loaded anew on this node only: etcd does not answer"),
            }
        }
        self.reload_plugins_here().await
    }

    /// The same on this node alone.
    pub async fn reload_plugins_here(&self) -> Result<u64> {
        let (done, reloaded) = oneshot::channel();
        let gone = || Error::internal(Kind::Unavailable).context("the configuration pipeline has stopped");
        self.commands.send(Command::ReloadPlugins(done)).await.map_err(|_| gone())?;
        reloaded.await.map_err(|_| gone())?
    }

    async fn tell_cluster(&self) -> Result<()> {
        let at_ms = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let written = self.store.put(RELOAD, at_ms.to_string(), Condition::Always, None).await?;
        self.published.reached(written.revision).await;
        Ok(())
    }
}

/// Runs on the control thread; owns the snapshot under construction.
pub struct Pipeline {
    store: Arc<dyn Store>,
    builder: Builder,
    published: Arc<Published>,
    source: Arc<SourceState>,
    last_good: Option<LastGood>,
    /// Told once, when there is something to serve.
    first: Option<oneshot::Sender<()>>,
}

/// Watches `store` and publishes what it says. Returns when the first snapshot is published: the store's, or the last
/// good one when the store cannot be reached.
///
/// Must be called on the control thread, inside a `LocalSet`: plugins are checked by a VM of that thread.
pub async fn start(store: Arc<dyn Store>, setup: Setup) -> Result<Started> {
    let published = Published::new(Snapshot::default());
    let source = SourceState::new(store.name());
    let (first, ready) = oneshot::channel();
    let strict_plugins = matches!(store.name(), "file" | "standalone");
    let mut builder = Builder::new(setup.parser, setup.checker, setup.router, strict_plugins);
    builder.shown_prefix = setup.shown_prefix;
    builder.follows_plugin_list = setup.follows_plugin_list;
    let pipeline = Pipeline {
        last_good: open_last_good(&*store, setup.last_good),
        builder,
        published: published.clone(),
        source: source.clone(),
        store: store.clone(),
        first: Some(first),
    };
    let (sink, changes) = mpsc::channel(MAX_CHANGES);
    let (commands, inbox) = mpsc::channel(MAX_COMMANDS);
    tokio::spawn(store.clone().watch(sink));
    tokio::task::spawn_local(pipeline.run(changes, inbox));
    ready.await.map_err(|_| Error::internal(Kind::Unavailable).context("the configuration pipeline has stopped"))?;
    let handle = Handle { commands, store, published: published.clone() };
    Ok(Started { published, source, handle })
}

/// How the last reload went on this node.
fn reloaded(snapshot: &Snapshot) -> Result<u64> {
    match snapshot.errors.get(RELOAD) {
        Some(error) => Err(Error::script(error.message.clone())),
        None => Ok(snapshot.plugins_generation),
    }
}

fn open_last_good(store: &dyn Store, path: Option<PathBuf>) -> Option<LastGood> {
    let (path, identity) = (path?, store.identity()?);
    LastGood::open(&path, identity)
        .inspect_err(|e| tracing::error!("the last good state is neither read nor kept: {e}"))
        .ok()
}

impl Pipeline {
    async fn run(mut self, mut changes: mpsc::Receiver<Change>, mut commands: mpsc::Receiver<Command>) {
        let deadline = Instant::now() + SOURCE_PATIENCE;
        let mut commands_open = true;
        loop {
            let waits_for_source = self.first.is_some() && self.last_good.is_some();
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.take_batch(change, &mut changes),
                    None => return,
                },
                command = commands.recv(), if commands_open => match command {
                    Some(Command::ReloadPlugins(done)) => {
                        let journal = self.builder.reload_plugins();
                        self.save(journal);
                        self.publish();
                        let _ = done.send(reloaded(&self.published.load()));
                    }
                    None => commands_open = false,
                },
                () = sleep_until(deadline), if waits_for_source => {
                    self.source.lost("no answer yet");
                    self.serve_last_good("no answer yet");
                }
            }
        }
    }

    fn take_batch(&mut self, first: Change, changes: &mut mpsc::Receiver<Change>) {
        self.take(first);
        for _ in 1..MAX_BATCH {
            let Ok(change) = changes.try_recv() else { break };
            self.take(change);
        }
        if self.first.is_none() {
            self.publish();
        }
    }

    fn take(&mut self, change: Change) {
        match change {
            Change::All { entries, revision } => {
                let journal = self.builder.replace(entries, revision);
                self.save(journal);
                self.source.up_to_date(revision);
                self.ready();
            }
            Change::Some { changes, revision } => {
                let journal = self.builder.change(changes, revision);
                self.save(journal);
                self.source.up_to_date(revision);
            }
            Change::Lost { reason } => {
                let again = !self.source.load().connected;
                self.source.lost(&reason);
                if self.first.is_some() {
                    self.serve_last_good(&reason);
                } else if again {
                    // Members in turn have a reason each: one line is enough for all of them.
                    tracing::info!("{} still cannot be reached: {reason}", self.store.name());
                } else {
                    tracing::warn!(
                        "{} cannot be reached, the last good configuration goes on: {reason}",
                        self.store.name()
                    );
                }
            }
            Change::Found => {
                self.source.found();
                tracing::warn!("{} can be reached again", self.store.name());
            }
            Change::Refused { key, message } => {
                if let Some(message) = &message {
                    tracing::error!("{key}: {message}");
                }
                self.builder.note(&key, message);
            }
            Change::Noted { key, message } => {
                if let Some(message) = &message {
                    tracing::warn!("{key}: {message}");
                }
                self.builder.note(&key, message);
            }
        }
    }

    /// The source is away and nothing is served yet.
    fn serve_last_good(&mut self, reason: &str) {
        let name = self.store.name();
        match self.last_good.as_ref().map(LastGood::load) {
            Some(Ok(Some(saved))) => {
                self.builder.replace(saved.entries, saved.revision);
                self.source.last_good(saved.revision, saved.at);
                tracing::warn!(
                    "{name} cannot be reached ({reason}): serving the last good configuration from disk, revision {}, \
                     saved {} ago, {} routes",
                    saved.revision,
                    age(saved.at),
                    self.builder.routes()
                );
            }
            Some(Err(e)) => tracing::error!("{name} cannot be reached ({reason}), nor the last good state read: {e}"),
            _ => tracing::error!(
                "{name} cannot be reached ({reason}), and no last good configuration is on disk: serving none until it is"
            ),
        }
        self.ready();
    }

    fn save(&self, journal: super::builder::Journal) {
        if let Some(last_good) = &self.last_good {
            last_good.save(journal);
        }
    }

    fn ready(&mut self) {
        if let Some(first) = self.first.take() {
            self.publish();
            let _ = first.send(());
        }
    }

    fn publish(&mut self) {
        if let Some(next) = self.builder.take() {
            self.published.publish(next, self.builder.take_touched());
        }
    }
}

/// `3 minutes`.
fn age(at: SystemTime) -> String {
    let secs = at.elapsed().map_or(0, |d| d.as_secs());
    let (n, unit) = match secs {
        0..120 => (secs, "seconds"),
        120..7200 => (secs / 60, "minutes"),
        7200..172_800 => (secs / 3600, "hours"),
        _ => (secs / 86_400, "days"),
    };
    format!("{n} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::Keyring,
        store::{Entry, embedded::Embedded, parser},
    };

    #[test]
    fn only_so_many_changes_make_one_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Embedded::open(&dir.path().join("moongate.redb")).unwrap();
        let published = Published::new(Snapshot::default());
        let parser = parser(Arc::new(Keyring::default()), None);
        let mut pipeline = Pipeline {
            builder: Builder::new(parser, None, RouterKind::default(), false),
            published: published.clone(),
            source: SourceState::new("embedded"),
            store,
            last_good: None,
            first: None,
        };
        let put = |n: usize| {
            let (key, value) = (format!("/services/{n}").into(), "{}".into());
            let entry = Entry { key, value, create_revision: 1, mod_revision: 1 };
            Change::Some { changes: vec![(entry.key.clone(), Some(entry))], revision: n as i64 }
        };
        let (sink, mut changes) = mpsc::channel(2 * MAX_BATCH);
        (1..=MAX_BATCH).for_each(|n| sink.try_send(put(n)).unwrap());
        pipeline.take_batch(put(0), &mut changes);
        let now = published.load();
        assert_eq!((now.version, now.services.len(), changes.len()), (1, MAX_BATCH, 1));
        let next = changes.try_recv().unwrap();
        pipeline.take_batch(next, &mut changes);
        assert_eq!((published.load().version, published.load().services.len()), (2, MAX_BATCH + 1));
    }
}
