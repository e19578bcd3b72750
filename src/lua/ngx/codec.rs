//! `ngx.escape_uri`, `encode_args`, `quote_sql_str` and their like, and the reading of query strings.

use std::ffi::c_int;

use mlua::ffi;

use crate::{
    error::Result,
    lua::{
        api::{Api, Phases, Raise, Stack},
        host::{Answer, cjson::write_number},
    },
    observe::log::Level,
};

/// Arguments or headers that are read when no bound is given.
pub const MAX_FIELDS: usize = 100;

pub fn register(api: &mut Api) -> Result<()> {
    let any = Phases::ANY;
    api.func("ngx.escape_uri", any, "escape_uri(text, type?): 0 a whole URI, 2 (default) a component", escape)?;
    api.func("ngx.unescape_uri", any, "unescape_uri(text): also + to a space", |s| {
        Ok(s.push_bytes(unescape_uri(s.text(1)?, true)))
    })?;
    api.func("ngx.encode_args", any, "encode_args(table): a query string", encode_args)?;
    api.func("ngx.decode_args", any, "decode_args(text, max?): a table; and \"truncated\"", |s| {
        let text = s.arg_bytes(1)?;
        push_args(s, text, limit(s, 2)?)
    })?;
    api.func("native.quote_pgsql", any, "quote_pgsql(text): quoted for PostgreSQL", quote_pgsql)?;
    api.func("ngx.quote_sql_str", any, "quote_sql_str(text): quoted for MySQL", quote_sql)
}

/// A bound on a number of fields: argument `i`, 100 by default, 0 for none.
pub fn limit(s: &Stack, i: c_int) -> std::result::Result<usize, Raise> {
    Ok(match s.opt_number(i)? {
        None => MAX_FIELDS,
        Some(n) if n <= 0.0 => usize::MAX,
        Some(n) => n as usize,
    })
}

/// Characters of a URI component that stay.
pub fn component(b: u8) -> bool {
    b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~' | b'!' | b'\'' | b'(' | b')' | b'*')
}

/// Characters of a whole URI that stay.
fn whole(b: u8) -> bool {
    (0x21..0x7f).contains(&b) && !matches!(b, b'#' | b'%' | b'?')
}

fn visible(b: u8) -> bool {
    (0x21..0x7f).contains(&b) && b != b'%'
}

/// Percent-encodes what `keep` does not hold.
pub fn escape_into(out: &mut Vec<u8>, text: &[u8], keep: impl Fn(u8) -> bool) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for &b in text {
        if keep(b) {
            out.push(b);
        } else {
            out.extend_from_slice(&[b'%', HEX[b as usize >> 4], HEX[b as usize & 15]]);
        }
    }
}

fn escape(s: &Stack) -> Answer {
    let text = s.text(1)?;
    let keep = match s.number(2) {
        None if !s.is_nil(2) => return Err("\"type\" is not a number".into()),
        None | Some(2.0) => component,
        Some(0.0 | 1.0) => whole,
        // nginx's further kinds: for HTML, refresh, memcached, mail.
        Some(3.0..=6.0) => visible,
        Some(n) => return Err(format!("\"type\" {n} out of range").into()),
    };
    let keep: fn(u8) -> bool = keep;
    if text.iter().all(|b| keep(*b)) {
        return Ok(s.push_bytes(text));
    }
    let mut out = Vec::with_capacity(text.len() + 16);
    escape_into(&mut out, text, keep);
    Ok(s.push_bytes(out))
}

/// Decodes `%XX`, and `+` when asked to; malformed escapes stay.
pub fn unescape_uri(text: &[u8], plus: bool) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let digit = |b: Option<&u8>| b.and_then(|b| (*b as char).to_digit(16));
    let mut i = 0;
    while i < text.len() {
        match (text[i], digit(text.get(i + 1)), digit(text.get(i + 2))) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                i += 2;
            }
            (b'+', ..) if plus => out.push(b' '),
            (b, ..) => out.push(b),
        }
        i += 1;
    }
    out
}

