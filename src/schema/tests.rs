use serde_json::{Value, json};

use super::*;

fn check(schema: Value, mut value: Value) -> Result<Value, String> {
    Schema::compile(&schema).expect("the schema compiles").check(&mut value)?;
    Ok(value)
}

/// As with a Lua client, whose empty table is written as either.
#[test]
fn an_empty_list_is_an_empty_object_where_one_is_wanted() {
    assert_eq!(check(json!({"type": "object"}), json!([])), Ok(json!({})));
    assert_eq!(check(json!({"type": ["object", "array"]}), json!([])), Ok(json!([])));
    assert_eq!(check(json!({"type": "array"}), json!([])), Ok(json!([])));
}

fn refusal(schema: Value, value: Value) -> String {
    check(schema, value).expect_err("must be refused")
}

#[test]
fn refusals_read_as_in_apisix() {
    let cases = [
        (
            json!({"properties": {"uri": {"type": "string"}}}),
            json!({"uri": 1}),
            r#"property "uri" validation failed: wrong type: expected string, got number"#,
        ),
        (json!({"required": ["x"]}), json!({}), r#"property "x" is required"#),
        (json!({"properties": {"x": {"type": "string"}}, "required": ["x"]}), json!({}), r#"property "x" is required"#),
        (
            json!({"properties": {}, "additionalProperties": false}),
            json!({"foo": 1}),
            "additional properties forbidden, found foo",
        ),
        (json!({"type": "integer"}), json!(1.5), "wrong type: expected integer, got number"),
        (json!({"type": "array"}), json!({"a": 1}), "wrong type: expected array, got table"),
        (json!({"type": "object"}), json!([1]), "wrong type: expected object, got table"),
        (json!({"type": "object", "required": ["a"]}), json!([]), "property \"a\" is required"),
        (json!({"type": "array", "minItems": 1}), json!([]), "expect array to have at least 1 items"),
        (json!({"type": "array", "minItems": 1}), json!({}), "expect array to have at least 1 items"),
        (json!({"uniqueItems": true}), json!([200, 200]), "expected unique items but items 1 and 2 are equal"),
        (
            json!({"items": {"type": "string"}}),
            json!(["a", 2]),
            "failed to validate item 2: wrong type: expected string, got number",
        ),
        (json!({"minLength": 1}), json!(""), "string too short, expected at least 1, got 0"),
        (json!({"maxLength": 2}), json!("äöü"), "string too long, expected at most 2, got 3"),
        (json!({"pattern": "^\\/.*"}), json!("home"), r#"failed to match pattern "^\\/.*" with "home""#),
        (json!({"enum": [1, 0]}), json!(2), "matches none of the enum values"),
        (json!({"minimum": 0.00001}), json!(-0.1), "expected -0.1 to be at least 1e-05"),
        (json!({"exclusiveMinimum": 0}), json!(0), "expected 0 to be greater than 0"),
        (json!({"maximum": 599}), json!(600), "expected 600 to be at most 599"),
        (
            json!({"anyOf": [{"required": ["active"]}, {"required": ["active", "passive"]}]}),
            json!({}),
            r#"object matches none of the required: ["active"] or ["active","passive"]"#,
        ),
        (
            json!({"anyOf": [{"type": "string"}, {"type": "integer"}]}),
            json!(true),
            "object matches none of the required",
        ),
        (
            json!({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
            json!({"a": 1, "b": 1}),
            "value should match only one schema, but matches both schemas 1 and 2",
        ),
        (
            json!({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
            json!({}),
            "value should match only one schema, but matches none",
        ),
        (
            json!({"allOf": [{"oneOf": [{"required": ["a"]}]}]}),
            json!({}),
            "allOf 1 failed: value should match only one schema, but matches none",
        ),
        (json!({"not": {"required": ["a"]}}), json!({"a": 1}), "value wasn't supposed to match schema"),
        (json!({"if": {"required": ["a"]}, "then": {"required": ["b"]}}), json!({"a": 1}), "then clause did not match"),
        (json!({"maxProperties": 1}), json!({"a": 1, "b": 2}), "expect object to have at most 1 properties"),
        (json!({"contains": {"const": "exact"}}), json!(["semantic"]), "failed to check contains"),
        (
            json!({"dependencies": {"a": {"required": ["b"]}}}),
            json!({"a": 1}),
            r#"failed to validate dependent schema for "a": property "b" is required"#,
        ),
        (
            json!({"patternProperties": {".*": {"type": "string"}}}),
            json!({"env": ["a"]}),
            r#"failed to validate env (matching ".*"): wrong type: expected string, got table"#,
        ),
        (
            json!({"additionalProperties": {"pattern": "^\\$.*"}}),
            json!({"X": "department"}),
            r#"failed to validate additional property X: failed to match pattern "^\\$.*" with "department""#,
        ),
    ];
    for (schema, value, text) in cases {
        assert_eq!(refusal(schema.clone(), value.clone()), text, "{schema} on {value}");
    }
}

#[test]
fn a_schema_that_is_wrong_is_refused() {
    assert!(
        Schema::compile(&json!({"type": "invalid type"})).is_err_and(|e| e.contains("invalid JSON type: invalid type"))
    );
    assert!(Schema::compile(&json!({"$ref": "#"})).is_err(), "endless reference");
    assert!(Schema::compile(&json!({"properties": {"a": {"pattern": "("}}})).is_err(), "not a pattern");
}

#[test]
fn defaults_are_filled_also_in_branches_and_in_defaults() {
    let schema = json!({
        "properties": {
            "policy": {"default": "redis", "type": "string"},
            "exact": {"default": {}, "properties": {"ttl": {"default": 300}}, "type": "object"},
        },
        "if": {"properties": {"policy": {"enum": ["redis"]}}},
        "then": {"properties": {"port": {"default": 6379}}},
    });
    let filled = check(schema, json!({})).expect("valid");
    assert_eq!(filled, json!({"policy": "redis", "exact": {"ttl": 300}, "port": 6379}));
}

#[test]
fn an_empty_object_is_an_empty_list() {
    check(json!({"type": "array"}), json!({})).expect("an empty table is a list");
    check(json!({"type": "object"}), json!({})).expect("and an object");
}

#[test]
fn every_packed_schema_compiles() {
    for name in ["route", "service", "upstream", "consumer", "ssl", "proto", "stream_route", "credential", "function"] {
        assert!(resource(name).is_some(), "{name}");
    }
    assert_eq!(plugin_names().count(), 107);
    for name in plugin_names() {
        assert!(plugin(name).is_some(), "{name}");
    }
}

#[test]
fn every_packed_pattern_compiles() {
    fn walk(value: &Value, count: &mut usize) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(source)) = map.get("pattern") {
                    pattern::Pattern::new(source).verify().expect("a valid pattern");
                    *count += 1;
                }
                map.values().for_each(|v| walk(v, count));
            }
            Value::Array(list) => list.iter().for_each(|v| walk(v, count)),
            _ => {}
        }
    }
    let mut count = 0;
    walk(&serde_json::from_str(all_json()).expect("JSON"), &mut count);
    assert!(count > 100, "{count}");
}

#[test]
fn a_route_is_checked_and_filled() {
    let mut route = json!({"uri": "/get", "upstream": {"nodes": {"127.0.0.1:8080": 1}, "type": "roundrobin"}});
    let schema = resource("route").expect("packed");
    schema.check(&mut route).expect("valid");
    assert_eq!(route["priority"], 0);
    assert_eq!(route["upstream"]["pass_host"], "pass");
    let mut route = json!({"uri": "/get", "id": -100, "plugins": {}});
    assert_eq!(
        schema.check(&mut route).expect_err("id"),
        r#"property "id" validation failed: object matches none of the required"#
    );
    schema.check(&mut json!({"uri": "/hello", "function_id": "hello"})).expect("a function answers");
}

#[test]
fn numbers_print_as_in_lua() {
    for (n, text) in [(0.0, "0"), (-1.0, "-1"), (1e-5, "1e-05"), (0.1, "0.1"), (1e15, "1e+15"), (2.5, "2.5")] {
        assert_eq!(check::lua_number(n), text);
    }
}
