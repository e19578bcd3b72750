//! Paths into JSON, as `post_arg.messages[*].content[0].type` has one behind its first dot: names, places and stars.

use serde_json::Value;

/// Steps of a path, and values that its stars may lead to: what is asked of a body is asked of every request.
const MAX_STEPS: usize = 32;
const MAX_FOUND: usize = 1000;

/// A path, read.
#[derive(Debug, PartialEq, Eq)]
pub struct Path<'a>(Vec<Step<'a>>);

#[derive(Debug, PartialEq, Eq)]
enum Step<'a> {
    Name(&'a str),
    /// From 0.
    Place(usize),
    All,
}

impl<'a> Path<'a> {
    /// `a.b[0].c[*]['d']`; `None`: that is no path.
    pub fn parse(text: &'a str) -> Option<Path<'a>> {
        let mut steps = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let step;
            (step, rest) = match rest.strip_prefix('[') {
                Some(inner) => bracket(inner)?,
                None => name(rest, steps.is_empty())?,
            };
            steps.push(step);
            if steps.len() > MAX_STEPS {
                return None;
            }
        }
        (!steps.is_empty()).then_some(Path(steps))
    }

    /// What is there. `None`: nothing.
    pub fn found<'v>(&self, json: &'v Value) -> Option<Found<'v>> {
        let found = self.values(json);
        match self.0.contains(&Step::All) {
            true => (!found.is_empty()).then_some(Found::Several(found)),
            false => found.first().map(|value| Found::One(value)),
        }
    }

    fn values<'v>(&self, json: &'v Value) -> Vec<&'v Value> {
        let mut found = vec![json];
        for step in &self.0 {
            found = found.into_iter().flat_map(|value| step.of(value)).take(MAX_FOUND).collect();
        }
        found
    }

    /// What is there, as text: the items of several joined by commas. `None`: nothing is there.
    pub fn text(&self, json: &Value) -> Option<Vec<u8>> {
        let found = self.values(json);
        let mut texts: Vec<String> = Vec::new();
        for value in found {
            match value {
                Value::Array(items) => texts.extend(items.iter().take(MAX_FOUND).filter_map(text_of)),
                single => texts.extend(text_of(single)),
            }
        }
        (!texts.is_empty()).then(|| texts.join(",").into_bytes())
    }
}

/// What a path leads to.
#[derive(Debug, PartialEq)]
pub enum Found<'v> {
    One(&'v Value),
    /// By stars.
    Several(Vec<&'v Value>),
}

impl Step<'_> {
    fn of<'v>(&self, value: &'v Value) -> Box<dyn Iterator<Item = &'v Value> + 'v> {
        match (self, value) {
            (Step::Name(name), Value::Object(map)) => Box::new(map.get(*name).into_iter()),
            (Step::Place(at), Value::Array(items)) => Box::new(items.get(*at).into_iter()),
            (Step::All, Value::Array(items)) => Box::new(items.iter()),
            (Step::All, Value::Object(map)) => Box::new(map.values()),
            _ => Box::new(std::iter::empty()),
        }
    }
}

fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

fn name(text: &str, first: bool) -> Option<(Step<'_>, &str)> {
    let text = if first { text } else { text.strip_prefix('.')? };
    let end = text.find(['.', '[']).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let step = if name == "*" { Step::All } else { Step::Name(name) };
    let is_sound = !name.is_empty() && !name.contains([']', '(', ')', '\'', '"']);
    is_sound.then_some((step, rest))
}

/// What stands behind `[`.
fn bracket(text: &str) -> Option<(Step<'_>, &str)> {
    for quote in ['\'', '"'] {
        if let Some(quoted) = text.strip_prefix(quote) {
            let (name, rest) = quoted.split_once(quote)?;
            return Some((Step::Name(name), rest.strip_prefix(']')?));
        }
    }
    let (inner, rest) = text.split_once(']')?;
    match inner {
        "*" => Some((Step::All, rest)),
        place => Some((Step::Place(place.parse().ok()?), rest)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_lead_to_values() {
        let json = json!({
            "model": {"name": "m", "size": 1.5, "on": true, "none": null},
            "messages": [{"content": [{"type": "text"}, {"type": "image"}]}, {"content": "plain"}],
            "a b": [1, 2],
        });
        let cases = [
            ("model.name", Some("m")),
            ("model.size", Some("1.5")),
            ("model.on", Some("true")),
            ("model.none", None),
            ("model.name.deeper", None),
            ("messages[*].content[*].type", Some("text,image")),
            ("messages[0].content[1]['type']", Some("image")),
            ("messages[9].content", None),
            ("['a b']", Some("1,2")),
            ("model.*", Some("m,true,1.5")),
        ];
        for (path, wanted) in cases {
            let got = Path::parse(path).expect(path).text(&json);
            assert_eq!(got.as_deref(), wanted.map(str::as_bytes), "{path}");
        }
    }

    #[test]
    fn what_is_no_path_is_refused() {
        for text in ["", "a[", "a[.b", "a[x]", "a..b", "a.", ".a", "a['b]", "a]", "a[-1]"] {
            assert_eq!(Path::parse(text), None, "{text}");
        }
        assert!(Path::parse(&"[0]".repeat(MAX_STEPS)).is_some());
        assert!(Path::parse(&"[0]".repeat(MAX_STEPS + 1)).is_none());
    }

    #[test]
    fn stars_end_at_their_bound() {
        let row = Value::from(vec![1; MAX_FOUND]);
        let json = json!({"a": [row, row]});
        let found = Path::parse("a[*][*]").and_then(|path| path.text(&json)).expect("something");
        assert_eq!(found.split(|b| *b == b',').count(), MAX_FOUND);
    }
}
