//! `vars` expressions (lua-resty-expr): `[["arg_name", "==", "json"], ["arg_age", ">", 18]]`, compiled once.
//!
//! Pure: variables come from a callback. A variable that is a list (`graphql_root_fields`) is given with its items joined by commas.
//! A comparison that makes no sense for the value at hand is false, never an error.

pub mod path;

use std::{borrow::Cow, cmp::Ordering, net::IpAddr};

use ipnet::IpNet;
use pcre2::bytes::{Regex, RegexBuilder};
use serde_json::Value;

/// How deep expressions may nest.
const MAX_DEPTH: usize = 32;

/// A compiled expression.
#[derive(Debug)]
pub struct Expr(Term);

#[derive(Debug)]
enum Term {
    All(Vec<Term>),
    Any(Vec<Term>),
    Not(Box<Term>),
    Compare { var: Box<str>, test: Test },
}

#[derive(Debug)]
enum Test {
    Equal(Operand),
    Unequal(Operand),
    Order(Operand, fn(Ordering) -> bool),
    /// `None`: the pattern does not compile, and so matches nothing.
    Regex(Option<Box<Regex>>),
    In(Vec<Operand>),
    Has(Operand),
    Ip(Vec<IpNet>),
}

/// The right side.
#[derive(Debug, PartialEq)]
enum Operand {
    Null,
    Number(f64),
    Text(Box<str>),
}

impl Expr {
    /// Compiles `vars`. The text is the one lua-resty-expr gives.
    pub fn compile(vars: &Value) -> Result<Expr, String> {
        match vars {
            Value::Array(items) => group(items, 0).map(Expr),
            // An empty Lua table.
            Value::Object(map) if map.is_empty() => Ok(Expr(Term::All(Vec::new()))),
            other => Err(format!("expected list, got {}", kind(other))),
        }
    }

    /// Whether the expression holds for the variables that `var` gives.
    pub fn eval<'a>(&self, var: &mut dyn FnMut(&str) -> Option<Cow<'a, [u8]>>) -> bool {
        self.0.eval(var)
    }
}

fn group(items: &[Value], depth: usize) -> Result<Term, String> {
    if depth > MAX_DEPTH {
        return Err("invalid expression: nests too deep".into());
    }
    let Some(first) = items.first() else {
        return Ok(Term::All(Vec::new()));
    };
    let Some(name) = first.as_str() else {
        return Ok(Term::All(rules(items, depth)?));
    };
    let rest = &items[1..];
    Ok(match name {
        "AND" => Term::All(rules(rest, depth)?),
        "OR" => Term::Any(rules(rest, depth)?),
        "!AND" => Term::Not(Box::new(Term::All(rules(rest, depth)?))),
        "!OR" => Term::Not(Box::new(Term::Any(rules(rest, depth)?))),
        _ => return Err("rule should be wrapped inside brackets".into()),
    })
}

fn rules(items: &[Value], depth: usize) -> Result<Vec<Term>, String> {
    items.iter().map(|item| rule(item, depth + 1)).collect()
}

fn rule(item: &Value, depth: usize) -> Result<Term, String> {
    let items = match item {
        Value::Array(items) => items,
        Value::Object(map) if map.is_empty() => return Err("rule too short".into()),
        _ => return Err("rule should be wrapped inside brackets".into()),
    };
    match items.first().map(Value::as_str) {
        None => Err("rule too short".into()),
        // Rules in brackets of their own hold together.
        Some(None) if items[0].is_array() => group(items, depth),
        Some(None) => Err("invalid expression".into()),
        Some(Some("AND" | "OR" | "!AND" | "!OR")) => group(items, depth),
        Some(Some(var)) => comparison(var, &items[1..]),
    }
}

fn comparison(var: &str, rest: &[Value]) -> Result<Term, String> {
    if let Some(path) = var.strip_prefix("post_arg.")
        && path::Path::parse(path).is_none()
    {
        return Err(format!("invalid expression: {path:?} is no path"));
    }
    let term = |operator: &Value, right: &Value| Ok(Term::Compare { var: var.into(), test: test(operator, right)? });
    match rest {
        [] => Err("rule too short".into()),
        // An older form: `[var, value]` is equality.
        [right] => Ok(Term::Compare { var: var.into(), test: Test::Equal(operand(right)) }),
        [Value::String(not), operator, right, ..] if not == "!" => Ok(Term::Not(Box::new(term(operator, right)?))),
        [Value::String(not), ..] if not == "!" => Err("rule too short".into()),
        [operator, right, ..] => term(operator, right),
    }
}

