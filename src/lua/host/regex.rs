//! Regular expressions for `ngx.re.*`: PCRE2 with its JIT, reached through FFI.
//!
//! Lua holds a compiled expression as a pointer and reads captures out of its vector itself (lua/moongate/re.lua), so a
//! match that the JIT compiler inlined costs no conversion. A VM's cache of them is bounded there.

use std::{
    ffi::{c_int, c_void},
    ptr,
};

use pcre2_sys as pcre;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases},
        fast,
    },
    observe::log::Level,
};

/// A JIT stack grows to this before a match fails: deeper than the 32 KB that the machine stack lends, small enough per thread.
const MAX_JIT_STACK: usize = 1 << 20;

/// What it starts with: as much as the machine stack lends.
const MIN_JIT_STACK: usize = 32 << 10;

/// Room for the DFA matcher's own state.
const DFA_WORKSPACE: usize = 512;

/// What PCRE2 answers when a pattern has more groups than the vector has room for; never, as the vector is made for it.
const DFA_OVECTOR: u32 = 3;

/// The part of a compiled expression that Lua reads: `moongate_regex` in re.lua.
#[repr(C)]
pub struct Regex {
    /// Pairs of start and end offsets, group 0 first; `usize::MAX` for a group that took no part.
    ovector: *const usize,
    /// Groups, without group 0.
    groups: u32,
    names: u32,
    name_size: u32,
    dfa: u32,
    name_table: *const u8,
    code: *mut pcre::pcre2_code_8,
    data: *mut pcre::pcre2_match_data_8,
}

struct MatchContext(*mut pcre::pcre2_match_context_8, *mut pcre::pcre2_jit_stack_8);

impl MatchContext {
    fn new() -> Self {
        // SAFETY: null means default memory management; a null result is accepted by pcre2_match as "default".
        unsafe {
            let context = pcre::pcre2_match_context_create_8(ptr::null_mut());
            let stack = pcre::pcre2_jit_stack_create_8(MIN_JIT_STACK, MAX_JIT_STACK, ptr::null_mut());
            if !context.is_null() && !stack.is_null() {
                pcre::pcre2_jit_stack_assign_8(context, None, stack.cast());
            }
            MatchContext(context, stack)
        }
    }
}

impl Drop for MatchContext {
    fn drop(&mut self) {
        // SAFETY: made by `new`, used by this thread only.
        unsafe {
            pcre::pcre2_match_context_free_8(self.0);
            pcre::pcre2_jit_stack_free_8(self.1);
        }
    }
}

thread_local! {
    static CONTEXT: MatchContext = MatchContext::new();
}

