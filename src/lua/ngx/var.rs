//! `ngx.var`: reading and writing variables by name.

use std::ffi::{c_int, c_void};

use super::{Text, with_scratch};
use crate::{
    error::Result,
    exchange::{
        Exchange, Known, Var,
        vars::{MAX_CUSTOM, Refused},
    },
    lua::{
        api::{Api, Phases},
        fast,
    },
};

const NOT_CHANGEABLE: c_int = 0;
const NOT_FOUND: c_int = -2;
const NOT_ASSIGNABLE: c_int = -3;

pub fn register(api: &mut Api) -> Result<()> {
    let doc = "a variable's value: 1 when it has one, -1 without a request";
    let signature = "int (const char *, size_t, void *)";
    api.fast("var_get", signature, Phases::ANY, doc, var_get as *const c_void)?;
    let doc = "the number of a variable of the gateway's for `var_at`; -1: there is none of that name";
    api.fast("var_id", "int (const char *, size_t)", Phases::ANY, doc, var_id as *const c_void)?;
    let doc = "a variable's value by its number: 1 when it has one, -1 without a request";
    api.fast("var_at", "int (int, void *)", Phases::ANY, doc, var_at as *const c_void)?;
    let doc = "sets a variable; a null value unsets it; 0: it cannot be changed, -1: no request, -2: there is none of that \
               name to write, -3: it cannot be assigned";
    let signature = "int (const char *, size_t, const char *, size_t)";
    api.fast("var_set", signature, Phases::ANY, doc, var_set as *const c_void)
}

// SAFETY (all exports): Lua passes strings with their lengths and its own buffer for the answer.
crate::export! {
    fn var_get(name: *const u8, len: usize, out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::request() else { return -1 };
        unsafe { c_int::from(read(x, fast::bytes(name, len), &mut *out)) }
    }

    fn var_id(name: *const u8, len: usize) -> c_int, -1 => {
        let name = std::str::from_utf8(unsafe { fast::bytes(name, len) });
        name.ok().and_then(Known::number).map_or(-1, c_int::from)
    }

    fn var_at(number: c_int, out: *mut Text) -> c_int, 0 => {
        let Some(x) = fast::request() else { return -1 };
        let Some(known) = u16::try_from(number).ok().and_then(Known::numbered) else { return 0 };
        with_scratch(|scratch| match x.var(&Var::Known(known), scratch) {
            Some(value) => {
                unsafe { (*out).set(value) };
                1
            }
            None => 0,
        })
    }

    fn var_set(name: *const u8, len: usize, value: *const u8, value_len: usize) -> c_int, 0 => {
        let Some(x) = fast::request() else { return -1 };
        let name = unsafe { fast::bytes(name, len) };
        let value = (!value.is_null()).then(|| unsafe { fast::bytes(value, value_len) });
        write(x, name, value)
    }
}

/// Points `out` at the value.
fn read(x: &Exchange, name: &[u8], out: &mut Text) -> bool {
    let Ok(name) = std::str::from_utf8(name) else { return false };
    with_scratch(|scratch| match x.var_by_name(name, scratch) {
        Some(value) => {
            out.set(value);
            true
        }
        None => false,
    })
}

/// 1, or what `var_set` says of a refusal.
fn write(x: &mut Exchange, name: &[u8], value: Option<&[u8]>) -> c_int {
    let Ok(name) = std::str::from_utf8(name) else { return NOT_FOUND };
    let folded = x.location.is_some().then(|| name.to_ascii_lowercase());
    let name = folded.as_deref().unwrap_or(name);
    if !x.is_defined(name) {
        return NOT_FOUND;
    }
    let made = x.custom_vars.iter().position(|(n, _)| &**n == name);
    let set = match (value, made) {
        (Some(_), None) if x.custom_vars.len() >= MAX_CUSTOM => return NOT_CHANGEABLE,
        (Some(value), _) => x.set_var(name, value),
        // nil: a variable of the script's own goes, one of the gateway's becomes empty.
        (None, Some(at)) => {
            x.custom_vars.swap_remove(at);
            Ok(())
        }
        (None, None) if matches!(Var::parse(name), Var::Custom(_)) => Ok(()),
        (None, None) => x.set_var(name, b"").map(|()| x.request.args_set &= name != "args"),
    };
    match set {
        Ok(()) => 1,
        Err(Refused::NotChangeable) => NOT_CHANGEABLE,
        Err(Refused::NotFound) => NOT_FOUND,
        Err(Refused::NotAssignable) => NOT_ASSIGNABLE,
    }
}

#[cfg(test)]
mod tests {
    use super::MAX_CUSTOM;
    use crate::lua::host::tests::serve;

    #[test]
    fn variables_of_scripts_are_bounded() {
        let chunk = format!(
            "local ok, err
             for i = 1, {MAX_CUSTOM} do ngx.var['mine' .. i] = i end
             ok, err = pcall(function() ngx.var.one_more = 1 end)
             ngx.var.mine1 = 'still'
             return tostring(ok) .. ngx.var.mine1 .. ngx.var.mine{MAX_CUSTOM}"
        );
        let x = serve(|_| {}, &chunk, &format!("falsestill{MAX_CUSTOM}"));
        assert_eq!(x.custom_vars.len(), MAX_CUSTOM);
    }
}
