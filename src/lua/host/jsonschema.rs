//! `jsonschema`: validators over `crate::schema` that check a Lua table and fill its defaults in place.

use std::ffi::{c_int, c_void};

use mlua::ffi;
use serde_json::{Map, Value};

use super::{Answer, native};
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        convert, limits,
    },
    schema::Schema,
};

/// Nesting of a table that is checked: above what any schema describes.
const MAX_DEPTH: usize = 100;

/// Its address is the key of the userdata's metatable.
static METATABLE: u8 = 0;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("native.jsonschema.compile", any, "compile(schema) -> userdata; raises for a bad schema", compile)?;
    api.func("native.jsonschema.check", any, "check(userdata, value) -> true | false, err; fills defaults", check)
}

fn compile(s: &Stack) -> Answer {
    let schema = read(s, 1, 0)?;
    let schema = Schema::compile(&schema).map_err(Raise::from)?;
    let boxed = Box::into_raw(Box::new(schema));
    let l = s.raw();
    // SAFETY: the userdata holds the pointer until its finalizer takes it back.
    unsafe {
        ffi::lua_newuserdata(l, size_of::<*mut Schema>()).cast::<*mut Schema>().write(boxed);
        push_metatable(s);
        ffi::lua_setmetatable(l, -2);
    }
    Ok(1)
}

/// # Safety
/// Leaves one table on the stack.
unsafe fn push_metatable(s: &Stack) {
    let (l, key) = (s.raw(), (&raw const METATABLE).cast_mut().cast::<c_void>());
    // SAFETY: the stack of a function that runs, which has room for what a C function may push.
    unsafe {
        ffi::lua_pushlightuserdata(l, key);
        ffi::lua_rawget_(l, ffi::LUA_REGISTRYINDEX);
        if s.is_table(-1) {
            return;
        }
        s.pop(1);
        s.push_table(0, 1);
        s.push_nil();
        s.push_bytes("__gc");
        ffi::lua_pushcclosure(l, native!(free), 2);
        ffi::lua_setfield(l, -2, c"__gc".as_ptr());
        ffi::lua_pushlightuserdata(l, key);
        s.push_copy(-2);
        ffi::lua_rawset(l, ffi::LUA_REGISTRYINDEX);
    }
}

/// The pointer inside a userdata of ours.
fn slot(s: &Stack, i: c_int) -> Option<*mut *mut Schema> {
    if s.kind(i) != ffi::LUA_TUSERDATA {
        return None;
    }
    // SAFETY: compares metatables by address; only ours has this one, and it is of this size.
    unsafe {
        if ffi::lua_getmetatable(s.raw(), i) == 0 {
            return None;
        }
        push_metatable(s);
        let ours = ffi::lua_rawequal(s.raw(), -1, -2) != 0;
        s.pop(2);
        ours.then(|| ffi::lua_touserdata(s.raw(), i).cast())
    }
}

fn free(s: &Stack) -> Answer {
    if let Some(slot) = slot(s, 1) {
        // SAFETY: the pointer came from Box::into_raw; null marks what was freed.
        unsafe {
            let schema = slot.replace(std::ptr::null_mut());
            if !schema.is_null() {
                drop(Box::from_raw(schema));
            }
        }
    }
    Ok(0)
}

fn check(s: &Stack) -> Answer {
    let slot = slot(s, 1).ok_or_else(|| s.bad_argument(1, "schema"))?;
    // SAFETY: the userdata is on the stack, so its schema lives.
    let schema = unsafe { (*slot).as_ref() }.ok_or("the schema is closed")?;
    let given = read(s, 2, 0)?;
    let mut value = given.clone();
    if let Err(why) = schema.check(&mut value) {
        s.push_bool(false);
        s.push_bytes(why);
        return Ok(2);
    }
    s.set_top(2);
    write_back(s, &given, &value)?;
    Ok(s.push_bool(true))
}

/// Gives the table on top what `new` has and `old` had not.
fn write_back(s: &Stack, old: &Value, new: &Value) -> std::result::Result<(), Raise> {
    if !s.is_table(-1) {
        return Ok(());
    }
    s.reserve(4)?;
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => fill(s, old, new)?,
        (Value::Array(old), Value::Object(new)) if old.is_empty() => {
            be_no_array(s);
            fill(s, &Map::new(), new)?;
        }
        (Value::Array(old), Value::Array(new)) => {
            for (i, (before, value)) in old.iter().zip(new).enumerate() {
                if value.is_object() || value.is_array() {
                    s.get_index(-1, i + 1);
                    let done = write_back(s, before, value);
                    s.pop(1);
                    done?;
                }
            }
        }
        _ => {}
    }
    Ok(())
}

