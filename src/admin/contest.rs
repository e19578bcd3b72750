//! Writers that come at once: which ids objects get that bring none, and whose turn it is after a conflict.

use std::cell::Cell;

use tokio::sync::{Mutex, MutexGuard};

use super::{
    State,
    http::Answer,
    resource::{Outcome, Target},
    store_error,
};

/// Tries of a write that others' writes get in the way of. Each that fails is another's that has happened: sixteen writers of one object on
/// one node are done after two tries each, as they take turns; this is for several nodes that write all the time.
pub(super) const MAX_TRIES: usize = 64;
/// Ids in a row that a POST finds taken before it looks at all that there are: a few are other writers'.
const STEPS: usize = 4;
/// Ids from here on are no counter's: nobody goes on from them, so that none runs out.
const MAX_ID: i64 = 1 << 62;

/// What the writers on this node share.
#[derive(Default)]
pub struct Contest {
    /// The number that was given last.
    last: Cell<i64>,
    turn: Mutex<()>,
}

impl Contest {
    /// For a dry run: gives the same numbers, and takes none.
    pub(super) fn pretended(&self) -> Contest {
        Contest { last: self.last.clone(), turn: Mutex::default() }
    }

    /// A number that was not given before, no lower than `least`.
    fn next(&self, least: i64) -> i64 {
        let next = self.last.get().saturating_add(1).max(least);
        self.last.set(next);
        next
    }
}

/// The tries of one write.
pub(super) struct Tries<'s> {
    state: &'s State,
    conflicts: usize,
    turn: Option<MutexGuard<'s, ()>>,
}

impl<'s> Tries<'s> {
    pub fn of(state: &'s State) -> Tries<'s> {
        Tries { state, conflicts: 0, turn: None }
    }

    /// Waits for this write's turn among those that wait for theirs; it has it as long as `self` lives.
    pub async fn take_turn(&mut self) {
        if self.turn.is_none() {
            self.turn = Some(self.state.contest.turn.lock().await);
        }
    }

    /// After a conflict: whether there is another try. Who has lost once waits in line, so that it does not lose for ever to those
    /// that come later.
    pub async fn again(&mut self) -> bool {
        self.conflicts += 1;
        self.take_turn().await;
        self.conflicts < MAX_TRIES
    }

    /// An id for an object that has none: as etcd's in-order keys, twenty digits that grow.
    pub async fn id(&self, target: &Target) -> Outcome<String> {
        let past_known = if self.conflicts == STEPS { largest_id(self.state, target).await? + 1 } else { 0 };
        // No key starts like this: only the revision is wanted. What other nodes have written has moved it.
        let (_, revision) = self.state.store.list("/-/").await.map_err(|e| store_error(&e))?;
        Ok(format!("{:020}", self.state.contest.next(past_known.max(revision.saturating_add(1)))))
    }

    /// Why no id was free.
    pub fn exhausted() -> Answer {
        Answer::refuse(503, format!("other writers took all {MAX_TRIES} ids that were tried: try again"))
            .header("retry-after", "1")
    }
}

/// The largest id of that kind which a counter has given, this one or another store's, from which the objects were imported.
async fn largest_id(state: &State, target: &Target) -> Outcome<i64> {
    let prefix = target.kind.key(&target.full_id(""));
    let (entries, _) = state.store.list(&prefix).await.map_err(|e| store_error(&e))?;
    let counted = |key: &str| {
        let id = key.strip_prefix(&prefix)?;
        let is_counted = id.len() == 20 && id.bytes().all(|b| b.is_ascii_digit());
        id.parse::<i64>().ok().filter(|n| is_counted && *n < MAX_ID)
    };
    Ok(entries.iter().filter_map(|entry| counted(&entry.key)).max().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_grow_whatever_the_store_says() {
        let contest = Contest::default();
        assert_eq!([contest.next(7), contest.next(7), contest.next(3), contest.next(20)], [7, 8, 9, 20]);
        let pretended = contest.pretended();
        assert_eq!([pretended.next(0), pretended.next(0), contest.next(0)], [21, 22, 21]);
        contest.last.set(i64::MAX);
        assert_eq!(contest.next(0), i64::MAX);
    }
}
