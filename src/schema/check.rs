//! A value against compiled rules.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Map, Value};

use super::compile::{Additional, Array, Compound, Dependency, Format, Node, Number, Object, Text, types};

type Outcome = Result<(), String>;

/// Whether a refusal must say why. Branches of `anyOf` and the like are only asked whether they match.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Detail {
    Text,
    None,
}

impl Detail {
    #[inline]
    fn refuse(self, text: impl FnOnce() -> String) -> Outcome {
        Err(match self {
            Detail::Text => text(),
            Detail::None => String::new(),
        })
    }

    /// Puts `text` before the refusal of something inside.
    #[inline]
    fn within(self, outcome: Outcome, text: impl FnOnce() -> String) -> Outcome {
        match outcome {
            Err(inner) if self == Detail::Text => Err(text() + &inner),
            other => other,
        }
    }
}

pub(super) fn check(node: &Node, value: &mut Value, detail: Detail) -> Outcome {
    if node.never {
        return detail.refuse(|| "no value is allowed".into());
    }
    if node.types != 0 && !has_type(node.types, value) {
        return detail.refuse(|| format!("wrong type: expected {}, got {}", node.expected, lua_type(value)));
    }
    match value {
        Value::Object(map) => {
            if let Some(rules) = &node.object {
                object(rules, map, detail)?;
            }
            // An empty Lua table is both, so an empty object is also an empty list.
            if let (Some(rules), true) = (&node.array, map.is_empty() && node.types & types::ARRAY != 0) {
                array(rules, &mut [], detail)?;
            }
        }
        Value::Array(items) => {
            if let Some(rules) = &node.array {
                array(rules, items, detail)?;
            }
        }
        Value::String(s) => {
            if let Some(rules) = &node.string {
                text(rules, s, detail)?;
            }
        }
        Value::Number(n) => {
            if let Some(rules) = &node.number {
                number(rules, n.as_f64().unwrap_or(f64::NAN), detail)?;
            }
        }
        Value::Bool(_) | Value::Null => {}
    }
    match &node.compound {
        Some(rules) => compound(rules, value, detail),
        None => Ok(()),
    }
}

fn matches(node: &Node, value: &mut Value) -> bool {
    check(node, value, Detail::None).is_ok()
}

fn has_type(bits: u8, value: &Value) -> bool {
    match value {
        Value::Null => bits & types::NULL != 0,
        Value::Bool(_) => bits & types::BOOLEAN != 0,
        Value::String(_) => bits & types::STRING != 0,
        Value::Array(_) => bits & types::ARRAY != 0,
        Value::Object(map) => bits & types::OBJECT != 0 || (map.is_empty() && bits & types::ARRAY != 0),
        Value::Number(_) if bits & types::NUMBER != 0 => true,
        Value::Number(n) => {
            bits & types::INTEGER != 0 && (n.is_i64() || n.is_u64() || n.as_f64().is_some_and(|f| f.fract() == 0.0))
        }
    }
}

fn lua_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "userdata",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) | Value::Object(_) => "table",
    }
}

fn object(rules: &Object, map: &mut Map<String, Value>, detail: Detail) -> Outcome {
    let given = map.len();
    for property in &rules.properties {
        if let Some(value) = map.get_mut(&*property.name) {
            let outcome = check(&property.node, value, detail);
            detail.within(outcome, || format!("property \"{}\" validation failed: ", property.name))?;
        } else if let Some(default) = &property.node.default {
            let mut value = default.clone();
            // Fills what the default itself leaves out; a default is never refused.
            if value.is_object() {
                let _ = check(&property.node, &mut value, Detail::None);
            }
            map.insert(property.name.as_ref().to_owned(), value);
        } else if property.required {
            return detail.refuse(|| format!("property \"{}\" is required", property.name));
        }
    }
    if let Some(name) = rules.required.iter().find(|name| !map.contains_key(&***name)) {
        return detail.refuse(|| format!("property \"{name}\" is required"));
    }
    if let Some(min) = rules.min.filter(|min| given < *min) {
        return detail.refuse(|| format!("expect object to have at least {min} properties"));
    }
    if let Some(max) = rules.max.filter(|max| given > *max) {
        return detail.refuse(|| format!("expect object to have at most {max} properties"));
    }
    others(rules, map, detail)?;
    rules.dependencies.iter().try_for_each(|(name, rule)| dependency(name, rule, map, detail))
}

