//! `native.metrics`: counters, gauges and histograms of plugins' own, which all VMs of the process share. lua/prometheus.lua is what
//! plugins see.

use smallvec::{SmallVec, smallvec};

use super::Answer;
use crate::{
    error::Result,
    lua::{
        Op, Value, Wait,
        api::{Api, Phases, Raise, Stack},
    },
    observe::metrics::{self, Change, Definition, Kind},
};

/// Labels and bounds that are read of a definition: one more than a metric may have.
const MAX_READ: usize = 129;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func(
        "native.metrics.define",
        any,
        "define(page, \"counter\" | \"gauge\" | \"histogram\", name, help, labels, bounds) -> number | nil, err: a metric of a page; the gateway's own \
         page is \"\". Arrays of texts and of ascending numbers.",
        define,
    )?;
    api.func(
        "native.metrics.change",
        any,
        "change(number, \"inc\" | \"set\" | \"observe\" | \"remove\", value, label values...) -> true | nil, err",
        change,
    )?;
    api.func("native.metrics.reset", any, "reset(number): forgets all series.", reset)?;
    api.wait(
        "native.metrics.page",
        Phases::BEFORE_HEAD,
        "page(name) -> string: a page of plugins' own metrics in Prometheus' format.",
        page,
    )
}

fn define(s: &Stack) -> Answer {
    let (page, name) = (s.arg_str(1)?, s.arg_str(3)?);
    let kind = match s.arg_bytes(2)? {
        b"counter" => Kind::Counter,
        b"gauge" => Kind::Gauge,
        _ => Kind::Histogram,
    };
    let labels = list(s, 5, |s| s.bytes(-1).map(|text| String::from_utf8_lossy(text).into_owned()))?;
    let bounds = list(s, 6, |s| s.number(-1))?;
    let (Some(labels), Some(bounds)) = (labels, bounds) else {
        return s.fail(format!("metric {name:?} has a label that is no text, or a bound that is no number"));
    };
    let Some(metrics) = metrics::process() else { return s.fail("nothing is counted here") };
    match metrics.define(&page, &name, Definition { kind, help: s.arg_str(4)?.into_owned(), labels, bounds }) {
        Ok(number) => Ok(s.push_number(number as f64)),
        Err(e) => s.fail(e.to_string()),
    }
}

/// The array at `i`; `None` when it has something else than that.
fn list<T>(s: &Stack, i: i32, read: impl Fn(&Stack) -> Option<T>) -> std::result::Result<Option<Vec<T>>, Raise> {
    s.arg_table(i)?;
    Ok((1..=s.len(i).min(MAX_READ))
        .map(|n| {
            s.get_index(i, n);
            let value = read(s);
            s.pop(1);
            value
        })
        .collect())
}

fn change(s: &Stack) -> Answer {
    let number = usize::try_from(s.arg_int(1)?).unwrap_or(usize::MAX);
    let (what, value) = (s.arg_bytes(2)?, s.arg_number(3)?);
    let change = match what {
        b"inc" => Change::Inc(value),
        b"set" => Change::Set(value),
        b"observe" => Change::Observe(value),
        _ => Change::Remove,
    };
    let values = (4..=s.top()).map(|i| s.arg_bytes(i)).collect::<std::result::Result<SmallVec<[&[u8]; 8]>, _>>()?;
    let Some(metrics) = metrics::process() else { return s.fail("nothing is counted here") };
    match metrics.change(number, &values, change) {
        Ok(()) => Ok(s.push_bool(true)),
        Err(why) => s.fail(why),
    }
}

fn reset(s: &Stack) -> Answer {
    let number = usize::try_from(s.arg_int(1)?).unwrap_or(usize::MAX);
    if let Some(metrics) = metrics::process() {
        metrics.reset(number);
    }
    Ok(0)
}

/// Put together on another thread, as the gateway's own.
fn page(s: &Stack) -> std::result::Result<Wait, Raise> {
    let name = s.arg_str(1)?.into_owned();
    let write = move || {
        let mut page = String::new();
        if let Some(metrics) = metrics::process() {
            metrics.page(&name, &mut page);
        }
        page
    };
    Ok(Wait::Park(Op::future(async move {
        let page = tokio::task::spawn_blocking(write).await.unwrap_or_default();
        smallvec![Value::text(page)]
    })))
}