/// The pairs of a query string, undecoded; `None` for a name without `=`. A name may be empty.
pub fn pairs(text: &[u8]) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
    text.split(|b| *b == b'&').filter(|pair| !pair.is_empty()).map(|pair| {
        let at = memchr::memchr(b'=', pair);
        at.map_or((pair, None), |at| (&pair[..at], Some(&pair[at + 1..])))
    })
}

/// Pushes the table of a query string, and "truncated" when there was more than `max`.
pub fn push_args(s: &Stack, text: &[u8], max: usize) -> Answer {
    s.push_table(0, 4);
    let table = s.top();
    for (count, (name, value)) in pairs(text).enumerate() {
        // Counted, and left out.
        if name.is_empty() && count < max {
            continue;
        }
        if count == max {
            if let Some(x) = crate::lua::fast::exchange() {
                x.log(Level::Debug, format!("lua hit query args limit {max}").as_bytes());
            }
            s.push_bytes("truncated");
            return Ok(2);
        }
        match value {
            Some(value) => s.push_bytes(unescape_uri(value, true)),
            None => s.push_bool(true),
        };
        add(s, table, &unescape_uri(name, true));
    }
    Ok(1)
}

/// `table[name]` takes the value on top; a second one makes it an array.
pub fn add(s: &Stack, table: c_int, name: &[u8]) {
    s.push_bytes(name);
    s.push_copy(-1);
    s.get_raw(table);
    // The value, its name, and what is known under that.
    if s.is_nil(-1) {
        s.pop(1);
        s.swap();
        s.set_raw(table);
    } else if s.is_table(-1) {
        let len = s.len(-1);
        s.push_copy(-3);
        s.set_index(-2, len + 1);
        s.pop(3);
    } else {
        s.push_table(2, 0);
        s.push_copy(-2);
        s.set_index(-2, 1);
        s.push_copy(-4);
        s.set_index(-2, 2);
        s.set(table, name);
        s.pop(3);
    }
}

fn encode_args(s: &Stack) -> Answer {
    s.arg_table(1)?;
    let mut out = Vec::new();
    write_args(s, 1, &mut out)?;
    Ok(s.push_bytes(out))
}

/// Writes the table at `i` as a query string.
pub fn write_args(s: &Stack, i: c_int, out: &mut Vec<u8>) -> std::result::Result<(), Raise> {
    s.pairs(i, |s| {
        let mut name = Vec::new();
        match s.kind(-2) {
            ffi::LUA_TSTRING => escape_into(&mut name, s.bytes(-2).unwrap_or_default(), component),
            ffi::LUA_TNUMBER => write_number(&mut name, s.number(-2).unwrap_or_default(), 14),
            _ => return Err(Raise::from("attempt to use a non-string key in the \"args\" option table")),
        }
        if !s.is_table(-1) {
            return write_arg(s, &name, out);
        }
        for n in 1..=s.len(-1) {
            s.get_index(-1, n);
            let written = write_arg(s, &name, out);
            s.pop(1);
            written?;
        }
        Ok(())
    })
}

/// Writes the value on top.
fn write_arg(s: &Stack, name: &[u8], out: &mut Vec<u8>) -> std::result::Result<(), Raise> {
    let value = match s.kind(-1) {
        ffi::LUA_TBOOLEAN if !s.boolean(-1) => return Ok(()),
        ffi::LUA_TBOOLEAN => None,
        ffi::LUA_TSTRING | ffi::LUA_TNUMBER => s.bytes(-1),
        _ => return Err(format!("attempt to use {} as query arg value", s.kind_name(-1)).into()),
    };
    if !out.is_empty() {
        out.push(b'&');
    }
    out.extend_from_slice(name);
    if let Some(value) = value {
        out.push(b'=');
        escape_into(out, value, component);
    }
    Ok(())
}

