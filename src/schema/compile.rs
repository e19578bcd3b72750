//! From a schema's JSON to rules.

use std::cell::Cell;

use hashbrown::{HashMap, HashSet};
use serde_json::{Map, Value};

use super::pattern::Pattern;

/// How deep schemas may nest, `$ref` included: past it they are refused rather than recursed into.
const MAX_DEPTH: usize = 64;

/// Parts that one schema may have, each counted as often as a `$ref` leads to it: references that fan out double at each
/// level. The largest packed schema has some hundreds.
const MAX_PARTS: usize = 20_000;

/// Types as bits.
pub(super) mod types {
    pub const STRING: u8 = 1;
    pub const NUMBER: u8 = 2;
    pub const INTEGER: u8 = 4;
    pub const BOOLEAN: u8 = 8;
    pub const OBJECT: u8 = 16;
    pub const ARRAY: u8 = 32;
    pub const NULL: u8 = 64;
    pub const TABLE: u8 = 128;
}

#[derive(Debug, Default)]
pub(super) struct Node {
    /// 0: any.
    pub types: u8,
    /// As the error text names them: `string`, `one of string, number`.
    pub expected: Box<str>,
    /// `false` as a schema: nothing matches.
    pub never: bool,
    pub default: Option<Value>,
    pub object: Option<Box<Object>>,
    pub array: Option<Box<Array>>,
    pub string: Option<Box<Text>>,
    pub number: Option<Box<Number>>,
    pub compound: Option<Box<Compound>>,
}

#[derive(Debug, Default)]
pub(super) struct Object {
    pub properties: Vec<Property>,
    pub names: HashMap<Box<str>, usize>,
    /// The properties that are required or have a default: what is looked for when it is not given.
    pub awaited: Vec<usize>,
    /// Required names that have no schema of their own.
    pub required: Vec<Box<str>>,
    pub patterns: Vec<(Pattern, Node)>,
    pub additional: Additional,
    pub min: Option<usize>,
    pub max: Option<usize>,
    pub dependencies: Vec<(Box<str>, Dependency)>,
    pub property_names: Option<Node>,
}

#[derive(Debug)]
pub(super) struct Property {
    pub name: Box<str>,
    pub node: Node,
}

#[derive(Debug, Default)]
pub(super) enum Additional {
    #[default]
    Any,
    Forbidden,
    Checked(Node),
}

#[derive(Debug)]
pub(super) enum Dependency {
    Names(Vec<Box<str>>),
    Schema(Node),
}

#[derive(Debug, Default)]
pub(super) struct Array {
    pub items: Option<Node>,
    /// `items` as a list: one schema per place.
    pub places: Vec<Node>,
    pub additional: Additional,
    pub min: Option<usize>,
    pub max: Option<usize>,
    pub unique: bool,
    pub contains: Option<Node>,
}

#[derive(Debug, Default)]
pub(super) struct Text {
    pub min: Option<usize>,
    pub max: Option<usize>,
    pub pattern: Option<Pattern>,
    pub format: Option<Format>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Ipv4,
    Ipv6,
    Other(&'static str),
}

#[derive(Debug, Default)]
pub(super) struct Number {
    pub minimum: Option<f64>,
    pub maximum: Option<f64>,
    pub above: Option<f64>,
    pub below: Option<f64>,
    pub multiple_of: Option<f64>,
}

#[derive(Debug, Default)]
pub(super) struct Compound {
    pub values: Option<Vec<Value>>,
    pub constant: Option<Value>,
    pub all_of: Vec<Node>,
    pub any_of: Vec<Node>,
    /// `: ["active"] or ["active","passive"]`: the `required` of `anyOf`'s branches, for its error text.
    pub any_of_required: Box<str>,
    pub one_of: Vec<Node>,
    pub not: Option<Node>,
    pub condition: Option<Condition>,
}

#[derive(Debug)]
pub(super) struct Condition {
    pub when: Node,
    pub then: Option<Node>,
    pub otherwise: Option<Node>,
}

/// When the patterns of a schema are compiled.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Patterns {
    Verified,
    Lazy,
}

