//! A value against compiled rules.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Map, Value};

use super::compile::{Additional, Array, Compound, Dependency, Format, Node, Number, Object, Text, types};

type Outcome = Result<(), String>;

/// How a value is checked.
#[derive(Clone, Copy)]
pub(super) struct Mode {
    /// Whether a refusal must say why. Branches of `anyOf` and the like are only asked whether they match.
    pub text: bool,
    /// Whether defaults are written into the value.
    pub fill: bool,
}

impl Mode {
    #[inline]
    fn refuse(self, text: impl FnOnce() -> String) -> Outcome {
        Err(if self.text { text() } else { String::new() })
    }

    /// Puts `text` before the refusal of something inside.
    #[inline]
    fn within(self, outcome: Outcome, text: impl FnOnce() -> String) -> Outcome {
        match outcome {
            Err(inner) if self.text => Err(text() + &inner),
            other => other,
        }
    }

    fn silent(self) -> Mode {
        Mode { text: false, ..self }
    }
}

pub(super) fn check(node: &Node, value: &mut Value, mode: Mode) -> Outcome {
    if node.never {
        return mode.refuse(|| "no value is allowed".into());
    }
    // What it stands for is not known before it is used.
    if value.as_str().is_some_and(super::is_reference) {
        return Ok(());
    }
    // An empty Lua table is both: clients that write it as `[]` mean an object where the schema asks for one.
    if matches!(value, Value::Array(items) if items.is_empty())
        && node.types & (types::ARRAY | types::OBJECT) == types::OBJECT
    {
        *value = Value::Object(Map::new());
    }
    if node.types != 0 && !has_type(node.types, value) {
        return mode.refuse(|| format!("wrong type: expected {}, got {}", node.expected, lua_type(value)));
    }
    match value {
        Value::Object(map) => {
            if let Some(rules) = &node.object {
                object(rules, map, mode)?;
            }
            // An empty Lua table is both, so an empty object is also an empty list.
            if let (Some(rules), true) = (&node.array, map.is_empty() && node.types & types::ARRAY != 0) {
                array(rules, &mut [], mode)?;
            }
        }
        Value::Array(items) => {
            if let Some(rules) = &node.array {
                array(rules, items, mode)?;
            }
        }
        Value::String(s) => {
            if let Some(rules) = &node.string {
                text(rules, s, mode)?;
            }
        }
        Value::Number(n) => {
            if let Some(rules) = &node.number {
                number(rules, n.as_f64().unwrap_or(f64::NAN), mode)?;
            }
        }
        Value::Bool(_) | Value::Null => {}
    }
    match &node.compound {
        Some(rules) => compound(rules, value, mode),
        None => Ok(()),
    }
}

