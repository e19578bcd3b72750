//! `plugin_attr.prometheus`.

use std::time::Duration;

use serde_json::Value;

use super::Metric;

/// Upper bounds in milliseconds.
const BUCKETS: [f64; 15] =
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 30000.0, 60000.0];

#[derive(Clone, Debug)]
pub struct Settings {
    /// `metric_prefix`
    pub prefix: String,
    /// `default_buckets`, ascending.
    pub buckets: Vec<f64>,
    /// `extra_labels` of the three metrics: those of http_status first, then http_latency's, then bandwidth's.
    pub extra: Vec<Extra>,
    /// `expire` of http_status, http_latency and bandwidth; zero: never.
    pub expire: [Duration; 3],
}

/// A label whose value is a variable's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extra {
    pub metric: Metric,
    pub label: String,
    /// Without `$`.
    pub variable: String,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { prefix: "apisix_".into(), buckets: BUCKETS.into(), extra: Vec::new(), expire: Default::default() }
    }
}

impl Settings {
    /// Reads the plugin's attributes; what is missing or of another type is the default.
    pub fn from_attr(attr: &Value) -> Self {
        let mut settings = Settings::default();
        if let Some(prefix) = attr["metric_prefix"].as_str() {
            settings.prefix = prefix.into();
        }
        let buckets: Option<Vec<f64>> =
            attr["default_buckets"].as_array().map(|all| all.iter().filter_map(Value::as_f64).collect());
        if let Some(mut buckets) = buckets.filter(|b| !b.is_empty()) {
            buckets.sort_by(f64::total_cmp);
            buckets.dedup();
            settings.buckets = buckets;
        }
        let metrics =
            [(Metric::Status, "http_status"), (Metric::Latency, "http_latency"), (Metric::Bandwidth, "bandwidth")];
        for (at, (metric, name)) in metrics.into_iter().enumerate() {
            let own = &attr["metrics"][name];
            settings.expire[at] = Duration::from_secs(own["expire"].as_u64().unwrap_or(0));
            for (label, variable) in
                own["extra_labels"].as_array().into_iter().flatten().filter_map(Value::as_object).flatten()
            {
                let variable = variable.as_str().unwrap_or_default().trim_start_matches('$').to_owned();
                settings.extra.push(Extra { metric, label: label.clone(), variable });
            }
        }
        settings
    }

    /// The idle time after which no metric shows a series any more.
    pub(super) fn expires(&self) -> Option<Duration> {
        let all = self.expire.iter().all(|expire| !expire.is_zero());
        self.expire.iter().max().copied().filter(|_| all)
    }
}
