//! Differences: of JSON values by path, of texts by line. Pure.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

/// Edits between two texts that are looked for one by one; texts that are further apart differ as a whole.
const MAX_EDITS: usize = 1000;
/// Lines compared before that is given up: a hundredth of a second.
const MAX_STEPS: usize = 4_000_000;
/// Lines shown around a change.
const CONTEXT: usize = 3;

/// `{"added": {path: value}, "removed": {path: value}, "changed": {path: {"from", "to"}}}`; paths are JSON Pointers (RFC 6901).
/// What is `None` is an object without fields.
pub(super) fn of_values(before: Option<&Value>, after: Option<&Value>) -> Value {
    let nothing = Value::Object(Map::new());
    let mut found = Found::default();
    found.compare(&mut String::new(), before.unwrap_or(&nothing), after.unwrap_or(&nothing));
    json!({ "added": found.added, "removed": found.removed, "changed": found.changed })
}

#[derive(Default)]
struct Found {
    added: Map<String, Value>,
    removed: Map<String, Value>,
    changed: Map<String, Value>,
}

impl Found {
    /// No deeper than serde_json reads.
    fn compare(&mut self, path: &mut String, before: &Value, after: &Value) {
        let at = path.len();
        match (before, after) {
            (Value::Object(a), Value::Object(b)) => {
                let names = a.keys().chain(b.keys().filter(|name| !a.contains_key(*name)));
                for name in names {
                    let _ = write!(path, "/{}", name.replace('~', "~0").replace('/', "~1"));
                    self.either(path, a.get(name), b.get(name));
                    path.truncate(at);
                }
            }
            (Value::Array(a), Value::Array(b)) => {
                for i in 0..a.len().max(b.len()) {
                    let _ = write!(path, "/{i}");
                    self.either(path, a.get(i), b.get(i));
                    path.truncate(at);
                }
            }
            (a, b) if a == b => {}
            (a, b) => drop(self.changed.insert(path.clone(), json!({ "from": a, "to": b }))),
        }
    }

    fn either(&mut self, path: &mut String, before: Option<&Value>, after: Option<&Value>) {
        match (before, after) {
            (Some(before), Some(after)) => self.compare(path, before, after),
            (Some(before), None) => drop(self.removed.insert(path.clone(), before.clone())),
            (None, Some(after)) => drop(self.added.insert(path.clone(), after.clone())),
            (None, None) => {}
        }
    }
}

/// The difference of two texts in unified format, under the names `from` and `to`; empty when there is none.
pub(super) fn of_texts(before: &str, after: &str, (from, to): (&str, &str)) -> String {
    let (a, b): (Vec<&str>, Vec<&str>) = (lines(before), lines(after));
    let steps = script(&a, &b);
    if steps.iter().all(|step| matches!(step, Step::Keep(..))) {
        return String::new();
    }
    let mut out = format!("--- {from}\n+++ {to}\n");
    for hunk in hunks(&steps) {
        write_hunk(&mut out, hunk, &a, &b);
    }
    out
}

/// With their line feeds.
fn lines(text: &str) -> Vec<&str> {
    text.split_inclusive('\n').collect()
}

/// One line of a difference: places in both texts, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Keep(usize, usize),
    Drop(usize, usize),
    Add(usize, usize),
}

/// From `a` to `b`.
fn script(a: &[&str], b: &[&str]) -> Vec<Step> {
    let same = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let (rest_a, rest_b) = (&a[same..], &b[same..]);
    let end = rest_a.iter().rev().zip(rest_b.iter().rev()).take_while(|(x, y)| x == y).count();
    let (n, m) = (rest_a.len() - end, rest_b.len() - end);
    let mut steps: Vec<Step> = (0..same).map(|i| Step::Keep(i, i)).collect();
    match shortest(&rest_a[..n], &rest_b[..m]) {
        Some(middle) => steps.extend(middle.into_iter().map(|step| shifted(step, same))),
        None => {
            steps.extend((0..n).map(|i| Step::Drop(same + i, same)));
            steps.extend((0..m).map(|j| Step::Add(same + n, same + j)));
        }
    }
    steps.extend((0..end).map(|i| Step::Keep(same + n + i, same + m + i)));
    steps
}