fn quote_sql(s: &Stack) -> Answer {
    let text = s.arg_bytes(1)?;
    let mut out = Vec::with_capacity(text.len() + 2);
    out.push(b'\'');
    for &b in text {
        let escaped = match b {
            0 => b'0',
            8 => b'b',
            9 => b't',
            10 => b'n',
            13 => b'r',
            26 => b'Z',
            b'\\' | b'\'' | b'"' => b,
            _ => {
                out.push(b);
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', escaped]);
    }
    out.push(b'\'');
    Ok(s.push_bytes(out))
}

/// A literal of PostgreSQL's with escapes (its manual, 4.1.2.2). What is not UTF-8 reaches the server as the octal numbers that
/// `bytea` takes: in another encoding its bytes could be half of a character, the other half of which ends the literal.
fn quote_pgsql(s: &Stack) -> Answer {
    let text = s.arg_bytes(1)?;
    if text.is_empty() {
        return Ok(s.push_bytes("''"));
    }
    let is_utf8 = std::str::from_utf8(text).is_ok();
    let mut out = Vec::with_capacity(text.len() + 3);
    out.extend_from_slice(b"E'");
    for &b in text {
        match b {
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            8 => out.extend_from_slice(b"\\b"),
            b'\\' | b'\'' | b'"' => out.extend_from_slice(&[b'\\', b]),
            // The server refuses a NUL; raw, it would end the statement.
            0 => out.extend_from_slice(b"\\000"),
            0x80.. if !is_utf8 => {
                out.extend_from_slice(&[b'\\', b'\\', b'0' + (b >> 6), b'0' + (b >> 3 & 7), b'0' + (b & 7)])
            }
            _ => out.push(b),
        }
    }
    out.push(b'\'');
    Ok(s.push_bytes(out))
}

#[cfg(test)]
mod tests {
    use super::MAX_FIELDS;
    use crate::lua::host::tests::{check, fails};

    #[test]
    fn escapes_and_reads_back() {
        for (lua, expected) in [
            ("ngx.escape_uri('a b&c=/é~')", "a%20b%26c%3D%2F%C3%A9~"),
            ("ngx.escape_uri('/a b?#', 0)", "/a%20b%3F%23"),
            ("ngx.unescape_uri('b%20r56+7%')", "b r56 7%"),
            ("ngx.encode_args({['a b'] = {'x', 'y z', true}})", "a%20b=x&a%20b=y%20z&a%20b"),
            ("ngx.encode_args({a = true, b = false})", "a"),
            ("ngx.decode_args('a=1&b&c=&a=%20+&=x').a[2]", "  "),
            ("tostring(ngx.decode_args('a=1&b&c=').b)", "true"),
            ("select(2, ngx.decode_args('a=1&b=2', 1))", "truncated"),
            ("ngx.quote_sql_str([[a'b\"c\\d]])", r#"'a\'b\"c\\d'"#),
        ] {
            check(&format!("return tostring(({lua}))"), expected);
        }
        fails("ngx.encode_args({a = print})", "attempt to use function as query arg value");
    }

    #[test]
    fn a_hundred_fields_are_read_unless_more_are_asked_for() {
        let prelude = format!(
            "local out = {{}} for i = 1, {MAX_FIELDS} do out[i] = 'f' .. i .. '=' .. i end
             local text = table.concat(out, '&')
             local function count(...)
                 local t, e = ngx.decode_args(...)
                 local n = 0 for _ in pairs(t) do n = n + 1 end
                 return n .. tostring(e)
             end"
        );
        for (lua, expected) in [
            ("count(text)", "100nil"),
            ("count(text .. '&more=1')", "100truncated"),
            ("count(text .. '&more=1', 101)", "101nil"),
            ("count(text .. '&more=1', 0)", "101nil"),
        ] {
            check(&format!("{prelude} return {lua}"), expected);
        }
    }
}