pub(super) fn root(schema: &Value, patterns: Patterns) -> Result<Node, String> {
    Compiler { root: schema, patterns, parts: Cell::new(0) }.node(schema, 0)
}

struct Compiler<'a> {
    root: &'a Value,
    patterns: Patterns,
    /// How many are compiled.
    parts: Cell<usize>,
}

impl Compiler<'_> {
    fn node(&self, schema: &Value, depth: usize) -> Result<Node, String> {
        if depth > MAX_DEPTH {
            return Err(format!("schema nests deeper than {MAX_DEPTH} levels"));
        }
        self.parts.set(self.parts.get() + 1);
        if self.parts.get() > MAX_PARTS {
            return Err(format!("schema has more than {MAX_PARTS} parts"));
        }
        let map = match schema {
            Value::Object(map) => map,
            Value::Bool(allowed) => return Ok(Node { never: !allowed, ..Node::default() }),
            // An empty Lua table becomes an empty list: no rules.
            Value::Array(list) if list.is_empty() => return Ok(Node::default()),
            other => return Err(format!("a schema must be an object, got {other}")),
        };
        if let Some(Value::String(pointer)) = map.get("$ref") {
            return self.node(self.resolve(pointer)?, depth + 1);
        }
        let (types, expected) = types_of(map)?;
        Ok(Node {
            types,
            expected,
            never: false,
            default: map.get("default").cloned(),
            object: self.object(map, depth + 1)?.map(Box::new),
            array: self.array(map, depth + 1)?.map(Box::new),
            string: self.text(map)?.map(Box::new),
            number: number(map).map(Box::new),
            compound: self.compound(map, depth + 1)?.map(Box::new),
        })
    }

    /// Local references only: `#`, `#/definitions/x`.
    fn resolve(&self, pointer: &str) -> Result<&Value, String> {
        let local = pointer.strip_prefix('#').ok_or_else(|| format!("cannot resolve reference {pointer}"))?;
        self.root.pointer(local).ok_or_else(|| format!("cannot resolve reference {pointer}"))
    }

    fn optional(&self, map: &Map<String, Value>, key: &str, depth: usize) -> Result<Option<Node>, String> {
        map.get(key).map(|schema| self.node(schema, depth)).transpose()
    }

    fn list(&self, map: &Map<String, Value>, key: &str, depth: usize) -> Result<Vec<Node>, String> {
        match map.get(key) {
            Some(Value::Array(list)) => list.iter().map(|schema| self.node(schema, depth)).collect(),
            _ => Ok(Vec::new()),
        }
    }

    fn additional(&self, map: &Map<String, Value>, key: &str, depth: usize) -> Result<Additional, String> {
        Ok(match map.get(key) {
            None | Some(Value::Bool(true)) => Additional::Any,
            Some(Value::Bool(false)) => Additional::Forbidden,
            Some(schema) => Additional::Checked(self.node(schema, depth)?),
        })
    }

    fn object(&self, map: &Map<String, Value>, depth: usize) -> Result<Option<Object>, String> {
        const KEYS: [&str; 8] = [
            "properties",
            "required",
            "patternProperties",
            "additionalProperties",
            "minProperties",
            "maxProperties",
            "dependencies",
            "propertyNames",
        ];
        if !KEYS.iter().any(|key| map.contains_key(*key)) {
            return Ok(None);
        }
        let mut required: HashSet<&str> = HashSet::new();
        let mut order = Vec::new();
        if let Some(Value::Array(names)) = map.get("required") {
            order.extend(names.iter().filter_map(Value::as_str));
            required.extend(order.iter());
        }
        let mut object = Object {
            additional: self.additional(map, "additionalProperties", depth)?,
            min: count(map, "minProperties"),
            max: count(map, "maxProperties"),
            property_names: self.optional(map, "propertyNames", depth)?,
            ..Object::default()
        };
        if let Some(Value::Object(properties)) = map.get("properties") {
            for (name, schema) in properties {
                // A misplaced keyword (`additionalProperties: false` inside `properties`) is no property.
                if !schema.is_object() && name == "additionalProperties" {
                    continue;
                }
                let node = self.node(schema, depth)?;
                object.names.insert(name.as_str().into(), object.properties.len());
                let required = required.contains(name.as_str());
                if required || node.default.is_some() {
                    object.awaited.push(object.properties.len());
                }
                object.properties.push(Property { name: name.as_str().into(), node });
            }
        }
        object.required = order.into_iter().filter(|name| !object.names.contains_key(*name)).map(Into::into).collect();
        if let Some(Value::Object(patterns)) = map.get("patternProperties") {
            for (source, schema) in patterns {
                object.patterns.push((self.pattern(source)?, self.node(schema, depth)?));
            }
        }
        if let Some(Value::Object(dependencies)) = map.get("dependencies") {
            for (name, rule) in dependencies {
                object.dependencies.push((name.as_str().into(), self.dependency(rule, depth)?));
            }
        }
        Ok(Some(object))
    }

    fn dependency(&self, rule: &Value, depth: usize) -> Result<Dependency, String> {
        Ok(match rule {
            Value::Array(names) => Dependency::Names(names.iter().filter_map(Value::as_str).map(Into::into).collect()),
            schema => Dependency::Schema(self.node(schema, depth)?),
        })
    }

    fn array(&self, map: &Map<String, Value>, depth: usize) -> Result<Option<Array>, String> {
        const KEYS: [&str; 5] = ["items", "minItems", "maxItems", "uniqueItems", "contains"];
        if !KEYS.iter().any(|key| map.contains_key(*key)) {
            return Ok(None);
        }
        let mut array = Array {
            min: count(map, "minItems"),
            max: count(map, "maxItems"),
            unique: map.get("uniqueItems") == Some(&Value::Bool(true)),
            contains: self.optional(map, "contains", depth)?,
            ..Array::default()
        };
        match map.get("items") {
            Some(Value::Array(_)) => {
                array.places = self.list(map, "items", depth)?;
                array.additional = self.additional(map, "additionalItems", depth)?;
            }
            Some(schema) => array.items = Some(self.node(schema, depth)?),
            None => {}
        }
        Ok(Some(array))
    }

    fn text(&self, map: &Map<String, Value>) -> Result<Option<Text>, String> {
        let text = Text {
            min: count(map, "minLength"),
            max: count(map, "maxLength"),
            pattern: map.get("pattern").and_then(Value::as_str).map(|p| self.pattern(p)).transpose()?,
            format: map.get("format").and_then(Value::as_str).and_then(format),
        };
        let empty = text.min.is_none() && text.max.is_none() && text.pattern.is_none() && text.format.is_none();
        Ok((!empty).then_some(text))
    }

    fn pattern(&self, source: &str) -> Result<Pattern, String> {
        let pattern = Pattern::new(source);
        if self.patterns == Patterns::Verified {
            pattern.verify()?;
        }
        Ok(pattern)
    }

    fn compound(&self, map: &Map<String, Value>, depth: usize) -> Result<Option<Compound>, String> {
        const KEYS: [&str; 7] = ["enum", "const", "allOf", "anyOf", "oneOf", "not", "if"];
        if !KEYS.iter().any(|key| map.contains_key(*key)) {
            return Ok(None);
        }
        let condition = match self.optional(map, "if", depth)? {
            Some(when) => Some(Condition {
                when,
                then: self.optional(map, "then", depth)?,
                otherwise: self.optional(map, "else", depth)?,
            }),
            None => None,
        };
        Ok(Some(Compound {
            values: map.get("enum").and_then(Value::as_array).cloned(),
            constant: map.get("const").cloned(),
            all_of: self.list(map, "allOf", depth)?,
            any_of: self.list(map, "anyOf", depth)?,
            any_of_required: required_of_branches(map),
            one_of: self.list(map, "oneOf", depth)?,
            not: self.optional(map, "not", depth)?,
            condition,
        }))
    }
}