fn shifted(step: Step, by: usize) -> Step {
    match step {
        Step::Keep(i, j) => Step::Keep(i + by, j + by),
        Step::Drop(i, j) => Step::Drop(i + by, j + by),
        Step::Add(i, j) => Step::Add(i + by, j + by),
    }
}

/// The fewest edits, by Myers' greedy search over diagonals; `None` past the bounds.
fn shortest(a: &[&str], b: &[&str]) -> Option<Vec<Step>> {
    let (n, m) = (a.len() as isize, b.len() as isize);
    let most = (a.len() + b.len()).min(MAX_EDITS) as isize;
    // furthest[k + most + 1]: how far into `a` the diagonal k = x - y has got.
    let at = |k: isize| (k + most + 1) as usize;
    let mut furthest = vec![0isize; 2 * most as usize + 3];
    let mut rounds: Vec<Vec<isize>> = Vec::new();
    let mut compared = 0;
    for d in 0..=most {
        rounds.push(furthest[at(-d)..=at(d)].to_vec());
        for k in (-d..=d).step_by(2) {
            let down = k == -d || (k != d && furthest[at(k - 1)] < furthest[at(k + 1)]);
            let mut x = if down { furthest[at(k + 1)] } else { furthest[at(k - 1)] + 1 };
            while x < n && x - k < m && x >= 0 && x - k >= 0 && a[x as usize] == b[(x - k) as usize] {
                x += 1;
                compared += 1;
            }
            furthest[at(k)] = x;
            if x >= n && x - k >= m {
                return Some(backwards(&rounds, d, (n, m)));
            }
        }
        if compared > MAX_STEPS {
            return None;
        }
    }
    None
}

/// The way back through what each round found. `rounds[d]` holds diagonals -d to d as they were before round d.
fn backwards(rounds: &[Vec<isize>], edits: isize, (mut x, mut y): (isize, isize)) -> Vec<Step> {
    let mut steps = Vec::new();
    for d in (1..=edits).rev() {
        let round = &rounds[d as usize];
        let get = |k: isize| round[(k + d) as usize];
        let k = x - y;
        let down = k == -d || (k != d && get(k - 1) < get(k + 1));
        let (from, k) = if down { (get(k + 1), k + 1) } else { (get(k - 1), k - 1) };
        let (px, py) = (from, from - k);
        let (sx, sy) = if down { (px, py + 1) } else { (px + 1, py) };
        while x > sx && y > sy {
            (x, y) = (x - 1, y - 1);
            steps.push(Step::Keep(x as usize, y as usize));
        }
        steps.push(if down { Step::Add(px as usize, py as usize) } else { Step::Drop(px as usize, py as usize) });
        (x, y) = (px, py);
    }
    while x > 0 && y > 0 {
        (x, y) = (x - 1, y - 1);
        steps.push(Step::Keep(x as usize, y as usize));
    }
    steps.reverse();
    steps
}