fn test(operator: &Value, right: &Value) -> Result<Test, String> {
    let invalid = || format!("invalid operator '{}'", operator.as_str().map_or(operator.to_string(), str::to_owned));
    Ok(match operator.as_str().ok_or_else(invalid)? {
        "==" => Test::Equal(operand(right)),
        "~=" => Test::Unequal(operand(right)),
        ">" => Test::Order(operand(right), Ordering::is_gt),
        ">=" => Test::Order(operand(right), Ordering::is_ge),
        "<" => Test::Order(operand(right), Ordering::is_lt),
        "<=" => Test::Order(operand(right), Ordering::is_le),
        "~~" => Test::Regex(regex(right, false)),
        "~*" => Test::Regex(regex(right, true)),
        "in" | "IN" => Test::In(list(right).iter().map(operand).collect()),
        "has" | "HAS" => Test::Has(operand(right)),
        "ipmatch" | "IPMATCH" => Test::Ip(networks(right)?),
        _ => return Err(invalid()),
    })
}

/// The items of a list; a single value is a list of one.
fn list(value: &Value) -> &[Value] {
    match value {
        Value::Array(items) => items,
        Value::Object(_) => &[],
        single => std::slice::from_ref(single),
    }
}

fn operand(value: &Value) -> Operand {
    match value {
        Value::Number(n) => Operand::Number(n.as_f64().unwrap_or(f64::NAN)),
        Value::String(s) => Operand::Text(s.as_str().into()),
        Value::Bool(b) => Operand::Text(b.to_string().into()),
        _ => Operand::Null,
    }
}

fn regex(pattern: &Value, ignore_case: bool) -> Option<Box<Regex>> {
    let mut builder = RegexBuilder::new();
    builder.caseless(ignore_case).jit_if_available(true);
    builder.build(pattern.as_str()?).ok().map(Box::new)
}

fn networks(right: &Value) -> Result<Vec<IpNet>, String> {
    let parse = |item: &Value| {
        let text = item.as_str().unwrap_or_default();
        network(text).ok_or_else(|| format!("invalid ip address: {text}"))
    };
    list(right).iter().map(parse).collect()
}

/// `10.0.0.0/8`, or an address as a network of one.
pub fn network(text: &str) -> Option<IpNet> {
    match text.parse::<IpNet>() {
        Ok(net) => Some(net),
        Err(_) => text.parse::<IpAddr>().ok().map(IpNet::from),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) | Value::Object(_) => "table",
    }
}

impl Term {
    fn eval<'a>(&self, var: &mut dyn FnMut(&str) -> Option<Cow<'a, [u8]>>) -> bool {
        match self {
            Term::All(terms) => terms.iter().all(|term| term.eval(var)),
            Term::Any(terms) => terms.iter().any(|term| term.eval(var)),
            Term::Not(term) => !term.eval(var),
            Term::Compare { var: name, test } => test.holds(var(name).as_deref()),
        }
    }
}

impl Test {
    fn holds(&self, left: Option<&[u8]>) -> bool {
        match self {
            Test::Equal(right) => right.equals(left),
            Test::Unequal(right) => !right.equals(left),
            Test::Order(right, wanted) => left.and_then(|left| right.order(left)).is_some_and(wanted),
            Test::Regex(Some(regex)) => left.is_some_and(|left| regex.is_match(left).unwrap_or(false)),
            Test::Regex(None) => false,
            Test::In(items) => items.iter().any(|item| item.equals(left)),
            Test::Has(right) => {
                left.is_some_and(|left| left.split(|b| *b == b',').any(|item| right.equals(Some(item))))
            }
            Test::Ip(nets) => {
                let address = left.and_then(|left| std::str::from_utf8(left).ok()).and_then(|s| s.parse().ok());
                address.is_some_and(|ip: IpAddr| nets.iter().any(|net| net.contains(&ip)))
            }
        }
    }
}

impl Operand {
    fn equals(&self, left: Option<&[u8]>) -> bool {
        match (self, left) {
            (Operand::Null, left) => left.is_none(),
            (_, None) => false,
            (Operand::Text(right), Some(left)) => right.as_bytes() == left,
            (Operand::Number(right), Some(left)) => lua_tonumber(left) == Some(*right),
        }
    }

    /// `left` against this: as numbers when both are, else as strings when this is one.
    fn order(&self, left: &[u8]) -> Option<Ordering> {
        match self {
            Operand::Null => None,
            Operand::Number(right) => lua_tonumber(left)?.partial_cmp(right),
            Operand::Text(right) => match (lua_tonumber(left), lua_tonumber(right.as_bytes())) {
                (Some(left), Some(right)) => left.partial_cmp(&right),
                _ => Some(left.cmp(right.as_bytes())),
            },
        }
    }
}

