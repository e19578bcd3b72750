//! References to managers of secrets (`$secret://manager/id/key`) where a certificate or a key stands.
//!
//! Whoever needs one asks the worker's plugins, which keep what a manager has said for as long as `apisix.lru.secret` says: nothing is
//! kept here but what those need who have no plugins to ask.

use std::{borrow::Cow, sync::LazyLock, time::Duration};

use futures_util::future::{join, join_all};
use moka::sync::Cache;

use crate::{
    error::{Error, Kind, Result},
    exchange::host::Doing,
    model::crypt,
};

/// Texts that are kept for probes: certificates and keys of upstreams.
const KNOWN_KEPT: u64 = 1024;
/// For so long, as a manager's last value goes on without it (`apisix.lru.secret.stale_ttl`).
const KNOWN_FOR: Duration = Duration::from_secs(3600);

const ENV: &str = "$env://";

/// What managers have said of the references of upstreams.
static KNOWN: LazyLock<Cache<Box<str>, Box<str>>> =
    LazyLock::new(|| Cache::builder().max_capacity(KNOWN_KEPT).time_to_live(KNOWN_FOR).build());

/// Who asks managers: the plugins of a worker.
pub trait Secrets {
    /// The text that a reference stands for. Waits only where the manager has to be asked, which has a bound. The error says why there is
    /// none, and nothing of what the manager has said.
    fn fetch<'a>(&'a self, reference: &'a str) -> Doing<'a, Result<Box<str>>>;
}

/// The name and key behind `$env://`.
pub(super) fn of_environment(text: &str) -> Option<&str> {
    text.get(ENV.len()..).filter(|_| text[..ENV.len()].eq_ignore_ascii_case(ENV))
}

/// Whether a manager has the text.
pub fn is_managed(text: &str) -> bool {
    crypt::is_reference(text) && of_environment(text).is_none()
}

/// In APISIX's words.
pub(super) fn unresolved(text: &str) -> Error {
    Error::config(Kind::Tls).context(format!("failed to resolve secret reference: {text}"))
}

/// What stands for each of the texts that managers have, in their order. All are asked for at once: a manager that hangs is waited for
/// once.
pub(super) async fn fetched(texts: impl Iterator<Item = &str>, secrets: &dyn Secrets) -> Result<Box<[Box<str>]>> {
    let one = async |text| secrets.fetch(text).await.map_err(|e| unresolved(text).cause(e));
    // Each to its end: the first one's error is told, whichever came first.
    join_all(texts.filter(|text| is_managed(text)).map(one)).await.into_iter().collect()
}

/// PEM of a certificate and its key.
pub type Pair = (Box<str>, Box<str>);

/// The pair with what managers have in place of references. `None`: no manager has any of it.
pub async fn fetched_pair(pair: Option<&Pair>, secrets: &dyn Secrets) -> Result<Option<Pair>> {
    let Some((cert, key)) = pair.filter(|pair| has_managed(pair)) else { return Ok(None) };
    let one = async |text: &str| -> Result<Box<str>> {
        if !is_managed(text) {
            return Ok(text.into());
        }
        let value = secrets.fetch(text).await.map_err(|e| unresolved(text).cause(e))?;
        if KNOWN.get(text).as_ref() != Some(&value) {
            KNOWN.insert(text.into(), value.clone());
        }
        Ok(value)
    };
    let (cert, key) = join(one(cert), one(key)).await;
    Ok(Some((cert?, key?)))
}

/// Whether a manager has some of the pair.
pub fn has_managed((cert, key): &Pair) -> bool {
    is_managed(cert) || is_managed(key)
}

/// The pair as requests of some worker have last fetched it. `None`: none has yet.
pub fn known_pair((cert, key): &Pair) -> Option<(Cow<'_, str>, Cow<'_, str>)> {
    let known = |text| match is_managed(text) {
        true => KNOWN.get(text).map(|value| Cow::Owned(value.into())),
        false => Some(Cow::Borrowed(text)),
    };
    Some((known(cert)?, known(key)?))
}

/// For tests that have no manager.
#[cfg(test)]
pub struct NoManager;

#[cfg(test)]
impl Secrets for NoManager {
    fn fetch<'a>(&'a self, _reference: &'a str) -> Doing<'a, Result<Box<str>>> {
        Box::pin(async { Err(Error::config(Kind::NotFound).context("there is no manager")) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says what it is asked for.
    struct Echo;

    impl Secrets for Echo {
        fn fetch<'a>(&'a self, reference: &'a str) -> Doing<'a, Result<Box<str>>> {
            Box::pin(async move { Ok(format!("<{reference}>").into()) })
        }
    }

    #[test]
    fn only_what_a_manager_has_is_asked_for() {
        for (text, managed) in
            [("$secret://vault/1/a/b", true), ("$SECRET://x", true), ("$env://A", false), ("-----BEGIN", false)]
        {
            assert_eq!(is_managed(text), managed, "{text}");
        }
    }

    #[tokio::test]
    async fn a_pair_is_known_to_probes_when_a_request_has_fetched_it() {
        let pair: Pair = ("plain".into(), "$secret://vault/1/pair/key".into());
        assert!(known_pair(&pair).is_none());
        assert_eq!(fetched_pair(Some(&("a".into(), "b".into())), &Echo).await.expect("nothing to ask"), None);
        let fetched = fetched_pair(Some(&pair), &Echo).await.expect("fetched").expect("a pair");
        assert_eq!(fetched, ("plain".into(), "<$secret://vault/1/pair/key>".into()));
        assert_eq!(known_pair(&pair), Some(("plain".into(), "<$secret://vault/1/pair/key>".into())));
        let told = fetched_pair(Some(&("c".into(), "$secret://none/1/a".into())), &NoManager).await.expect_err("none");
        assert!(
            told.to_string().contains("failed to resolve secret reference: $secret://none/1/a: there is"),
            "{told}"
        );
    }

    #[test]
    fn so_much_is_kept_for_probes() {
        for n in 0..KNOWN_KEPT + 50 {
            KNOWN.insert(format!("$secret://bound/{n}").into(), "".into());
        }
        KNOWN.run_pending_tasks();
        assert!(KNOWN.entry_count() <= KNOWN_KEPT, "{}", KNOWN.entry_count());
    }
}
