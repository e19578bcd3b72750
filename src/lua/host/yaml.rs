//! `lyaml`: YAML documents to Lua values and back. Nesting and repetition by aliases are bounded by the parser.

use serde::Deserialize;
use serde_norway::{Deserializer, Value};

use super::Answer;
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        convert,
    },
};

/// Nesting that is followed: the parser's own bound.
const MAX_DEPTH: usize = 128;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.yaml.load", any, "load(text) -> array of documents, count | nil, err; null is ngx.null", load)?;
    api.func("native.yaml.dump", any, "dump(value) -> text of one document | nil, err", dump)
}

fn load(s: &Stack) -> Answer {
    let text = s.arg_bytes(1)?;
    let mut documents = Vec::new();
    for document in Deserializer::from_slice(text) {
        let read = Value::deserialize(document).and_then(|mut value| value.apply_merge().map(|()| value));
        match read {
            Ok(value) => documents.push(value),
            Err(e) => return s.fail(e.to_string()),
        }
    }
    s.push_table(documents.len(), 0);
    for (i, document) in documents.iter().enumerate() {
        push(s, document, 0)?;
        s.set_index(-2, i + 1);
    }
    Ok(1 + s.push_number(documents.len() as f64))
}

fn push(s: &Stack, value: &Value, depth: usize) -> std::result::Result<(), Raise> {
    if depth > MAX_DEPTH {
        return Err("YAML is nested too deeply".into());
    }
    s.reserve(4)?;
    match value {
        Value::Null => s.push_null(),
        Value::Bool(b) => s.push_bool(*b),
        Value::Number(n) => s.push_number(n.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => s.push_bytes(text),
        Value::Tagged(tagged) => return push(s, &tagged.value, depth + 1),
        Value::Sequence(items) => {
            s.push_table(items.len(), 0);
            for (i, item) in items.iter().enumerate() {
                push(s, item, depth + 1)?;
                s.set_index(-2, i + 1);
            }
            convert::mark_array(s)
        }
        Value::Mapping(fields) => {
            s.push_table(0, fields.len());
            for (key, item) in fields {
                push(s, key, depth + 1)?;
                // A key that is not a number is no key of a table.
                if key.as_f64().is_some_and(f64::is_nan) {
                    return Err("YAML key is not a number".into());
                }
                push(s, item, depth + 1)?;
                // SAFETY: a table lies below its key and value; the key is neither nil nor NaN.
                unsafe { mlua::ffi::lua_rawset(s.raw(), -3) };
            }
            1
        }
    };
    Ok(())
}

fn dump(s: &Stack) -> Answer {
    let value = convert::to_json(s, 1)?;
    match serde_norway::to_string(&value) {
        Ok(text) => Ok(s.push_bytes(text)),
        Err(e) => s.fail(e.to_string()),
    }
}