/// Changes with what stands around them; those that are close together are one.
fn hunks(steps: &[Step]) -> Vec<&[Step]> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for (i, _) in steps.iter().enumerate().filter(|(_, step)| !matches!(step, Step::Keep(..))) {
        let (start, end) = (i.saturating_sub(CONTEXT), (i + 1 + CONTEXT).min(steps.len()));
        match ranges.last_mut() {
            Some(last) if start <= last.1 => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges.into_iter().map(|(start, end)| &steps[start..end]).collect()
}

fn write_hunk(out: &mut String, steps: &[Step], a: &[&str], b: &[&str]) {
    let count = |is: fn(&Step) -> bool| steps.iter().filter(|step| is(step)).count();
    let olds = count(|step| !matches!(step, Step::Add(..)));
    let news = count(|step| !matches!(step, Step::Drop(..)));
    let (i, j) = match steps.first() {
        Some(Step::Keep(i, j) | Step::Drop(i, j) | Step::Add(i, j)) => (*i, *j),
        None => return,
    };
    // An empty side is named by the line before it.
    let place = |first: usize, count: usize| if count == 0 { first } else { first + 1 };
    let _ = writeln!(out, "@@ -{},{olds} +{},{news} @@", place(i, olds), place(j, news));
    for step in steps {
        let (mark, line) = match step {
            Step::Keep(i, _) => (' ', a[*i]),
            Step::Drop(i, _) => ('-', a[*i]),
            Step::Add(_, j) => ('+', b[*j]),
        };
        out.push(mark);
        out.push_str(line);
        if !line.ends_with('\n') {
            out.push_str("\n\\ No newline at end of file\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_differ_by_path() {
        let before = json!({"a": 1, "b": {"x/y": [1, 2]}, "gone": null, "same": {"k": []}});
        let after = json!({"a": 2, "b": {"x/y": [1, 3, 4]}, "new": {"z": 1}, "same": {"k": []}});
        assert_eq!(
            of_values(Some(&before), Some(&after)),
            json!({
                "added": {"/b/x~1y/2": 4, "/new": {"z": 1}},
                "removed": {"/gone": null},
                "changed": {"/a": {"from": 1, "to": 2}, "/b/x~1y/1": {"from": 2, "to": 3}},
            })
        );
        let created = of_values(None, Some(&json!({"a": 1})));
        assert_eq!(created, json!({"added": {"/a": 1}, "removed": {}, "changed": {}}));
        let kind = of_values(Some(&json!({"a": [1]})), Some(&json!({"a": {"0": 1}})));
        assert_eq!(kind["changed"], json!({"/a": {"from": [1], "to": {"0": 1}}}));
    }

    #[test]
    fn texts_differ_by_line() {
        let text = |lines: &[&str]| lines.iter().map(|l| format!("{l}\n")).collect::<String>();
        let before = text(&["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]);
        let after = text(&["a", "B", "c", "d", "e", "f", "g", "h", "i", "j", "l", "m"]);
        assert_eq!(
            of_texts(&before, &after, ("x", "y")),
            "--- x\n+++ y\n@@ -1,5 +1,5 @@\n a\n-b\n+B\n c\n d\n e\n@@ -8,5 +8,5 @@\n h\n i\n j\n-k\n l\n+m\n"
        );
        assert_eq!(of_texts(&before, &before, ("x", "y")), "");
        assert_eq!(of_texts("", "a", ("x", "y")), "--- x\n+++ y\n@@ -0,0 +1,1 @@\n+a\n\\ No newline at end of file\n");
        assert_eq!(of_texts("a\n", "", ("x", "y")), "--- x\n+++ y\n@@ -1,1 +0,0 @@\n-a\n");
    }

    /// Every pair of short texts: applying the steps gives the other text.
    #[test]
    fn a_script_leads_from_one_text_to_the_other() {
        let texts: Vec<Vec<&str>> = (0..3usize.pow(5))
            .map(|n| (0..5).map(|i| ["a", "b", ""][n / 3usize.pow(i) % 3]).filter(|s| !s.is_empty()).collect())
            .collect();
        for a in &texts {
            for b in &texts {
                let steps = script(a, b);
                let built: Vec<&str> = steps
                    .iter()
                    .filter_map(|step| match step {
                        Step::Keep(i, j) => {
                            assert_eq!(a[*i], b[*j]);
                            Some(a[*i])
                        }
                        Step::Add(_, j) => Some(b[*j]),
                        Step::Drop(..) => None,
                    })
                    .collect();
                assert_eq!(&built, b, "{a:?} {steps:?}");
                let left = steps.iter().filter(|step| !matches!(step, Step::Add(..))).count();
                assert_eq!(left, a.len());
            }
        }
    }

    #[test]
    fn texts_that_are_far_apart_differ_as_a_whole() {
        let text = |n: usize, what: &str| (0..n).map(|i| format!("{what}{i}\n")).collect::<String>();
        let (near, far) = (text(MAX_EDITS / 2, "a"), text(MAX_EDITS, "a"));
        let with = |text: &str| format!("same\n{text}same\n");
        let counts = |a: &str, b: &str| {
            let diff = of_texts(&with(a), &with(b), ("x", "y"));
            (diff.matches("\n-a").count(), diff.matches("\n+b").count(), diff.matches("\n same").count())
        };
        assert_eq!(counts(&near, &text(MAX_EDITS / 2, "b")), (MAX_EDITS / 2, MAX_EDITS / 2, 2));
        assert_eq!(counts(&far, &text(MAX_EDITS, "b")), (MAX_EDITS, MAX_EDITS, 2));
        assert!(shortest(&lines(&near), &lines(&text(MAX_EDITS / 2, "b"))).is_some());
        assert!(shortest(&lines(&far), &lines(&text(MAX_EDITS, "b"))).is_none());
    }
}
