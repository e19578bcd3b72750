//! Native modules under the names that plugins `require`.
//!
//! The Rust side registers functions under `native.<area>`; the module that a plugin names is a Lua file in lua/ on top of them.

pub mod apisix;
pub mod bn;
pub mod cjson;
pub mod config;
pub mod crypto;
pub mod discovery;
pub mod ip;
pub mod jsonschema;
pub mod jwt;
pub mod lfs;
pub mod metrics;
pub mod pattern;
pub mod pb;
pub mod pkey;
pub mod process;
pub mod regex;
pub mod store;
pub mod utf8;
pub mod x509;
pub mod yaml;

use std::ffi::c_int;

use super::api::{Api, Raise};
use crate::error::Result;

/// What a host function answers: how many results it pushed, or an error to raise.
pub type Answer = std::result::Result<c_int, Raise>;

/// Makes a `lua_CFunction` of a `fn(&Stack) -> Answer` for closures that carry upvalues of their own. The second
/// upvalue must be the function's name, for messages.
macro_rules! native {
    ($f:path) => {{
        unsafe extern "C-unwind" fn native(l: *mut mlua::ffi::lua_State) -> usize {
            // SAFETY: called by Lua with its state; `raise` runs when nothing of Rust is left to be dropped.
            unsafe {
                match $f(&$crate::lua::api::Stack::new(l)) {
                    Ok(results) => $crate::lua::api::widened(results),
                    Err(raise) => $crate::lua::api::widened($crate::lua::host::throw(l, raise)),
                }
            }
        }
        $crate::lua::api::as_lua(native)
    }};
}
pub(crate) use native;

