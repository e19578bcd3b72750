//! The names of headers as strings of a VM: the same few dozen come with every request, and making a string means lowering,
//! hashing and looking it up each time.

use std::cell::{Cell, OnceCell, RefCell};

use mlua::ffi;

use crate::{exchange::headers::lower, lua::api::Stack};

/// A place for each name; a client that sends many others only makes them slower.
const PLACES: usize = 256;
/// Longer names are made each time.
const LONGEST: usize = 31;

/// The names that a VM has met last, and the strings that they are in lower case.
#[derive(Default)]
pub struct Names {
    /// Made when first used: most VMs never are.
    met: OnceCell<Box<RefCell<[Name; PLACES]>>>,
    /// Registry reference of the table that holds the strings, each at its place.
    strings: Cell<i32>,
}

/// As it came, and how many bytes of it count; none: the place is free.
#[derive(Clone, Copy, Default)]
struct Name {
    bytes: [u8; LONGEST],
    len: u8,
}

impl Names {
    /// Pushes the table that `push` needs.
    pub fn begin(&self, s: &Stack) {
        if self.met.get().is_none() {
            self.met.get_or_init(|| Box::new(RefCell::new([Name::default(); PLACES])));
            s.push_table(PLACES, 0);
            // SAFETY: the table is on top; luaL_ref pops it.
            self.strings.set(unsafe { ffi::luaL_ref(s.raw(), ffi::LUA_REGISTRYINDEX) });
        }
        s.get_index(ffi::LUA_REGISTRYINDEX, self.strings.get() as usize);
    }

    /// Pushes `name` in lower case. `strings` is where the table lies that `begin` has pushed.
    pub fn push(&self, s: &Stack, strings: i32, name: &[u8]) {
        let Some(met) = self.met.get().filter(|_| !name.is_empty() && name.len() <= LONGEST) else {
            s.push_bytes(lower(name, &mut [0; 64]));
            return;
        };
        let mut met = met.borrow_mut();
        let place = place(name);
        let known = &mut met[place];
        if known.bytes[..known.len.into()] == *name {
            s.get_index(strings, place + 1);
            return;
        }
        s.push_bytes(lower(name, &mut [0; 64]));
        s.push_copy(-1);
        s.set_index(strings, place + 1);
        known.bytes[..name.len()].copy_from_slice(name);
        known.len = name.len() as u8;
    }
}

/// From the first and last bytes and the length, which tell nearly all names apart.
fn place(name: &[u8]) -> usize {
    let word = match (name.first_chunk(), name.last_chunk()) {
        (Some(first), Some(last)) => u64::from(u32::from_le_bytes(*first)) | u64::from(u32::from_le_bytes(*last)) << 32,
        _ => name.iter().fold(0, |word, b| word << 8 | u64::from(*b)),
    };
    let mixed = (word ^ name.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 56) as usize % PLACES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        exchange::{Exchange, Phase},
        lua::{Vm, fast, sched, vm::VmConfig},
    };

    #[track_caller]
    fn gives(vm: &std::rc::Rc<Vm>, prepare: impl FnOnce(&mut Exchange), chunk: &str, expected: &str) {
        let mut x = sched::background(vm);
        x.phase = Phase::Content;
        prepare(&mut x);
        let given: String =
            vm.entered(|| fast::enter(&mut x, || vm.lua.load(chunk).eval())).expect("a chunk that ends");
        assert_eq!(given, expected);
        sched::end_background(vm, &mut x);
    }

    #[test]
    fn names_are_themselves_however_many_come() {
        let vm = Vm::new(VmConfig::default()).expect("a VM");
        // More than there are places, short ones and such as are too long to be kept, each twice.
        let add = |x: &mut Exchange| {
            for n in 0..PLACES * 3 {
                x.request.headers.append(format!("X-{n}-{}", "a".repeat(n % 40)), n.to_string());
            }
        };
        let chunk = "for _ = 1, 2 do
                local n = 0
                for name, value in pairs(ngx.req.get_headers(0)) do
                    if name ~= 'x-' .. value .. '-' .. ('a'):rep(value % 40) then return name end
                    n = n + 1
                end
                if n ~= 768 then return tostring(n) end
                if ngx.req.get_headers(0)['X-5-AAAAA'] ~= '5' then return 'case' end
            end
            return 'all'";
        gives(&vm, add, chunk, "all");
        let twice = |x: &mut Exchange| {
            x.request.headers.append("X-Abc", "1");
            x.request.headers.append("x-aBC", "2");
            x.request.headers.append("", "none");
        };
        gives(&vm, twice, "local h = ngx.req.get_headers() return h['x-abc'][1] .. h['x-abc'][2] .. h['']", "12none");
        // The strings are kept from the collector.
        let one = |x: &mut Exchange| x.request.headers.append("X-Kept", "1");
        for _ in 0..3 {
            gives(&vm, one, "collectgarbage() return next(ngx.req.get_headers())", "x-kept");
        }
    }
}
