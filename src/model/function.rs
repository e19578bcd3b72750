//! Uploaded functions, which answer requests and run by schedules.

use std::{sync::Arc, time::Duration};

use serde_json::{Map, Value};

use super::{
    cron::Cron,
    crypt, next_uid,
    parse::{ParseContext, flag, invalid, number, required, text},
};
use crate::{
    error::Result,
    observe::functions::{Rule, Trial},
};

/// `/functions/{id}`: `{"source": "…lua…", …}`.
#[derive(Debug, Default)]
pub struct Function {
    pub source: Arc<str>,
    /// The number of this source among the function's; 0: it was stored by somebody who does not count.
    pub revision: u64,
    /// Names and texts that the function finds in `env`, decrypted; `$env://…` and `$secret://…` are resolved when used.
    pub env: Vec<(Box<str>, Box<str>)>,
    pub limits: FunctionLimits,
    /// Runs with files, processes, FFI and the debug library.
    pub trusted: bool,
    pub schedule: Option<Cron>,
    pub canary: Option<Canary>,
}

/// `limits`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionLimits {
    /// CPU time between two waits; `None`: `lua.limits.cpu_ms`.
    pub cpu_ms: Option<u64>,
    /// By how much a call may make its VM grow.
    pub memory_mb: usize,
    /// Of a call, with everything that it waits for.
    pub timeout: Duration,
    /// Bytes of the request's body.
    pub max_body: u64,
}

/// Memory: a document of some megabytes can be parsed and written again, and a hundred calls at once do not take the machine.
const MEMORY_MB: usize = 64;
/// Time of a call: longer than a service that is asked should take, shorter than the sixty seconds that clients and balancers in
/// front of a gateway usually wait.
const TIMEOUT: Duration = Duration::from_secs(30);
/// A request's body: forms and documents pass, an upload by mistake does not.
const MAX_BODY: u64 = 10 << 20;

impl Default for FunctionLimits {
    fn default() -> Self {
        FunctionLimits { cpu_ms: None, memory_mb: MEMORY_MB, timeout: TIMEOUT, max_body: MAX_BODY }
    }
}

/// Another revision that gets some of the calls.
#[derive(Debug)]
pub struct Canary {
    /// When it has failed, and how it does in this process.
    pub trial: Arc<Trial>,
    /// Calls of a hundred.
    pub weight: u32,
    pub source: Arc<str>,
}

/// What of a hundred calls may fail before a canary is taken back, and of how many calls at least: few enough to be found soon,
/// enough for one bad request not to decide.
const MAX_ERROR_RATE: f64 = 0.05;
const MIN_CALLS: u64 = 20;

/// A text of the function that runs.
#[derive(Clone, Debug)]
pub struct Variant {
    /// Unique for each version of each text in this process.
    pub uid: u64,
    pub revision: u64,
    pub source: Arc<str>,
    /// Of the canary.
    pub canary: Option<Arc<Trial>>,
}

impl Function {
    pub(super) fn from_json(map: &Map<String, Value>, context: &ParseContext<'_>) -> Result<Function> {
        let schedule = text(map, "schedule").map(Cron::parse).transpose();
        let schedule = schedule
            .map_err(|why| invalid(format!("invalid configuration: property \"schedule\" validation failed: {why}")))?;
        Ok(Function {
            source: required(map, "source")?.into(),
            revision: unsigned(map, "revision").unwrap_or(0),
            env: env(map, context),
            limits: map.get("limits").and_then(Value::as_object).map(FunctionLimits::from_json).unwrap_or_default(),
            trusted: flag(map, "trusted").unwrap_or(false),
            schedule,
            canary: map.get("canary").and_then(Value::as_object).map(Canary::from_json).transpose()?,
        })
    }

    /// Which text a call runs: `roll` is a random number.
    pub fn choose(&self, uid: u64, roll: u32) -> Variant {
        // Of a hundred, without a remainder that would favour small numbers.
        let roll = (u64::from(roll) * 100) >> 32;
        match &self.canary {
            Some(canary) if roll < u64::from(canary.weight) && !canary.trial.is_over() => Variant {
                uid: canary.trial.rule.uid,
                revision: canary.trial.rule.revision,
                source: canary.source.clone(),
                canary: Some(canary.trial.clone()),
            },
            _ => Variant { uid, revision: self.revision, source: self.source.clone(), canary: None },
        }
    }
}

impl FunctionLimits {
    fn from_json(map: &Map<String, Value>) -> FunctionLimits {
        let default = FunctionLimits::default();
        FunctionLimits {
            cpu_ms: unsigned(map, "cpu_ms"),
            memory_mb: unsigned(map, "memory_mb").map_or(default.memory_mb, |n| n as usize),
            timeout: unsigned(map, "timeout_ms").map_or(default.timeout, Duration::from_millis),
            max_body: unsigned(map, "max_body").unwrap_or(default.max_body),
        }
    }
}