fn fill(s: &Stack, old: &Map<String, Value>, new: &Map<String, Value>) -> std::result::Result<(), Raise> {
    for (key, value) in new {
        let Some(before) = old.get(key) else {
            convert::push_json(s, value)?;
            s.set(-2, key);
            continue;
        };
        if value.is_object() || value.is_array() {
            s.get(-1, key);
            let done = write_back(s, before, value);
            s.pop(1);
            done?;
        }
    }
    Ok(())
}

/// Takes the mark of an array from the table on top: `[]` where the schema asks for an object is one.
fn be_no_array(s: &Stack) {
    // SAFETY: `write_back` reserved the stack and looked that a table is on top.
    unsafe {
        ffi::lua_pushnil(s.raw());
        ffi::lua_setmetatable(s.raw(), -2);
    }
}

/// Reads a value as JSON. What JSON has not (functions, userdata: caches that a plugin keeps in its conf) is left out.
fn read(s: &Stack, i: c_int, depth: usize) -> std::result::Result<Value, Raise> {
    if !s.is_table(i) {
        return Ok(match s.kind(i) {
            ffi::LUA_TFUNCTION | ffi::LUA_TUSERDATA | ffi::LUA_TTHREAD | ffi::LUA_TCDATA => Value::Null,
            _ => convert::to_json(s, i)?,
        });
    }
    if depth > MAX_DEPTH {
        return Err("a table is nested too deeply to be checked".into());
    }
    limits::check()?;
    s.reserve(6)?;
    let table = s.absolute(i);
    let len = s.len(table);
    if len > 0 || convert::is_array(s, table) {
        let mut items = Vec::with_capacity(len);
        for n in 1..=len {
            s.get_index(table, n);
            let item = read(s, -1, depth + 1);
            s.pop(1);
            items.push(item?);
        }
        return Ok(Value::Array(items));
    }
    let mut fields = Map::new();
    s.pairs(table, |s| {
        let key = match s.kind(-2) {
            ffi::LUA_TSTRING => String::from_utf8_lossy(s.bytes(-2).unwrap_or_default()).into_owned(),
            ffi::LUA_TNUMBER => s.number(-2).unwrap_or_default().to_string(),
            _ => return Ok(()),
        };
        if !matches!(s.kind(-1), ffi::LUA_TFUNCTION | ffi::LUA_TUSERDATA | ffi::LUA_TTHREAD | ffi::LUA_TCDATA) {
            fields.insert(key, read(s, -1, depth + 1)?);
        }
        Ok::<(), Raise>(())
    })?;
    Ok(Value::Object(fields))
}

#[cfg(test)]
mod tests {
    use super::super::tests::check;

    #[test]
    fn checks_and_fills_defaults() {
        let prelude =
            "local v = require('jsonschema').generate_validator({type = 'object', required = {'a'}, properties = {
            a = {type = 'integer', minimum = 1}, b = {type = 'string', default = 'x'},
            c = {type = 'object', properties = {d = {type = 'boolean', default = true}}},
            l = {type = 'array', items = {type = 'object', properties = {e = {type = 'integer', default = 7}}}}}}) ";
        for (body, expected) in [
            (
                "local t = {a = 1, c = {}, l = {{}, {e = 2}}} local ok = v(t)
              return tostring(ok) .. t.b .. tostring(t.c.d) .. t.l[1].e .. t.l[2].e",
                "truextrue72",
            ),
            (
                "local cjson = require('cjson') local t = cjson.decode('{\"a\": 1, \"c\": []}') local ok = v(t)
              return tostring(ok) .. tostring(t.c.d) .. cjson.encode(t.c)",
                "truetrue{\"d\":true}",
            ),
            ("local t = {a = 1, f = print} return tostring(v(t)) .. type(t.f)", "truefunction"),
            ("local ok, e = v({}) return tostring(ok) .. e", "falseproperty \"a\" is required"),
            ("local ok, e = v({a = 0}) return e", "property \"a\" validation failed: expected 0 to be at least 1"),
        ] {
            check(&format!("{prelude} {body}"), expected);
        }
        check(
            "return tostring(pcall(require('jsonschema').generate_validator, {type = 'object', pattern = 5}))",
            "true",
        );
    }

    #[test]
    fn tables_are_checked_only_so_deep() {
        let nested = |levels: usize| {
            format!(
                "local t = {{}} for _ = 1, {levels} do t = {{a = t}} end
                 return (tostring(select(2, pcall(require('jsonschema').generate_validator({{type = 'object'}}), t)))
                     :gsub('^.-:%d+: ', ''))"
            )
        };
        check(&nested(super::MAX_DEPTH), "true");
        check(&nested(super::MAX_DEPTH + 1), "a table is nested too deeply to be checked");
    }
}
