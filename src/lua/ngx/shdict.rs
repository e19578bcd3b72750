//! `ngx.shared.DICT`: the FFI face of `crate::shdict`. The Lua face is lua/moongate/shdict.lua.

use std::{
    ffi::{c_char, c_int, c_void},
    ptr,
};

use super::{Text, scratch, time::now_ms};
use crate::{
    error::Result,
    lua::{
        api::{Api, Phases},
        fast,
    },
    shdict::{self, Dict, End, Mode, Pressure, Refusal, Value},
};

const BOOLEAN: c_int = 1;
const NUMBER: c_int = 3;
const STRING: c_int = 4;
const LIST: c_int = 5;

/// A value on its way: `moongate_val` in shdict.lua.
#[repr(C)]
pub struct Val {
    /// 0: none.
    kind: c_int,
    flags: u32,
    number: f64,
    text: Text,
    forcible: c_int,
    stale: c_int,
    /// A zero-ended text.
    error: *const c_char,
}

impl Val {
    /// # Safety
    /// A string's pointer and length must be readable.
    unsafe fn value(&self) -> Option<Value> {
        match self.kind {
            BOOLEAN => Some(Value::Bool(self.number != 0.0)),
            NUMBER => Some(Value::Num(self.number)),
            STRING => {
                // SAFETY: by contract.
                let text = unsafe { fast::bytes(self.text.ptr, self.text.len) };
                Some(Value::Str(text.into()))
            }
            _ => None,
        }
    }

    fn put(&mut self, value: &Value) {
        match value {
            Value::Bool(b) => (self.kind, self.number) = (BOOLEAN, f64::from(u8::from(*b))),
            Value::Num(n) => (self.kind, self.number) = (NUMBER, *n),
            Value::Str(text) => {
                self.kind = STRING;
                scratch(&mut self.text, |buffer| buffer.extend_from_slice(text));
            }
            Value::List(_) => self.kind = LIST,
        }
    }

    fn refuse(&mut self, why: Refusal) {
        let text = match why {
            Refusal::NotFound => c"not found",
            Refusal::Exists => c"exists",
            Refusal::NoMemory => c"no memory",
            Refusal::NotANumber => c"not a number",
            Refusal::NotAList => c"value not a list",
            Refusal::IsAList => c"value is a list",
        };
        self.error = text.as_ptr();
    }
}

fn millis(secs: f64) -> u64 {
    // At least a millisecond: zero means for ever.
    if secs <= 0.0 { 0 } else { ((secs * 1000.0).round() as u64).max(1) }
}

fn side(end: c_int) -> End {
    if end == 0 { End::Left } else { End::Right }
}