fn matches(node: &Node, value: &mut Value, mode: Mode) -> bool {
    check(node, value, mode.silent()).is_ok()
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

fn object(rules: &Object, map: &mut Map<String, Value>, mode: Mode) -> Outcome {
    let given = map.len();
    map.iter_mut().try_for_each(|(name, value)| member(rules, name, value, mode))?;
    for at in &rules.awaited {
        let property = &rules.properties[*at];
        if map.contains_key(&*property.name) {
            continue;
        }
        match &property.node.default {
            Some(default) if mode.fill => {
                let mut value = default.clone();
                // Fills what the default itself leaves out; a default is never refused.
                if value.is_object() {
                    let _ = check(&property.node, &mut value, mode.silent());
                }
                map.insert(property.name.as_ref().to_owned(), value);
            }
            Some(_) => {}
            None => return mode.refuse(|| format!("property \"{}\" is required", property.name)),
        }
    }
    if let Some(name) = rules.required.iter().find(|name| !map.contains_key(&***name)) {
        return mode.refuse(|| format!("property \"{name}\" is required"));
    }
    if let Some(min) = rules.min.filter(|min| given < *min) {
        return mode.refuse(|| format!("expect object to have at least {min} properties"));
    }
    if let Some(max) = rules.max.filter(|max| given > *max) {
        return mode.refuse(|| format!("expect object to have at most {max} properties"));
    }
    rules.dependencies.iter().try_for_each(|(name, rule)| dependency(name, rule, map, mode))
}

/// One member: by `properties`, `patternProperties` (which also see the named), else `additionalProperties`.
fn member(rules: &Object, name: &str, value: &mut Value, mode: Mode) -> Outcome {
    if let Some(node) = &rules.property_names {
        let outcome = check(node, &mut Value::String(name.to_owned()), mode);
        mode.within(outcome, || format!("property name \"{name}\" is invalid: "))?;
    }
    let property = rules.names.get(name).map(|at| &rules.properties[*at]);
    if let Some(property) = property {
        let outcome = check(&property.node, value, mode);
        mode.within(outcome, || format!("property \"{name}\" validation failed: "))?;
    }
    let mut known = property.is_some();
    for (pattern, node) in &rules.patterns {
        if pattern.is_match(name) {
            known = true;
            let outcome = check(node, value, mode);
            mode.within(outcome, || format!("failed to validate {name} (matching \"{}\"): ", pattern.source))?;
        }
    }
    match &rules.additional {
        Additional::Forbidden if !known => mode.refuse(|| format!("additional properties forbidden, found {name}")),
        Additional::Checked(node) if !known => {
            let outcome = check(node, value, mode);
            mode.within(outcome, || format!("failed to validate additional property {name}: "))
        }
        _ => Ok(()),
    }
}

fn dependency(name: &str, rule: &Dependency, map: &mut Map<String, Value>, mode: Mode) -> Outcome {
    if !map.contains_key(name) {
        return Ok(());
    }
    match rule {
        Dependency::Names(names) => match names.iter().find(|other| !map.contains_key(&***other)) {
            Some(other) => mode.refuse(|| format!("property \"{other}\" is required when \"{name}\" is set")),
            None => Ok(()),
        },
        Dependency::Schema(node) => {
            // The rule sees the object as a value: lend it.
            let mut whole = Value::Object(std::mem::take(map));
            let outcome = check(node, &mut whole, mode);
            if let Value::Object(lent) = whole {
                *map = lent;
            }
            mode.within(outcome, || format!("failed to validate dependent schema for \"{name}\": "))
        }
    }
}

fn array(rules: &Array, items: &mut [Value], mode: Mode) -> Outcome {
    if let Some(min) = rules.min.filter(|min| items.len() < *min) {
        return mode.refuse(|| format!("expect array to have at least {min} items"));
    }
    if let Some(max) = rules.max.filter(|max| items.len() > *max) {
        return mode.refuse(|| format!("expect array to have at most {max} items"));
    }
    for (i, item) in items.iter_mut().enumerate() {
        let node = match (rules.places.get(i), &rules.additional, &rules.items) {
            (Some(node), ..) => node,
            (None, Additional::Forbidden, _) => {
                return mode.refuse(|| format!("expect array to have at most {} items", rules.places.len()));
            }
            (None, Additional::Checked(node), _) | (None, Additional::Any, Some(node)) => node,
            (None, Additional::Any, None) => continue,
        };
        let outcome = check(node, item, mode);
        mode.within(outcome, || format!("failed to validate item {}: ", i + 1))?;
    }
    if rules.unique {
        unique(items, mode)?;
    }
    if let Some(node) = &rules.contains
        && !items.iter_mut().any(|item| matches(node, item, mode))
    {
        return mode.refuse(|| "failed to check contains".into());
    }
    Ok(())
}

/// Past so many items, equal strings are found by hash instead of by comparing each with each.
const UNIQUE_BY_HASH: usize = 16;

fn unique(items: &[Value], mode: Mode) -> Outcome {
    let refuse = |i: usize, j: usize| {
        mode.refuse(|| format!("expected unique items but items {} and {} are equal", i + 1, j + 1))
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

fn text(rules: &Text, s: &str, mode: Mode) -> Outcome {
    if rules.min.is_some() || rules.max.is_some() {
        let length = if s.is_ascii() { s.len() } else { s.chars().count() };
        if let Some(min) = rules.min.filter(|min| length < *min) {
            return mode.refuse(|| format!("string too short, expected at least {min}, got {length}"));
        }
        if let Some(max) = rules.max.filter(|max| length > *max) {
            return mode.refuse(|| format!("string too long, expected at most {max}, got {length}"));
        }
    }
    if let Some(pattern) = &rules.pattern
        && !pattern.is_match(s)
    {
        return mode
            .refuse(|| format!("failed to match pattern {} with {}", lua_quoted(&pattern.source), lua_quoted(s)));
    }
    match rules.format {
        Some(format) if !has_format(format, s) => mode.refuse(|| format!("expected valid {} format", name(format))),
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

fn number(rules: &Number, n: f64, mode: Mode) -> Outcome {
    let refuse = |what: &str, bound: f64| {
        mode.refuse(|| format!("expected {} to be {what} {}", lua_number(n), lua_number(bound)))
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

fn compound(rules: &Compound, value: &mut Value, mode: Mode) -> Outcome {
    if let Some(values) = &rules.values
        && !values.iter().any(|allowed| equal(allowed, value))
    {
        return mode.refuse(|| "matches none of the enum values".into());
    }
    if let Some(constant) = &rules.constant
        && !equal(constant, value)
    {
        return mode.refuse(|| "failed to check const value".into());
    }
    for (i, node) in rules.all_of.iter().enumerate() {
        let outcome = check(node, value, mode);
        mode.within(outcome, || format!("allOf {} failed: ", i + 1))?;
    }
    if !rules.any_of.is_empty() && !rules.any_of.iter().any(|node| matches(node, value, mode)) {
        return mode.refuse(|| format!("object matches none of the required{}", rules.any_of_required));
    }
    if !rules.one_of.is_empty() {
        one_of(&rules.one_of, value, mode)?;
    }
    if let Some(node) = &rules.not
        && matches(node, value, mode)
    {
        return mode.refuse(|| "value wasn't supposed to match schema".into());
    }
    let Some(condition) = &rules.condition else {
        return Ok(());
    };
    let (branch, name) =
        if matches(&condition.when, value, mode) { (&condition.then, "then") } else { (&condition.otherwise, "else") };
    match branch {
        Some(node) if !matches(node, value, mode) => mode.refuse(|| format!("{name} clause did not match")),
        _ => Ok(()),
    }
}

fn one_of(nodes: &[Node], value: &mut Value, mode: Mode) -> Outcome {
    let mut matched = None;
    for (i, node) in nodes.iter().enumerate() {
        if !matches(node, value, mode) {
            continue;
        }
        if let Some(first) = matched.replace(i + 1) {
            return mode.refuse(|| {
                format!("value should match only one schema, but matches both schemas {first} and {}", i + 1)
            });
        }
    }
    match matched {
        Some(_) => Ok(()),
        None => mode.refuse(|| "value should match only one schema, but matches none".into()),
    }
}