/// Lua's `tonumber` of a string.
fn lua_tonumber(text: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(text).ok()?.trim_ascii();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).ok().map(|n| n as f64);
    }
    // Rust also reads `inf`, `nan` and their like, which Lua does not.
    let numeric = text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'+' | b'e' | b'E'));
    text.parse().ok().filter(|_| numeric)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn holds(vars: Value, values: &[(&str, &str)]) -> bool {
        let expr = Expr::compile(&vars).expect("compiles");
        let find = |name: &str| values.iter().find(|(n, _)| *n == name).map(|(_, v)| v.as_bytes().into());
        expr.eval(&mut { find })
    }

    #[test]
    fn compares_as_lua_resty_expr_does() {
        let values = [("arg_name", "json"), ("arg_age", "20"), ("remote_addr", "10.1.2.3"), ("fields", "owner,repo")];
        for (vars, expected) in [
            (json!([]), true),
            (json!({}), true),
            (json!([["arg_name", "==", "json"]]), true),
            (json!([["arg_name", "==", "JSON"]]), false),
            (json!([["arg_name", "json"]]), true),
            (json!([["arg_name", "~=", "x"]]), true),
            (json!([["missing", "~=", "x"]]), true),
            (json!([["missing", "==", null]]), true),
            (json!([["arg_name", "==", null]]), false),
            (json!([["arg_age", "==", 20]]), true),
            (json!([["arg_age", ">", 18]]), true),
            (json!([["arg_age", ">=", "9"]]), true),
            (json!([["arg_age", "<", 18]]), false),
            (json!([["arg_age", "!", "<", 18]]), true),
            (json!([["arg_age", "<=", 20.0]]), true),
            (json!([["arg_name", ">", 18]]), false),
            (json!([["missing", "<", 18]]), false),
            (json!([["arg_name", "~~", "^js(?=on)"]]), true),
            (json!([["arg_name", "~~", "JS"]]), false),
            (json!([["arg_name", "~*", "JS"]]), true),
            (json!([["missing", "!", "~*", "JS"]]), true),
            (json!([["arg_name", "~~", "("]]), false),
            (json!([["arg_name", "IN", ["xml", "json"]]]), true),
            (json!([["arg_age", "in", [19, 20]]]), true),
            (json!([["arg_name", "in", []]]), false),
            (json!([["fields", "has", "repo"]]), true),
            (json!([["fields", "has", "rep"]]), false),
            (json!([["remote_addr", "ipmatch", ["192.168.0.1", "10.0.0.0/8"]]]), true),
            (json!([["remote_addr", "ipmatch", "10.1.2.4"]]), false),
            (json!(["OR", ["arg_name", "==", "x"], ["arg_age", "==", 20]]), true),
            (json!(["!OR", ["arg_name", "==", "x"], ["arg_age", "==", 20]]), false),
            (json!(["!AND", ["arg_name", "==", "x"], ["arg_age", "==", 20]]), true),
            (
                json!([["arg_age", "==", 20], ["OR", ["arg_name", "==", "x"], ["AND", ["arg_name", "==", "json"]]]]),
                true,
            ),
        ] {
            assert_eq!(holds(vars.clone(), &values), expected, "{vars}");
        }
    }

    #[test]
    fn refuses_what_is_no_expression() {
        for (vars, text) in [
            (json!([["remote_addr", "=", "127.0.0.1"]]), "invalid operator '='"),
            (json!([["arg_x", 123, "a"]]), "invalid operator '123'"),
            (json!(["http_user_agent", "~*", "android"]), "rule should be wrapped inside brackets"),
            (json!([[]]), "rule too short"),
            (json!([["arg_x"]]), "rule too short"),
            (json!([["arg_x", "!", "=="]]), "rule too short"),
            (json!([[7, "==", "y"]]), "invalid expression"),
            (json!([[["arg_x", "=", "y"]]]), "invalid operator '='"),
            (json!([["remote_addr", "ipmatch", ["x"]]]), "invalid ip address: x"),
        ] {
            assert_eq!(Expr::compile(&vars).expect_err("refused"), text, "{vars}");
        }
    }

    #[test]
    fn expressions_nest_only_so_deep() {
        let nested = |depth: usize| (0..depth).fold(json!([["arg_x", "==", "a"]]), |inner, _| json!([inner]));
        let deepest = Expr::compile(&nested(MAX_DEPTH)).expect("is no deeper than that");
        assert!(deepest.eval(&mut |_| Some(b"a".into())));
        let refused = Expr::compile(&nested(MAX_DEPTH + 1)).expect_err("is deeper");
        assert_eq!(refused, "invalid expression: nests too deep");
    }
}