// SAFETY (all exports): `dict` came from `dict_find` and lives as long as the process; keys and values are Lua strings
// with their lengths, which live through the call; `val` is a buffer of the caller's.
crate::export! {
    /// The dictionary of that name, or null.
    fn dict_find(name: *const u8, len: usize) -> *const Dict, ptr::null() => {
        let name = unsafe { fast::bytes(name, len) };
        std::str::from_utf8(name).ok().and_then(|n| shdict::store().get(n)).map_or(ptr::null(), ptr::from_ref)
    }

    /// Reads into `val`: 1 when found.
    fn dict_get(dict: *const Dict, key: *const u8, len: usize, stale: c_int, val: *mut Val) -> c_int, 0 => {
        let (dict, val) = unsafe { (&*dict, &mut *val) };
        dict.get(unsafe { fast::bytes(key, len) }, now_ms(), stale != 0, |read| {
            let Some(read) = read else { return 0 };
            (val.flags, val.stale) = (read.flags, c_int::from(read.stale));
            val.put(read.value);
            1
        })
    }

    /// Stores `val`: mode 0 set, 1 add, 2 replace; +4: never evict. 1 when done.
    fn dict_store(dict: *const Dict, mode: c_int, key: *const u8, len: usize, ttl: f64, val: *mut Val) -> c_int, 0 => {
        let (dict, val) = unsafe { (&*dict, &mut *val) };
        let key = unsafe { fast::bytes(key, len) };
        val.forcible = 0;
        let pressure = if mode & 4 != 0 { Pressure::Safe } else { Pressure::Evict };
        let mode = [Mode::Set, Mode::Add, Mode::Replace, Mode::Replace][(mode & 3) as usize];
        let Some(value) = (unsafe { val.value() }) else {
            dict.delete(key);
            return 1;
        };
        match dict.store(mode, key, value, millis(ttl), val.flags, pressure, now_ms()) {
            Ok(forced) => {
                val.forcible = c_int::from(forced);
                1
            }
            Err(why) => {
                val.refuse(why);
                0
            }
        }
    }

    fn dict_delete(dict: *const Dict, key: *const u8, len: usize) -> c_int, 0 => {
        unsafe { c_int::from((*dict).delete(fast::bytes(key, len))) }
    }

    /// Adds `by`; `has_init`: an absent key starts at `init`. The number is in `val`. 1 when done.
    fn dict_incr(
        dict: *const Dict, key: *const u8, len: usize, by: f64, has_init: c_int, init: f64, init_ttl: f64, val: *mut Val,
    ) -> c_int, 0 => {
        let (dict, val) = unsafe { (&*dict, &mut *val) };
        let init = (has_init != 0).then_some(init);
        match dict.incr(unsafe { fast::bytes(key, len) }, by, init, millis(init_ttl), now_ms()) {
            Ok((n, forced)) => {
                (val.number, val.forcible) = (n, c_int::from(forced));
                1
            }
            Err(why) => {
                val.refuse(why);
                0
            }
        }
    }

    /// Pushes `val` at the left (0) or right (1) end: the new length, or -1.
    fn dict_push(dict: *const Dict, end: c_int, key: *const u8, len: usize, val: *mut Val) -> f64, -1.0 => {
        let (dict, val) = unsafe { (&*dict, &mut *val) };
        let Some(value) = (unsafe { val.value() }) else { return -1.0 };
        match dict.push(side(end), unsafe { fast::bytes(key, len) }, value, now_ms()) {
            Ok(n) => n as f64,
            Err(why) => {
                val.refuse(why);
                -1.0
            }
        }
    }

    /// Pops into `val`: 1 when there was one, 0 when not, -1 on error.
    fn dict_pop(dict: *const Dict, end: c_int, key: *const u8, len: usize, val: *mut Val) -> c_int, -1 => {
        let (dict, val) = unsafe { (&*dict, &mut *val) };
        match dict.pop(side(end), unsafe { fast::bytes(key, len) }, now_ms()) {
            Ok(Some(value)) => {
                val.put(&value);
                1
            }
            Ok(None) => 0,
            Err(why) => {
                val.refuse(why);
                -1
            }
        }
    }

    /// Length of a list, or -1.
    fn dict_llen(dict: *const Dict, key: *const u8, len: usize, val: *mut Val) -> f64, -1.0 => {
        let (dict, val) = unsafe { (&*dict, &mut *val) };
        match dict.llen(unsafe { fast::bytes(key, len) }, now_ms()) {
            Ok(n) => n as f64,
            Err(why) => {
                val.refuse(why);
                -1.0
            }
        }
    }

    /// Seconds left; 0: for ever; -1: not found.
    fn dict_ttl(dict: *const Dict, key: *const u8, len: usize) -> f64, -1.0 => {
        match unsafe { (*dict).ttl(fast::bytes(key, len), now_ms()) } {
            Ok(left) => left.unwrap_or(0) as f64 / 1000.0,
            Err(_) => -1.0,
        }
    }

    /// 1 when the key got its new lifetime.
    fn dict_expire(dict: *const Dict, key: *const u8, len: usize, ttl: f64) -> c_int, 0 => {
        unsafe { c_int::from((*dict).expire(fast::bytes(key, len), millis(ttl), now_ms()).is_ok()) }
    }

    fn dict_flush_all(dict: *const Dict) -> c_int, 0 => {
        unsafe { (*dict).flush_all() };
        0
    }

    fn dict_flush_expired(dict: *const Dict, max: f64) -> f64, 0.0 => {
        unsafe { (*dict).flush_expired(max as usize, now_ms()) as f64 }
    }

    /// 0: bytes declared, 1: bytes free.
    fn dict_size(dict: *const Dict, what: c_int) -> f64, 0.0 => {
        let dict = unsafe { &*dict };
        if what == 0 { dict.capacity() as f64 } else { dict.free_space() as f64 }
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    let functions: [(&'static str, &'static str, &'static str, *const c_void); 13] = [
        ("dict_find", "void *(const char *, size_t)", "a dictionary by name", dict_find as _),
        ("dict_get", "int (void *, const char *, size_t, int, void *)", "reads", dict_get as _),
        ("dict_store", "int (void *, int, const char *, size_t, double, void *)", "stores", dict_store as _),
        ("dict_delete", "int (void *, const char *, size_t)", "removes", dict_delete as _),
        (
            "dict_incr",
            "int (void *, const char *, size_t, double, int, double, double, void *)",
            "adds to a number",
            dict_incr as _,
        ),
        ("dict_push", "double (void *, int, const char *, size_t, void *)", "pushes", dict_push as _),
        ("dict_pop", "int (void *, int, const char *, size_t, void *)", "pops", dict_pop as _),
        ("dict_llen", "double (void *, const char *, size_t, void *)", "length of a list", dict_llen as _),
        ("dict_ttl", "double (void *, const char *, size_t)", "seconds left", dict_ttl as _),
        ("dict_expire", "int (void *, const char *, size_t, double)", "sets the lifetime", dict_expire as _),
        ("dict_flush_all", "int (void *)", "expires everything", dict_flush_all as _),
        ("dict_flush_expired", "double (void *, double)", "frees what expired", dict_flush_expired as _),
        ("dict_size", "double (void *, int)", "bytes: 0 declared, 1 free", dict_size as _),
    ];
    for (name, signature, doc, address) in functions {
        api.fast(name, signature, any, doc, address)?;
    }
    api.func("native.shdict.names", any, "names(): all dictionaries", |s| {
        let all = shdict::store().all();
        s.push_table(all.len(), 0);
        for (i, dict) in all.iter().enumerate() {
            s.push_bytes(dict.name());
            s.set_index(-2, i + 1);
        }
        Ok(1)
    })?;
    api.func("native.shdict.keys", any, "keys(name, max): a list", |s| {
        let max = s.arg_number(2)? as usize;
        let keys = shdict::store().get(&s.arg_str(1)?).map(|d| d.keys(max, now_ms())).unwrap_or_default();
        s.push_table(keys.len(), 0);
        for (i, key) in keys.iter().enumerate() {
            s.push_bytes(key);
            s.set_index(-2, i + 1);
        }
        Ok(1)
    })
}

#[cfg(test)]
mod tests {
    use crate::lua::host::tests::{check, fails};

    #[test]
    fn behaves_as_documented() {
        crate::shdict::store().declare("test-face", 1 << 20);
        for (body, expected) in [
            (
                "local ok, err, forced = d:set('a', 'x', 0, 7) local v, f = d:get('a')
                 return tostring(ok) .. tostring(err) .. tostring(forced) .. v .. f",
                "truenilfalsex7",
            ),
            ("d:set('n', 1) return tostring(d:incr('n', 2)) .. tostring(d:get('n'))", "33"),
            ("local v, e = d:incr('absent', 1) return tostring(v) .. e", "nilnot found"),
            ("local v, e, f = d:incr('fresh', 1, 10) return v .. tostring(e) .. tostring(f)", "11nilfalse"),
            ("d:set('s', 'x') local v, e = d:incr('s', 1) return tostring(v) .. e", "nilnot a number"),
            ("d:set('b', true) d:set('c', false) return tostring(d:get('b')) .. tostring(d:get('c'))", "truefalse"),
            ("d:set('g', 1) d:set('g', nil) return tostring(d:get('g'))", "nil"),
            ("d:delete('a') return tostring(d:get('a')) .. tostring(select(2, d:ttl('a')))", "nilnot found"),
            ("d:set('t', 1, 100) return tostring(d:ttl('t') > 99 and d:expire('t', 0) and d:ttl('t') == 0)", "true"),
            ("local ok, e = d:add('t', 1) return tostring(ok) .. e", "falseexists"),
            ("local ok, e = d:replace('zz', 1) return tostring(ok) .. e", "falsenot found"),
            (
                "d:rpush('l', 'a') d:lpush('l', 2)
                 return d:llen('l') .. d:lpop('l') .. d:rpop('l') .. tostring(d:lpop('l'))",
                "22anil",
            ),
            ("d:rpush('l2', 'a') local v, e = d:get('l2') return tostring(v) .. e", "nilvalue is a list"),
            ("d:set('n', 1) local v, e = d:lpush('n', 1) return tostring(v) .. e", "nilvalue not a list"),
            ("return d:capacity() .. ' ' .. type(d:free_space())", "1048576 number"),
            ("local v, e = d:get(nil) return tostring(v) .. e", "nilnil key"),
            ("local v, e = d:get('') return tostring(v) .. e", "nilempty key"),
            ("local v, e = d:set(('k'):rep(65536), 1) return tostring(v) .. e", "nilkey too long"),
            ("local v, e = d:set('x', {}) return tostring(v) .. e", "nilbad value type"),
            ("d:flush_all() d:set('k', 1) return table.concat(d:get_keys(0))", "k"),
            ("return tostring(ngx.shared.nothing)", "nil"),
            ("d:set('n', 3) local v, f, stale = d:get_stale('n') return v .. tostring(stale)", "3false"),
        ] {
            check(&format!("local d = ngx.shared['test-face'] {body}"), expected);
        }
        fails("ngx.shared['test-face'].get(1, 'x')", "bad \"zone\" argument");
    }
}