/// What `properties` does not name: `patternProperties` (which also sees the named), then `additionalProperties`.
fn others(rules: &Object, map: &mut Map<String, Value>, detail: Detail) -> Outcome {
    let plain = rules.patterns.is_empty() && rules.property_names.is_none();
    if plain && matches!(rules.additional, Additional::Any) {
        return Ok(());
    }
    for (name, value) in map.iter_mut() {
        if let Some(node) = &rules.property_names {
            let outcome = check(node, &mut Value::String(name.clone()), detail);
            detail.within(outcome, || format!("property name \"{name}\" is invalid: "))?;
        }
        let mut known = rules.names.contains_key(name.as_str());
        for (pattern, node) in &rules.patterns {
            if pattern.is_match(name) {
                known = true;
                let outcome = check(node, value, detail);
                detail.within(outcome, || format!("failed to validate {name} (matching \"{}\"): ", pattern.source))?;
            }
        }
        match &rules.additional {
            Additional::Forbidden if !known => {
                return detail.refuse(|| format!("additional properties forbidden, found {name}"));
            }
            Additional::Checked(node) if !known => {
                let outcome = check(node, value, detail);
                detail.within(outcome, || format!("failed to validate additional property {name}: "))?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn dependency(name: &str, rule: &Dependency, map: &mut Map<String, Value>, detail: Detail) -> Outcome {
    if !map.contains_key(name) {
        return Ok(());
    }
    match rule {
        Dependency::Names(names) => match names.iter().find(|other| !map.contains_key(&***other)) {
            Some(other) => detail.refuse(|| format!("property \"{other}\" is required when \"{name}\" is set")),
            None => Ok(()),
        },
        Dependency::Schema(node) => {
            // The rule sees the object as a value: lend it.
            let mut whole = Value::Object(std::mem::take(map));
            let outcome = check(node, &mut whole, detail);
            if let Value::Object(lent) = whole {
                *map = lent;
            }
            detail.within(outcome, || format!("failed to validate dependent schema for \"{name}\": "))
        }
    }
}

fn array(rules: &Array, items: &mut [Value], detail: Detail) -> Outcome {
    if let Some(min) = rules.min.filter(|min| items.len() < *min) {
        return detail.refuse(|| format!("expect array to have at least {min} items"));
    }
    if let Some(max) = rules.max.filter(|max| items.len() > *max) {
        return detail.refuse(|| format!("expect array to have at most {max} items"));
    }
    for (i, item) in items.iter_mut().enumerate() {
        let node = match (rules.places.get(i), &rules.additional, &rules.items) {
            (Some(node), ..) => node,
            (None, Additional::Forbidden, _) => {
                return detail.refuse(|| format!("expect array to have at most {} items", rules.places.len()));
            }
            (None, Additional::Checked(node), _) | (None, Additional::Any, Some(node)) => node,
            (None, Additional::Any, None) => continue,
        };
        let outcome = check(node, item, detail);
        detail.within(outcome, || format!("failed to validate item {}: ", i + 1))?;
    }
    if rules.unique {
        unique(items, detail)?;
    }
    if let Some(node) = &rules.contains
        && !items.iter_mut().any(|item| matches(node, item))
    {
        return detail.refuse(|| "failed to check contains".into());
    }
    Ok(())
}

/// Past so many items, equal strings are found by hash instead of by comparing each with each.
const UNIQUE_BY_HASH: usize = 16;

fn unique(items: &[Value], detail: Detail) -> Outcome {
    let refuse = |i: usize, j: usize| {
        detail.refuse(|| format!("expected unique items but items {} and {} are equal", i + 1, j + 1))
    };
    if items.len() > UNIQUE_BY_HASH {
        let mut seen = hashbrown::HashMap::with_capacity(items.len());
        for (j, item) in items.iter().enumerate() {
            // The JSON text tells types apart; 1 and 1.0 are not worth a slow path.
            if let Some(i) = seen.insert(item.to_string(), j) {
                return refuse(i, j);
            }
        }
        return Ok(());
    }
    for (j, item) in items.iter().enumerate() {
        if let Some(i) = items[..j].iter().position(|other| equal(other, item)) {
            return refuse(i, j);
        }
    }
    Ok(())
}

/// As Lua compares: all numbers are floats.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        _ => a == b,
    }
}

fn text(rules: &Text, s: &str, detail: Detail) -> Outcome {
    if rules.min.is_some() || rules.max.is_some() {
        let length = if s.is_ascii() { s.len() } else { s.chars().count() };
        if let Some(min) = rules.min.filter(|min| length < *min) {
            return detail.refuse(|| format!("string too short, expected at least {min}, got {length}"));
        }
        if let Some(max) = rules.max.filter(|max| length > *max) {
            return detail.refuse(|| format!("string too long, expected at most {max}, got {length}"));
        }
    }
    if let Some(pattern) = &rules.pattern
        && !pattern.is_match(s)
    {
        return detail
            .refuse(|| format!("failed to match pattern {} with {}", lua_quoted(&pattern.source), lua_quoted(s)));
    }
    match rules.format {
        Some(format) if !has_format(format, s) => detail.refuse(|| format!("expected valid {} format", name(format))),
        _ => Ok(()),
    }
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Ipv4 => "ipv4",
        Format::Ipv6 => "ipv6",
        Format::Other(name) => name,
    }
}

fn has_format(format: Format, s: &str) -> bool {
    match format {
        Format::Ipv4 => s.parse::<Ipv4Addr>().is_ok(),
        Format::Ipv6 => s.parse::<Ipv6Addr>().is_ok(),
        Format::Other("email") => s.split_once('@').is_some_and(|(a, b)| !a.is_empty() && b.contains('.')),
        Format::Other("date") => chrono::NaiveDate::parse_from_str(s, "%Y-%m-%d").is_ok(),
        Format::Other("date-time") => chrono::DateTime::parse_from_rfc3339(s).is_ok(),
        Format::Other(_) => !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.')),
    }
}

/// Lua's `%q`.
fn lua_quoted(s: &str) -> String {
    let mut out = String::with_capacity(s.len() + 2);
    out.push('"');
    for c in s.chars() {
        match c {
            '"' | '\\' | '\n' => {
                out.push('\\');
                out.push(c);
            }
            '\r' => out.push_str("\\r"),
            '\0' => out.push_str("\\0"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn number(rules: &Number, n: f64, detail: Detail) -> Outcome {
    let refuse = |what: &str, bound: f64| {
        detail.refuse(|| format!("expected {} to be {what} {}", lua_number(n), lua_number(bound)))
    };
    match rules {
        Number { minimum: Some(bound), .. } if n < *bound => refuse("at least", *bound),
        Number { above: Some(bound), .. } if n <= *bound => refuse("greater than", *bound),
        Number { maximum: Some(bound), .. } if n > *bound => refuse("at most", *bound),
        Number { below: Some(bound), .. } if n >= *bound => refuse("smaller than", *bound),
        Number { multiple_of: Some(step), .. } if *step != 0.0 && (n / step).fract() != 0.0 => {
            refuse("a multiple of", *step)
        }
        _ => Ok(()),
    }
}

/// As Lua prints a number: `%.14g`.
pub(super) fn lua_number(n: f64) -> String {
    if n.fract() == 0.0 && n.abs() < 1e14 {
        return format!("{n:.0}");
    }
    if !n.is_finite() {
        return if n.is_nan() {
            "nan".into()
        } else if n > 0.0 {
            "inf".into()
        } else {
            "-inf".into()
        };
    }
    let scientific = format!("{n:.13e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trim = |s: &str| {
        if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.').to_owned() } else { s.to_owned() }
    };
    if (-4..14).contains(&exponent) {
        return trim(&format!("{n:.*}", (13 - exponent).max(0) as usize));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trim(digits), exponent.abs())
}

fn compound(rules: &Compound, value: &mut Value, detail: Detail) -> Outcome {
    if let Some(values) = &rules.values
        && !values.iter().any(|allowed| equal(allowed, value))
    {
        return detail.refuse(|| "matches none of the enum values".into());
    }
    if let Some(constant) = &rules.constant
        && !equal(constant, value)
    {
        return detail.refuse(|| "failed to check const value".into());
    }
    for (i, node) in rules.all_of.iter().enumerate() {
        let outcome = check(node, value, detail);
        detail.within(outcome, || format!("allOf {} failed: ", i + 1))?;
    }
    if !rules.any_of.is_empty() && !rules.any_of.iter().any(|node| matches(node, value)) {
        return detail.refuse(|| format!("object matches none of the required{}", rules.any_of_required));
    }
    if !rules.one_of.is_empty() {
        one_of(&rules.one_of, value, detail)?;
    }
    if let Some(node) = &rules.not
        && matches(node, value)
    {
        return detail.refuse(|| "value wasn't supposed to match schema".into());
    }
    let Some(condition) = &rules.condition else {
        return Ok(());
    };
    let (branch, name) =
        if matches(&condition.when, value) { (&condition.then, "then") } else { (&condition.otherwise, "else") };
    match branch {
        Some(node) if !matches(node, value) => detail.refuse(|| format!("{name} clause did not match")),
        _ => Ok(()),
    }
}

fn one_of(nodes: &[Node], value: &mut Value, detail: Detail) -> Outcome {
    let mut matched = None;
    for (i, node) in nodes.iter().enumerate() {
        if !matches(node, value) {
            continue;
        }
        if let Some(first) = matched.replace(i + 1) {
            return detail.refuse(|| {
                format!("value should match only one schema, but matches both schemas {first} and {}", i + 1)
            });
        }
    }
    match matched {
        Some(_) => Ok(()),
        None => detail.refuse(|| "value should match only one schema, but matches none".into()),
    }
}
