//! `lua.preload`: libraries whose symbols every VM's `ffi.C` finds, as if the binary were linked with them.

use std::ffi::{CStr, CString};

use crate::error::{Error, Kind, Result};

/// Loads them for the life of the process; all that cannot be loaded are told at once.
pub fn preload(libraries: &[String]) -> Result<()> {
    let failed = libraries.iter().enumerate().filter_map(|(i, name)| {
        let why = open(name).err()?;
        Some(format!("lua.preload[{i}]: {why}; install it, write its full path, or take it off the list"))
    });
    let failed: Vec<String> = failed.collect();
    if failed.is_empty() { Ok(()) } else { Err(Error::config(Kind::NotFound).context(failed.join("\n"))) }
}

fn open(name: &str) -> std::result::Result<(), String> {
    let text = CString::new(name).map_err(|_| format!("{name:?} is no name of a library"))?;
    // SAFETY: the name ends with a NUL. What the library does when it is loaded is the operator's own choice, as with a C
    // module; it is never unloaded. The text of dlerror lives until the next call of this thread.
    unsafe {
        if !libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL).is_null() {
            return Ok(());
        }
        let why = libc::dlerror();
        if why.is_null() {
            Err(format!("{name} cannot be loaded"))
        } else {
            Err(CStr::from_ptr(why).to_string_lossy().into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_that_are_missing_are_told_with_the_way_out() {
        assert!(preload(&["libc.so.6".into()]).is_ok());
        let e = preload(&["libc.so.6".into(), "libno-such.so.9".into(), "a\0b".into()]).unwrap_err().to_string();
        for part in [
            "lua.preload[1]: libno-such.so.9: cannot open shared object file",
            "lua.preload[2]",
            "take it off the list",
        ] {
            assert!(e.contains(part), "{part} in {e}");
        }
        assert!(!e.contains("lua.preload[0]"), "{e}");
    }
}