impl Canary {
    fn from_json(map: &Map<String, Value>) -> Result<Canary> {
        let Some(source) = text(map, "source") else {
            return Err(invalid(
                "invalid configuration: property \"canary\" validation failed: there is no such revision",
            ));
        };
        let rule = Rule {
            uid: next_uid(),
            revision: unsigned(map, "revision").unwrap_or(0),
            max_error_rate: map.get("max_error_rate").and_then(Value::as_f64).unwrap_or(MAX_ERROR_RATE),
            min_calls: unsigned(map, "min_calls").unwrap_or(MIN_CALLS),
        };
        let weight = unsigned(map, "weight").and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        Ok(Canary { trial: Trial::new(rule), weight, source: source.into() })
    }
}

/// In the order of names. A value that is no reference may be encrypted.
fn env(map: &Map<String, Value>, context: &ParseContext<'_>) -> Vec<(Box<str>, Box<str>)> {
    let mut env = map.get("env").cloned().unwrap_or_default();
    crypt::decrypt_env(context.keyring, &mut env);
    let pairs = env.as_object().into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((name.as_str().into(), value.as_str()?.into()))).collect()
}

fn unsigned(map: &Map<String, Value>, key: &str) -> Option<u64> {
    number(map, key).and_then(|n| u64::try_from(n).ok())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{Keyring, Kind, Parsed, parse};

    fn parsed(value: Value) -> Result<Function> {
        let keyring = Keyring::new(["edd1c9f0985e76a2"], true).expect("a key");
        match parse(Kind::Function, "f", &value.to_string(), &ParseContext::new(&keyring))? {
            Parsed::Function(function) => Ok(function),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn everything_is_read_and_env_is_decrypted() {
        let function = parsed(json!({
            "source": "return 1", "revision": 3, "trusted": true, "schedule": "*/5 * * * *",
            "env": {"A": "77+NmbYqNfN+oLm0aX5akg==", "B": "$env://B", "C": "plain"},
            "limits": {"cpu_ms": 50, "memory_mb": 8, "timeout_ms": 250, "max_body": 1},
            "canary": {"revision": 4, "weight": 5, "source": "return 2", "max_error_rate": 0.5, "min_calls": 1},
        }))
        .expect("valid");
        let env: Vec<(&str, &str)> = function.env.iter().map(|(name, value)| (&**name, &**value)).collect();
        assert_eq!(env, [("A", "bar"), ("B", "$env://B"), ("C", "plain")]);
        let limits =
            FunctionLimits { cpu_ms: Some(50), memory_mb: 8, timeout: Duration::from_millis(250), max_body: 1 };
        assert_eq!((function.limits, function.revision, function.trusted), (limits, 3, true));
        let canary = function.canary.expect("is there");
        assert_eq!((canary.weight, canary.trial.rule.revision, canary.trial.rule.min_calls), (5, 4, 1));
        let plain = parsed(json!({"source": "return 1"})).expect("valid");
        assert_eq!((plain.limits, plain.trusted), (FunctionLimits::default(), false));
    }

    #[test]
    fn limits_hold_at_their_bounds() {
        for (name, least, most) in [
            ("cpu_ms", 10, 60_000),
            ("memory_mb", 1, 512),
            ("timeout_ms", 1, 86_400_000),
            ("max_body", 1, 1_073_741_824),
        ] {
            let with = |n: i64| parsed(json!({"source": "x", "limits": {name: n}})).map_err(|e| e.to_string());
            assert!(with(least).is_ok() && with(most).is_ok(), "{name}");
            for (n, what) in [(least - 1, "to be at least"), (most + 1, "to be at most")] {
                let refused = with(n).expect_err(name);
                assert!(refused.contains(what) && refused.contains(name), "{refused}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_is_wrong() {
        for (more, text) in [
            (json!({"env": {"a-b": "x"}}), "a-b"),
            (json!({"env": {"A": 1}}), "wrong type: expected string, got number"),
            (json!({"schedule": "61 * * * *"}), "property \"schedule\" validation failed: minute \"61\""),
            (json!({"canary": {"weight": 101, "source": "x"}}), "weight"),
            (json!({"canary": {"weight": 1, "revision": 1}}), "there is no such revision"),
            (json!({"limits": {"cpu": 1}}), "cpu"),
        ] {
            let mut value = json!({"source": "return 1"});
            value.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
            let refused = parsed(value).expect_err(text).to_string();
            assert!(refused.starts_with("invalid configuration: ") && refused.contains(text), "{refused}");
        }
    }

    #[test]
    fn a_canary_gets_its_share_of_a_hundred() {
        let value = |weight| json!({"source": "a", "canary": {"weight": weight, "source": "b"}});
        let share = |weight: u64, over: bool| {
            let function = parsed(value(weight)).expect("valid");
            if over {
                let trial = &function.canary.as_ref().expect("is there").trial;
                (0..MIN_CALLS).for_each(|_| trial.tried("f", true));
            }
            let rolls = (0..1000_u64).map(|n| (n * u64::from(u32::MAX) / 999) as u32);
            rolls.filter(|roll| function.choose(1, *roll).canary.is_some()).count()
        };
        assert_eq!((share(0, false), share(100, false), share(100, true)), (0, 1000, 0));
        assert!((45..=55).contains(&share(5, false)));
    }
}