fn required_of_branches(map: &Map<String, Value>) -> Box<str> {
    let Some(Value::Array(branches)) = map.get("anyOf") else {
        return Box::default();
    };
    let lists: Vec<String> = branches.iter().filter_map(|b| b.get("required")).map(Value::to_string).collect();
    if lists.is_empty() { Box::default() } else { format!(": {}", lists.join(" or ")).into() }
}

fn types_of(map: &Map<String, Value>) -> Result<(u8, Box<str>), String> {
    match map.get("type") {
        Some(Value::String(name)) => Ok((type_bit(name)?, name.as_str().into())),
        Some(Value::Array(names)) => {
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            let mut bits = 0;
            for name in &names {
                bits |= type_bit(name)?;
            }
            Ok((bits, format!("one of {}", names.join(", ")).into()))
        }
        _ => Ok((0, Box::default())),
    }
}

fn type_bit(name: &str) -> Result<u8, String> {
    Ok(match name {
        "string" => types::STRING,
        "number" => types::NUMBER | types::INTEGER,
        "integer" => types::INTEGER,
        "boolean" => types::BOOLEAN,
        "object" => types::OBJECT,
        "array" => types::ARRAY,
        "null" => types::NULL,
        "table" => types::OBJECT | types::ARRAY | types::TABLE,
        "any" => u8::MAX,
        // A Lua function cannot stand in JSON: such a schema is checked where the value lives.
        "function" => u8::MAX,
        other => return Err(format!("invalid JSON type: {other}")),
    })
}

