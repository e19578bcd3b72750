//! What a check has found, as text for people and as JSON for tools.

use std::fmt::{self, Write};

use serde_json::{Value, json};

/// Findings of one verdict that are kept; more are counted. A store in which everything is wrong still makes a report that
/// can be read.
const MAX_KEPT: usize = 10_000;

/// How bad it is; the worst decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It runs as it is; something about it is worth knowing.
    Note,
    Change,
    Cannot,
}

const VERDICTS: [(Verdict, &str, &str); 3] = [
    (Verdict::Cannot, "cannot", "Cannot work here"),
    (Verdict::Change, "change", "Needs a change"),
    (Verdict::Note, "note", "Worth knowing"),
];

#[derive(Debug)]
pub struct Finding {
    pub verdict: Verdict,
    /// `config`, `store`, `object`, `plugin` or `lua`.
    pub area: &'static str,
    /// Where: a key of the configuration, an object's key, a file and line.
    pub place: String,
    pub what: String,
    /// What to do about it.
    pub advice: String,
}

/// Everything that a check has to say.
#[derive(Debug, Default)]
pub struct Report {
    /// What was read: `etcd http://127.0.0.1:2379 /apisix`.
    pub read: Vec<String>,
    /// What runs as it is: a subject and what of it.
    pub runs: Vec<(&'static str, String)>,
    findings: Vec<Finding>,
    counts: [usize; 3],
}

impl Report {
    pub fn add(
        &mut self,
        verdict: Verdict,
        area: &'static str,
        place: impl Into<String>,
        what: impl Into<String>,
        advice: impl Into<String>,
    ) {
        let count = &mut self.counts[verdict as usize];
        *count += 1;
        if *count <= MAX_KEPT {
            let (place, what, advice) = (place.into(), what.into(), advice.into());
            self.findings.push(Finding { verdict, area, place, what, advice });
        }
    }

    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter()
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.counts[verdict as usize]
    }

    /// 0: all runs, 1: something needs a change, 2: something cannot work.
    pub fn exit_code(&self) -> u8 {
        match (self.count(Verdict::Cannot), self.count(Verdict::Change)) {
            (0, 0) => 0,
            (0, _) => 1,
            _ => 2,
        }
    }

    /// `{"verdict": "runs", "exit_code": 0, "read": […], "runs": {…}, "counts": {…}, "findings": […]}`
    pub fn to_json(&self) -> Value {
        let verdict = ["runs", "change", "cannot"][usize::from(self.exit_code())];
        let mut runs = serde_json::Map::new();
        for (subject, what) in &self.runs {
            let list = runs.entry(*subject).or_insert_with(|| json!([]));
            if let Value::Array(list) = list {
                list.push(what.as_str().into());
            }
        }
        let counts: serde_json::Map<_, _> =
            VERDICTS.iter().map(|(verdict, name, _)| ((*name).to_owned(), self.count(*verdict).into())).collect();
        let findings: Vec<_> = self.sorted().map(Finding::to_json).collect();
        json!({
            "verdict": verdict, "exit_code": self.exit_code(), "read": self.read, "runs": runs, "counts": counts,
            "findings": findings,
        })
    }

    /// The worst first, else as they were found.
    fn sorted(&self) -> impl Iterator<Item = &Finding> {
        VERDICTS.iter().flat_map(|(verdict, ..)| self.findings.iter().filter(move |f| f.verdict == *verdict))
    }
}

impl Finding {
    fn to_json(&self) -> Value {
        let name = VERDICTS.iter().find(|(verdict, ..)| *verdict == self.verdict).map_or("", |(_, name, _)| *name);
        json!({
            "verdict": name, "area": self.area, "place": self.place, "what": self.what, "advice": self.advice,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for source in &self.read {
            writeln!(f, "read {}", plain(source))?;
        }
        if !self.runs.is_empty() {
            f.write_str("\nRuns as it is\n")?;
            for (subject, what) in &self.runs {
                writeln!(f, "  {subject:<8} {}", plain(what))?;
            }
        }
        for (verdict, _, title) in VERDICTS {
            let count = self.count(verdict);
            if count == 0 {
                continue;
            }
            writeln!(f, "\n{title} ({count})")?;
            for finding in self.findings.iter().filter(|finding| finding.verdict == verdict) {
                writeln!(f, "  {}: {}", plain(&finding.place), plain(&finding.what))?;
                if !finding.advice.is_empty() {
                    writeln!(f, "    {}", plain(&finding.advice))?;
                }
            }
            if count > MAX_KEPT {
                writeln!(f, "  and {} more", count - MAX_KEPT)?;
            }
        }
        let summary = match self.exit_code() {
            0 => "everything runs",
            1 => "something needs a change",
            _ => "something cannot work",
        };
        writeln!(f, "\nverdict: {summary}")
    }
}

/// What the terminal may be told: texts come from a store and files that others write.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_finding_decides() {
        let mut report = Report::default();
        assert_eq!((report.exit_code(), &report.to_json()["verdict"]), (0, &json!("runs")));
        report.add(Verdict::Note, "lua", "a.lua:1", "x", "");
        assert_eq!(report.exit_code(), 0);
        report.add(Verdict::Change, "lua", "a.lua:2", "y", "do z");
        assert_eq!((report.exit_code(), &report.to_json()["verdict"]), (1, &json!("change")));
        report.add(Verdict::Cannot, "object", "/routes/1", "z", "");
        let json = report.to_json();
        assert_eq!((report.exit_code(), &json["counts"]), (2, &json!({"cannot": 1, "change": 1, "note": 1})));
        assert_eq!(json["findings"][0]["place"], "/routes/1", "the worst first");
    }

    #[test]
    fn only_so_many_findings_are_kept_and_none_writes_to_the_terminal() {
        let mut report = Report::default();
        for n in 0..=MAX_KEPT {
            report.add(Verdict::Change, "object", format!("/routes/{n}\x1b[2J"), "line\none", "");
        }
        let text = report.to_string();
        assert!(text.contains("Needs a change (10001)") && text.contains("and 1 more"), "{}", &text[..200]);
        assert!(text.contains("/routes/0\\u{1b}[2J: line\\none") && !text.contains('\x1b'));
        assert_eq!(report.to_json()["findings"].as_array().map(Vec::len), Some(MAX_KEPT));
        assert_eq!(report.to_json()["counts"]["change"], MAX_KEPT + 1);
    }
}