/// `lua_options.lua_regex_match_limit` of config.yaml; 0 and nothing: what PCRE2 was built with.
pub fn match_limit(config: &serde_json::Value) -> Option<u32> {
    let said = config.pointer("/lua_options/lua_regex_match_limit")?;
    let limit = said.as_u64().or_else(|| said.as_str()?.parse().ok())?;
    u32::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// Bounds how far a match on this thread may go before it fails with PCRE2's error -47.
pub fn limit_matches(limit: Option<u32>) {
    let limit = limit.unwrap_or_else(|| {
        let mut built_in = 0_u32;
        // SAFETY: what is asked for is written as 32 bits.
        unsafe { pcre::pcre2_config_8(pcre::PCRE2_CONFIG_MATCHLIMIT, (&raw mut built_in).cast()) };
        built_in
    });
    CONTEXT.with(|c| {
        if !c.0.is_null() {
            // SAFETY: the context is this thread's own.
            unsafe { pcre::pcre2_set_match_limit_8(c.0, limit) };
        }
    });
}

/// The flags that option letters stand for; `None` for a letter that none has.
fn flags(options: &[u8]) -> Option<(u32, bool)> {
    let (mut flags, mut dfa) = (0, false);
    for letter in options {
        flags |= match letter {
            b'a' => pcre::PCRE2_ANCHORED,
            b'd' => {
                dfa = true;
                0
            }
            b'D' => pcre::PCRE2_DUPNAMES,
            b'i' => pcre::PCRE2_CASELESS,
            // Everything is compiled once and by the JIT.
            b'j' | b'o' => 0,
            b'J' => pcre::PCRE2_ALT_BSUX | pcre::PCRE2_MATCH_UNSET_BACKREF,
            b'm' => pcre::PCRE2_MULTILINE,
            b's' => pcre::PCRE2_DOTALL,
            b'u' => pcre::PCRE2_UTF,
            b'U' => pcre::PCRE2_UTF | pcre::PCRE2_NO_UTF_CHECK,
            b'x' => pcre::PCRE2_EXTENDED,
            _ => return None,
        };
    }
    Some((flags, dfa))
}

/// Compiles, or says why not in OpenResty's words.
fn compile(pattern: &[u8], options: &[u8]) -> std::result::Result<Box<Regex>, Vec<u8>> {
    let Some((flags, dfa)) = flags(options) else {
        return Err(b"unknown flag".to_vec());
    };
    let (mut error, mut offset) = (0, 0);
    // SAFETY: the pattern's length is given; out-pointers are valid; results are checked for null.
    unsafe {
        let code = pcre::pcre2_compile_8(
            pattern.as_ptr(),
            pattern.len(),
            flags & !pcre::PCRE2_NO_UTF_CHECK,
            &mut error,
            &mut offset,
            ptr::null_mut(),
        );
        if code.is_null() {
            return Err(compile_error(pattern, error, offset));
        }
        if !dfa {
            // A pattern that the JIT cannot do is interpreted.
            pcre::pcre2_jit_compile_8(code, pcre::PCRE2_JIT_COMPLETE);
        }
        let data = if dfa {
            pcre::pcre2_match_data_create_8(DFA_OVECTOR, ptr::null_mut())
        } else {
            pcre::pcre2_match_data_create_from_pattern_8(code, ptr::null_mut())
        };
        if data.is_null() {
            pcre::pcre2_code_free_8(code);
            return Err(b"no memory".to_vec());
        }
        let number = |what| {
            let mut n = 0_u32;
            pcre::pcre2_pattern_info_8(code, what, (&raw mut n).cast());
            n
        };
        let mut name_table: *const u8 = ptr::null();
        pcre::pcre2_pattern_info_8(code, pcre::PCRE2_INFO_NAMETABLE, (&raw mut name_table).cast());
        Ok(Box::new(Regex {
            ovector: pcre::pcre2_get_ovector_pointer_8(data),
            groups: if dfa { 0 } else { number(pcre::PCRE2_INFO_CAPTURECOUNT) },
            names: if dfa { 0 } else { number(pcre::PCRE2_INFO_NAMECOUNT) },
            name_size: number(pcre::PCRE2_INFO_NAMEENTRYSIZE),
            dfa: dfa.into(),
            name_table,
            code,
            data,
        }))
    }
}

fn compile_error(pattern: &[u8], error: c_int, offset: usize) -> Vec<u8> {
    let mut text = [0_u8; 128];
    // SAFETY: the buffer's length is given; PCRE2 ends the text with a zero.
    let len = unsafe { pcre::pcre2_get_error_message_8(error, text.as_mut_ptr(), text.len()) };
    let mut out = b"pcre2_compile() failed: ".to_vec();
    out.extend_from_slice(&text[..len.clamp(0, 127) as usize]);
    out.extend_from_slice(b" in \"");
    out.extend_from_slice(pattern);
    out.push(b'"');
    if offset < pattern.len() {
        out.extend_from_slice(b" at \"");
        out.extend_from_slice(&pattern[offset..]);
        out.push(b'"');
    }
    out
}

impl Drop for Regex {
    fn drop(&mut self) {
        // SAFETY: both were made by `compile` and belong to this value.
        unsafe {
            pcre::pcre2_match_data_free_8(self.data);
            pcre::pcre2_code_free_8(self.code);
        }
    }
}

crate::export! {
    /// Compiles; null and a text in `error` (at most `error_len` bytes, the length written back) when it cannot.
    fn regex_compile(
        pattern: *const u8, pattern_len: usize, options: *const u8, options_len: usize, error: *mut u8, error_len: *mut usize,
    ) -> *mut Regex, ptr::null_mut() => {
        // SAFETY: Lua passes strings with their lengths and a buffer of `*error_len` bytes.
        unsafe {
            match compile(fast::bytes(pattern, pattern_len), fast::bytes(options, options_len)) {
                Ok(regex) => {
                    if let Some(x) = fast::exchange()
                        && fast::bytes(options, options_len).contains(&b'j')
                    {
                        x.log(Level::Debug, b"pcre2 JIT compiled successfully");
                    }
                    Box::into_raw(regex)
                }
                Err(text) => {
                    let len = text.len().min(*error_len);
                    ptr::copy_nonoverlapping(text.as_ptr(), error, len);
                    *error_len = len;
                    ptr::null_mut()
                }
            }
        }
    }

    /// Looks for a match at `from` or after: how many groups are set (group 0 included), -1: none, less: PCRE2's error.
    fn regex_exec(regex: *mut Regex, subject: *const u8, len: usize, from: usize) -> c_int, -100 => {
        // SAFETY: `regex` came from `regex_compile` and Lua keeps it alive; the vector belongs to it.
        unsafe {
            let regex = &*regex;
            if regex.dfa != 0 {
                let mut workspace = [0; DFA_WORKSPACE];
                let rc = pcre::pcre2_dfa_match_8(
                    regex.code, subject, len, from, 0, regex.data, ptr::null_mut(), workspace.as_mut_ptr(), DFA_WORKSPACE,
                );
                // 0: more matches than fit; the longest one is there.
                return if rc < 0 { rc } else { 1 };
            }
            CONTEXT.with(|c| pcre::pcre2_match_8(regex.code, subject, len, from, 0, regex.data, c.0))
        }
    }

    /// Frees a compiled expression.
    fn regex_free(regex: *mut Regex) -> c_int, 0 => {
        if !regex.is_null() {
            // SAFETY: came from Box::into_raw; Lua's finalizer runs once.
            drop(unsafe { Box::from_raw(regex) });
        }
        0
    }
}

pub fn register(api: &mut Api) -> Result<()> {
    api.fast(
        "regex_compile",
        "void *(const char *, size_t, const char *, size_t, char *, size_t *)",
        Phases::ANY,
        "compiles a regular expression; null and a text when it cannot",
        regex_compile as *const c_void,
    )?;
    api.fast(
        "regex_exec",
        "int (void *, const char *, size_t, size_t)",
        Phases::ANY,
        "matches from an offset: groups set, -1 for none, less for an error",
        regex_exec as *const c_void,
    )?;
    api.fast("regex_free", "int (void *)", Phases::ANY, "frees a compiled expression", regex_free as *const c_void)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{check, fails};
    use crate::lua::{Vm, vm::VmConfig};

    /// The machine stack lends 32 KB: what needs more matches up to the bound, and fails past it.
    #[test]
    fn deep_matches_end_at_the_stack_of_the_jit() {
        check("local m = ngx.re.match(('ab'):rep(5000), '^(a|b|(?:ab))*$', 'jo') return #m[0]", "10000");
        check(
            "local m, e = ngx.re.match(('ab'):rep(2000000), '^(a|b|(?:ab))*$', 'jo') return tostring(m) .. ': ' .. e",
            "nil: pcre_exec() failed: -46",
        );
    }

    #[test]
    fn a_match_goes_as_far_as_its_limit() {
        let lua =
            "local m, e = ngx.re.match(('a'):rep(30) .. '!', '(a+)+$', 'jo') return tostring(m) .. ': ' .. tostring(e)";
        let config = |limit: serde_json::Value| serde_json::json!({"lua_options": {"lua_regex_match_limit": limit}});
        for (limit, expected) in
            [("100".into(), "nil: pcre_exec() failed: -47"), (100.into(), "nil: pcre_exec() failed: -47")]
        {
            let vm = Vm::new(VmConfig { config: config(limit).into(), ..VmConfig::default() }).expect("a VM");
            assert_eq!(vm.lua.load(lua).eval::<String>().expect("a text"), expected);
        }
        assert_eq!(super::match_limit(&config(0.into())), None);
        // The next VM of the thread has its own limit.
        check(&lua.replace("(30)", "(10)"), "nil: nil");
    }

    #[test]
    fn matches_as_documented() {
        for (lua, expected) in [
            (
                "local m = ngx.re.match('hello, 1234', '([0-9])(?<rest>[0-9]+)') return m[0] .. m[1] .. m[2] .. m.rest",
                "12341234234",
            ),
            (
                "local m = ngx.re.match('hello, world', '(world)|(hello)|(?<named>howdy)')
                 return tostring(m[1]) .. m[2] .. tostring(m[3]) .. tostring(m.named)",
                "falsehellofalsefalse",
            ),
            (
                r"local m = ngx.re.match('hello, world', [[(?<named>\w+), (?<named>\w+)]], 'D') return table.concat(m.named, '|')",
                "hello|world",
            ),
            ("return ngx.re.match('hello, world', 'HEL LO', 'ix')[0]", "hello"),
            ("return ngx.re.match('hello, 美好生活', 'HELLO, (.{2})', 'iu')[1]", "美好"),
            (
                "local ctx = {pos = 2} local m = ngx.re.match('1234, hello', '[0-9]+', '', ctx) return m[0] .. ctx.pos",
                "2345",
            ),
            ("return tostring(ngx.re.match('x', 'y'))", "nil"),
            ("return ngx.re.match('foobar', 'foo|foobar', 'd')[0]", "foobar"),
            ("local t = {} return tostring(ngx.re.match('a', 'a', 'jo', nil, t) == t)", "true"),
            ("local f, t = ngx.re.find('hello, 1234', '([0-9])([0-9]+)', 'jo', nil, 2) return f .. '-' .. t", "9-11"),
            ("return select('#', ngx.re.find('x', 'y')) .. tostring(ngx.re.find('x', 'y'))", "1nil"),
            (
                "local _, e = ngx.re.match('x', '(abc') return e",
                "pcre2_compile() failed: missing closing parenthesis in \"(abc\"",
            ),
            (
                "local _, _, e = ngx.re.find('x', '[a') return e",
                "pcre2_compile() failed: missing terminating ] for character class in \"[a\"",
            ),
            ("return ngx.re.match(42, '4')[0]", "4"),
        ] {
            check(lua, expected);
        }
        fails("ngx.re.match('x', 'x', 'Hm')", "unknown flag \"H\" (flags \"Hm\")");
    }

    #[test]
    fn substitutes_as_documented() {
        for (args, expected) in [
            ("ngx.re.sub('hello, 1234', '([0-9])[0-9]', '[$0][$1]')", "hello, [12][1]34/1"),
            ("ngx.re.sub('hello, 1234', '[0-9]', '${0}00')", "hello, 100234/1"),
            ("ngx.re.sub('hello, 1234', '[0-9]', '$$')", "hello, $234/1"),
            (
                "ngx.re.sub('hello, 1234', '( [0-9] ) [0-9]', function(m) return '['..m[0]..']['..m[1]..']' end, 'x')",
                "hello, [12][1]34/1",
            ),
            ("ngx.re.gsub('hello, world', '([a-z])[a-z]+', '[$0,$1]', 'i')", "[hello,h], [world,w]/2"),
            ("ngx.re.gsub('hello', 'a|', 'b')", "bhbeblblbob/6"),
            ("ngx.re.gsub('', 'a|', 'b')", "b/1"),
            ("ngx.re.gsub('TestCase', '^ *', '', 'o')", "TestCase/1"),
            ("ngx.re.gsub('abcd', 'a|(?=c)', '.')", ".b.cd/2"),
            ("ngx.re.gsub('{foobarbaz}', '(?<=foo)bar|(?<=bar)baz', 'h$0')", "{foohbarhbaz}/2"),
            ("ngx.re.gsub('x', 'y', 'z')", "x/0"),
            ("ngx.re.gsub('hello, 34', '([0-9])|(world)', '[$1,$2]')", "hello, [3,][4,]/2"),
        ] {
            check(&format!("local s, n = {args} return s .. '/' .. n"), expected);
        }
    }

    #[test]
    fn iterates_and_splits() {
        check(
            "local t = {} for m in ngx.re.gmatch('hello', 'a|') do t[#t+1] = '['..m[0]..']' end return table.concat(t)",
            "[][][][][][]",
        );
        check(
            "local t = {} for m in ngx.re.gmatch('a1b2', '[a-z](.)') do t[#t+1] = m[1] end return table.concat(t)",
            "12",
        );
        for (args, expected) in [
            ("'a,b,c', ','", "a|b|c"),
            ("'a,b,c', ',', nil, nil, 2", "a|b,c"),
            ("'abc', ''", "a|b|c"),
            ("'a1b2', '([0-9])'", "a|1|b|2|"),
            ("'a,b,c', ',', 'jo', {pos = 3}", "b|c"),
            ("'abc', ','", "abc"),
        ] {
            check(&format!("return table.concat(require('ngx.re').split({args}), '|')"), expected);
        }
    }

    #[test]
    fn catastrophic_patterns_end_with_an_error() {
        check(
            "local m, e = ngx.re.match(string.rep('a', 40) .. 'b', '^(a|a)*$', 'jo') return tostring(m) .. tostring(e)",
            "nilpcre_exec() failed: -47",
        );
    }
}