fn format(name: &str) -> Option<Format> {
    match name {
        "ipv4" => Some(Format::Ipv4),
        "ipv6" => Some(Format::Ipv6),
        "email" => Some(Format::Other("email")),
        "hostname" => Some(Format::Other("hostname")),
        "date" => Some(Format::Other("date")),
        "date-time" => Some(Format::Other("date-time")),
        _ => None,
    }
}

fn number(map: &Map<String, Value>) -> Option<Number> {
    let of = |key| map.get(key).and_then(Value::as_f64);
    let strict = |key| map.get(key) == Some(&Value::Bool(true));
    let (minimum, maximum) = (of("minimum"), of("maximum"));
    let rules = Number {
        // Draft 4 writes `exclusiveMinimum: true` beside `minimum`.
        above: of("exclusiveMinimum").or(minimum.filter(|_| strict("exclusiveMinimum"))),
        below: of("exclusiveMaximum").or(maximum.filter(|_| strict("exclusiveMaximum"))),
        minimum: minimum.filter(|_| !strict("exclusiveMinimum")),
        maximum: maximum.filter(|_| !strict("exclusiveMaximum")),
        multiple_of: of("multipleOf"),
    };
    let some = [rules.minimum, rules.maximum, rules.above, rules.below, rules.multiple_of];
    some.iter().any(Option::is_some).then_some(rules)
}

fn count(map: &Map<String, Value>, key: &str) -> Option<usize> {
    map.get(key).and_then(Value::as_f64).map(|n| n as usize)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::Schema, *};

    #[test]
    fn schemas_nest_only_so_deep() {
        // Each level is a reference, which costs one.
        let chain = |links: usize| {
            let link = |n: usize| (n.to_string(), json!({"$ref": format!("#/definitions/{}", n + 1)}));
            let mut definitions: Map<String, Value> = (0..links).map(link).collect();
            definitions.insert(links.to_string(), json!({"type": "string"}));
            json!({"definitions": definitions, "$ref": "#/definitions/0"})
        };
        Schema::compile(&chain(MAX_DEPTH - 1)).expect("is no deeper than that");
        let refused = Schema::compile(&chain(MAX_DEPTH)).expect_err("is deeper");
        assert_eq!(refused, "schema nests deeper than 64 levels");
    }

    #[test]
    fn references_that_fan_out_are_bounded() {
        let fan = |levels: usize| {
            let to = |n: usize| json!({"$ref": format!("#/definitions/{}", n + 1)});
            let level = |n: usize| (n.to_string(), json!({"properties": {"a": to(n), "b": to(n)}}));
            let mut definitions: Map<String, Value> = (0..levels).map(level).collect();
            definitions.insert(levels.to_string(), json!({"type": "string"}));
            json!({"definitions": definitions, "$ref": "#/definitions/0"})
        };
        Schema::compile(&fan(10)).expect("some thousands of parts");
        let refused = Schema::compile(&fan(20)).expect_err("a million");
        assert_eq!(refused, "schema has more than 20000 parts");
    }
}