/// Raises with the position of the Lua code that called.
///
/// # Safety
/// `l` is the state of the running C function.
pub(crate) unsafe fn throw(l: *mut mlua::ffi::lua_State, raise: Raise) -> c_int {
    use mlua::ffi;
    // SAFETY: by contract; nothing here is left to drop when `lua_error` jumps.
    unsafe {
        ffi::luaL_where(l, 1);
        ffi::lua_pushlstring_(l, raise.0.as_ptr().cast(), raise.0.len());
        drop(raise);
        ffi::lua_concat(l, 2);
        ffi::lua_error(l)
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    bn::register(api)?;
    cjson::register(api)?;
    config::register(api)?;
    crypto::register(api)?;
    discovery::register(api)?;
    ip::register(api)?;
    jsonschema::register(api)?;
    jwt::register(api)?;
    lfs::register(api)?;
    pattern::register(api)?;
    pb::register(api)?;
    pkey::register(api)?;
    metrics::register(api)?;
    process::register(api)?;
    regex::register(api)?;
    store::register(api)?;
    utf8::register(api)?;
    x509::register(api)?;
    yaml::register(api)?;
    apisix::register(api)
}

#[cfg(test)]
pub(crate) mod tests {
    use crate::lua::{Vm, VmConfig};

    /// Runs a chunk in a VM of its own and compares what it returns as a string.
    #[track_caller]
    pub(crate) fn check(chunk: &str, expected: &str) {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        match vm.lua.load(chunk).set_name("=test").eval::<mlua::LuaString>() {
            Ok(got) => assert_eq!(String::from_utf8_lossy(&got.as_bytes()), expected, "{chunk}"),
            Err(e) => panic!("{chunk}\n{e}"),
        }
    }

    /// As `serve`, with `f` as a global function: for bounds that a test reaches only where they are smaller.
    #[track_caller]
    pub(crate) fn serve_with<F: crate::lua::api::HostFn>(
        f: F,
        chunk: &str,
        expected: &str,
    ) -> crate::exchange::Exchange {
        let add = |vm: &Vm| {
            let mut api = crate::lua::api::Api::new(&vm.lua).expect("an API");
            api.func("native.f", crate::lua::api::Phases::ANY, "", f).expect("registered");
            let (native, _) = api.finish().expect("a table");
            vm.lua.globals().raw_set("f", native.get::<mlua::Function>("f").expect("a function")).expect("set");
        };
        serve_in(add, |_| {}, chunk, expected)
    }

    /// Runs a chunk for a request and compares what it returns; gives the request back.
    #[track_caller]
    pub(crate) fn serve(
        prepare: impl FnOnce(&mut crate::exchange::Exchange),
        chunk: &str,
        expected: &str,
    ) -> crate::exchange::Exchange {
        serve_in(|_| {}, prepare, chunk, expected)
    }

    #[track_caller]
    fn serve_in(
        add: impl FnOnce(&Vm),
        prepare: impl FnOnce(&mut crate::exchange::Exchange),
        chunk: &str,
        expected: &str,
    ) -> crate::exchange::Exchange {
        use crate::{exchange, lua::fast, store::Snapshot};
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        add(&vm);
        let peer = "127.0.0.1:4000".parse().expect("an address");
        let conn = exchange::Connection::new(7, peer, peer);
        let mut x = exchange::Exchange::new(conn.into(), Snapshot::default().into());
        x.phase = exchange::Phase::Access;
        prepare(&mut x);
        let got = fast::enter(&mut x, || vm.lua.load(chunk).set_name("=test").eval::<mlua::LuaString>());
        match got {
            Ok(got) => assert_eq!(String::from_utf8_lossy(&got.as_bytes()), expected, "{chunk}"),
            Err(e) => panic!("{chunk}\n{e}"),
        }
        x
    }

    /// Runs a chunk that must raise an error with this text, after the position.
    #[track_caller]
    pub(crate) fn fails(chunk: &str, text: &str) {
        let chunk = format!(
            "local ok, e = pcall(function() {chunk} end)
             return (not ok and tostring(e):gsub('^test:%d+: ', '') or 'no error')"
        );
        check(&chunk, text);
    }
}

#[cfg(test)]
mod bundled;
#[cfg(test)]
mod core_library;

#[cfg(test)]
mod libraries {
    use super::tests::check;

    #[test]
    fn expressions() {
        for (rule, vars, expected) in [
            ("{{'a', '==', 'x'}}", "{a = 'x'}", "true"),
            ("{{'a', '==', 5}, {'b', '~=', 'y'}}", "{a = '5'}", "true"),
            ("{'OR', {'a', '>', 10}, {'b', '~~', '^z'}}", "{a = '9', b = 'zoo'}", "true"),
            ("{'!AND', {'a', '==', '1'}}", "{a = '1'}", "false"),
            ("{{'a', '!', 'in', {'1', '2'}}}", "{a = '3'}", "true"),
            ("{{'l', 'has', 'v'}}", "{l = {'u', 'v'}}", "true"),
            ("{{'a', 'ipmatch', {'10.0.0.0/8'}}}", "{a = '10.2.3.4'}", "true"),
            ("{{'a', '~*', 'ABC'}}", "{a = 'xabcx'}", "true"),
        ] {
            check(&format!("return tostring(require('resty.expr.v1').new({rule}):eval({vars}))"), expected);
        }
        check(
            "local e, err = require('resty.expr.v1').new({{'a', '=>', 1}}) return tostring(e) .. err",
            "nilinvalid operator '=>'",
        );
    }

    #[test]
    fn lru_cache_keeps_the_used() {
        check(
            "local c = require('resty.lrucache').new(2) c:set('a', 1) c:set('b', 2) c:get('a') c:set('c', 3)
             return tostring(c:get('a')) .. tostring(c:get('b')) .. tostring(c:get('c')) .. c:count()",
            "1nil32",
        );
        check(
            "local c = require('resty.lrucache').new(2) c:set('a', 1, -1) local v, stale = c:get('a') c:delete('a')
             return tostring(v) .. stale .. tostring(c:get('a')) .. c:count()",
            "nil1nil0",
        );
    }

    #[test]
    fn limiters_count() {
        crate::shdict::store().declare("test-limits", 1 << 20);
        check(
            "local l = require('resty.limit.count').new('test-limits', 2, 60)
             local _, a = l:incoming('k', true) local _, b = l:incoming('k', true) local _, c = l:incoming('k', true)
             return a .. b .. c",
            "10rejected",
        );
        check(
            "local l = require('resty.limit.conn').new('test-limits', 1, 1, 0.5)
             local a = l:incoming('c', true) local b = l:incoming('c', true) local _, e = l:incoming('c', true)
             l:leaving('c') return a .. ' ' .. b .. ' ' .. e .. ' ' .. l:leaving('c')",
            "0 0.5 rejected 0",
        );
        check(
            "local l = require('resty.limit.req').new('test-limits', 1, 1)
             local a = l:incoming('r', true) local b = l:incoming('r', true) local _, e = l:incoming('r', true)
             return a .. ' ' .. math.floor(b + 0.5) .. ' ' .. e",
            "0 1 rejected",
        );
        check("return select(2, require('resty.limit.count').new('no-such', 1, 1))", "shared dict not found");
    }

    #[test]
    fn small_ones() {
        check("return tostring(require('resty.jit-uuid').is_valid(require('resty.jit-uuid').generate_v4()))", "true");
        check(
            "return require('resty.jit-uuid').generate_v5('6ba7b810-9dad-11d1-80b4-00c04fd430c8', 'www.example.org')",
            "74738ff5-5367-5958-9aee-98fffdcd1876",
        );
        check(
            "local u = require('net.url').parse('http://u:p@h:8/a?x=1#f') return u.host .. u.port .. u.path .. u.query.x .. u.user",
            "h8/a1u",
        );
        check(
            "local p = require('tablepool') local t = p.fetch('x') t.a = 1 p.release('x', t) return tostring(p.fetch('x') == t) .. tostring(t.a)",
            "truenil",
        );
    }

    /// `up(f, name, ...)`: an upvalue of a function, or of one of its own.
    const UP: &str = "local function up(f, name, ...)
            for i = 1, 100 do
                local known, value = debug.getupvalue(f, i)
                if known == name then return ... and up(value, ...) or value end
                if not known then error('no upvalue ' .. name) end
            end
        end ";

    #[test]
    fn compiled_expressions_are_kept_up_to_a_number() {
        let source = "local find = ngx.re.find
            local count = function() return up(require('moongate.re').find, 'compiled', 'first_look', 'cached') end
            local before = count()
            for i = before + 1, 8192 do assert(find('x' .. i .. 'y', 'x' .. i .. 'y', 'o')) end
            local full = count()
            assert(find('abc', 'b', 'o'))
            return before .. ' ' .. full .. ' ' .. count() .. ' ' .. find('x9yx10y', 'x10y', 'o')";
        check(&format!("{UP}{source}"), "0 8192 1 4");
    }

    #[test]
    fn parsed_templates_are_kept_up_to_a_number() {
        let source = "local resolve = require('apisix.core.utils').resolve_var
            local count = function() return up(resolve, 'template', 'template_count') end
            for i = 1, 4096 do assert(resolve(i .. '$a', { a = 'b' }) == i .. 'b') end
            local full = count()
            return full .. ' ' .. resolve('more $a', { a = 'b' }) .. ' ' .. count() .. ' ' .. resolve('1$a', { a = 'c' })";
        check(&format!("{UP}{source}"), "4096 more b 1 1c");
    }

    #[test]
    fn a_file_is_read_up_to_a_size() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().display();
        let source = format!(
            "local text, err = require('apisix.core.io').get_file('{path}') return tostring(text and #text) .. ' ' .. tostring(err)"
        );
        file.as_file().set_len(64 << 20).expect("grows");
        check(&source, "67108864 nil");
        file.as_file().set_len((64 << 20) + 1).expect("grows");
        check(&source, &format!("nil failed to read file: {path}, it is longer than 67108864 bytes"));
    }

    #[test]
    fn tables_are_kept_up_to_a_number() {
        check(
            "local p, known, given = require('tablepool'), {}, {}
             for i = 1, 201 do given[i] = p.fetch('x') known[given[i]] = true end
             for i = 1, 201 do p.release('x', given[i]) end
             local again = 0
             for _ = 1, 201 do if known[p.fetch('x')] then again = again + 1 end end
             return tostring(again)",
            "200",
        );
    }

    #[test]
    fn radixtree_matches_as_documented() {
        let tree = "local t = require('resty.radixtree').new({
            {paths = '/a', metadata = 'exact'},
            {paths = '/a*', metadata = 'prefix', methods = {'GET'}},
            {paths = '/user/:id/posts', metadata = 'param'},
            {paths = '/h', hosts = '*.foo.com', metadata = 'host'},
            {paths = '/h', priority = 1, vars = {{'arg_x', '==', '1'}}, metadata = 'vars'},
            {paths = '/n', remote_addrs = {'10.0.0.0/8'}, metadata = 'addr'}}) ";
        for (call, expected) in [
            ("t:match('/a', {})", "exact"),
            ("t:match('/ab', {method = 'GET'})", "prefix"),
            ("t:match('/ab', {method = 'PUT'})", "nil"),
            ("t:match('/user/5/posts', {})", "param"),
            ("t:match('/user//posts', {})", "nil"),
            ("t:match('/h', {host = 'A.foo.com', vars = {}})", "host"),
            ("t:match('/h', {vars = {arg_x = '1'}})", "vars"),
            ("t:match('/n', {remote_addr = '10.1.1.1'})", "addr"),
            (
                "(function() local m = {} t:match('/user/7/posts', {matched = m}) return m.id .. m._path end)()",
                "7/user/:id/posts",
            ),
        ] {
            check(&format!("{tree} return tostring(({call}))"), expected);
        }
    }
}
