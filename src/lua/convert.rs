//! JSON to Lua values and back.
//!
//! As cjson does in APISIX: `null` is `cjson.null` (lightuserdata), an array carries `cjson.array_mt`, so that an
//! empty one is written as `[]` again.

use std::ffi::c_int;

use mlua::ffi;
use serde_json::{Map, Number, Value};

use super::{
    api::{Raise, Stack},
    limits,
};

/// Registry key of the metatable that marks arrays; boot puts it at `cjson.array_mt`.
pub const ARRAY_MT: &std::ffi::CStr = c"moongate.array_mt";

/// Nesting that `push_json` and `to_json` follow: cjson's `decode_max_depth`.
const MAX_DEPTH: usize = 1000;

/// Pushes `value`.
pub fn push_json(stack: &Stack, value: &Value) -> Result<(), Raise> {
    push(stack, value, 0)
}

fn push(stack: &Stack, value: &Value, depth: usize) -> Result<(), Raise> {
    if depth > MAX_DEPTH {
        return Err("JSON is nested too deeply".into());
    }
    stack.reserve(4)?;
    match value {
        Value::Null => stack.push_null(),
        Value::Bool(b) => stack.push_bool(*b),
        Value::Number(n) => stack.push_number(n.as_f64().unwrap_or(f64::NAN)),
        Value::String(s) => stack.push_bytes(s),
        Value::Array(items) => {
            stack.push_table(items.len(), 0);
            for (i, item) in items.iter().enumerate() {
                push(stack, item, depth + 1)?;
                stack.set_index(-2, i + 1);
            }
            mark_array(stack)
        }
        Value::Object(fields) => {
            stack.push_table(0, fields.len());
            for (key, item) in fields {
                push(stack, item, depth + 1)?;
                stack.set(-2, key);
            }
            1
        }
    };
    Ok(())
}

/// Gives the table on top the array metatable.
pub fn mark_array(stack: &Stack) -> c_int {
    // SAFETY: the registry holds a table under ARRAY_MT from the VM's first moment; setmetatable pops it.
    unsafe {
        ffi::lua_getfield_(stack.raw(), ffi::LUA_REGISTRYINDEX, ARRAY_MT.as_ptr());
        ffi::lua_setmetatable(stack.raw(), -2);
    }
    1
}

/// Reads the value at `i` as JSON. What JSON lacks (functions, userdata, sparse arrays) is an error.
pub fn to_json(stack: &Stack, i: c_int) -> Result<Value, Raise> {
    read(stack, stack.absolute(i), 0)
}

fn read(stack: &Stack, i: c_int, depth: usize) -> Result<Value, Raise> {
    if depth > MAX_DEPTH {
        return Err("a table is nested too deeply for JSON".into());
    }
    match stack.kind(i) {
        ffi::LUA_TNIL | ffi::LUA_TLIGHTUSERDATA => Ok(Value::Null),
        ffi::LUA_TBOOLEAN => Ok(Value::Bool(stack.boolean(i))),
        ffi::LUA_TNUMBER => Ok(number(stack.number(i).unwrap_or(0.0))),
        ffi::LUA_TSTRING => Ok(Value::String(String::from_utf8_lossy(stack.bytes(i).unwrap_or_default()).into_owned())),
        ffi::LUA_TTABLE => read_table(stack, i, depth),
        _ => Err(format!("Cannot serialise {}: type not supported", stack.kind_name(i)).into()),
    }
}

/// Whole numbers stay whole: `1`, not `1.0`.
fn number(n: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if n.fract() == 0.0 && n.abs() <= EXACT {
        return Value::from(n as i64);
    }
    Number::from_f64(n).map_or(Value::Null, Value::Number)
}

fn read_table(stack: &Stack, i: c_int, depth: usize) -> Result<Value, Raise> {
    limits::check()?;
    stack.reserve(4)?;
    let len = stack.len(i);
    if len > 0 || is_marked(stack, i) {
        let mut items = Vec::with_capacity(len);
        for n in 1..=len {
            stack.get_index(i, n);
            let item = read(stack, stack.top(), depth + 1);
            stack.pop(1);
            items.push(item?);
        }
        return Ok(Value::Array(items));
    }
    let mut fields = Map::new();
    stack.pairs(i, |s| {
        let key = match s.kind(-2) {
            ffi::LUA_TSTRING => String::from_utf8_lossy(s.bytes(-2).unwrap_or_default()).into_owned(),
            ffi::LUA_TNUMBER => number(s.number(-2).unwrap_or(0.0)).to_string(),
            _ => return Err(Raise("Cannot serialise table: table key must be a number or string".into())),
        };
        fields.insert(key, read(s, s.top(), depth + 1)?);
        Ok(())
    })?;
    Ok(Value::Object(fields))
}

/// Whether the table carries the array metatable.
pub fn is_array(stack: &Stack, i: c_int) -> bool {
    is_marked(stack, i)
}

fn is_marked(stack: &Stack, i: c_int) -> bool {
    // SAFETY: getmetatable pushes only when it returns non-zero; both pushed values are popped.
    unsafe {
        if ffi::lua_getmetatable(stack.raw(), i) == 0 {
            return false;
        }
        ffi::lua_getfield_(stack.raw(), ffi::LUA_REGISTRYINDEX, ARRAY_MT.as_ptr());
        let same = ffi::lua_rawequal(stack.raw(), -1, -2) != 0;
        ffi::lua_pop(stack.raw(), 2);
        same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lua::host::tests::serve_with;

    #[test]
    fn values_pass_only_so_deep() {
        let there_and_back = |s: &Stack| {
            let value = to_json(s, 1)?;
            push_json(s, &Value::Array(vec![value]))?;
            Ok(1)
        };
        let nested = |levels: usize| {
            format!(
                "local t = 'x' for _ = 1, {levels} do t = {{t}} end
                 return (select(2, pcall(function()
                     local back, levels = f(t), 0
                     while type(back) == 'table' do back, levels = back[1], levels + 1 end
                     return back .. levels
                 end)):gsub('^.-:%d+: ', ''))"
            )
        };
        serve_with(there_and_back, &nested(MAX_DEPTH - 1), &format!("x{MAX_DEPTH}"));
        serve_with(there_and_back, &nested(MAX_DEPTH), "JSON is nested too deeply");
        serve_with(there_and_back, &nested(MAX_DEPTH + 1), "a table is nested too deeply for JSON");
    }
}
