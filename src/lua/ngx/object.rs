//! Rust values that Lua holds: a userdata with a counted pointer and a finalizer. A waiting operation keeps the value alive by
//! a pointer of its own, so a collected object never pulls it from under a wait.

use std::{any::TypeId, ffi::c_int, rc::Rc};

use mlua::ffi;

use crate::lua::api::{Raise, Stack};

#[repr(C)]
struct Slot<T> {
    kind: TypeId,
    value: Option<Rc<T>>,
}

/// Pushes a userdata that owns `value`.
pub fn push<T: 'static>(s: &Stack, value: Rc<T>) -> c_int {
    let l = s.raw();
    // SAFETY: the userdata is written before its finalizer is set; its alignment, 8, is that of the slot.
    unsafe {
        const { assert!(align_of::<Slot<()>>() <= 8) };
        let slot = ffi::lua_newuserdata(l, size_of::<Slot<T>>()).cast::<Slot<T>>();
        slot.write_unaligned(Slot { kind: TypeId::of::<T>(), value: Some(value) });
        s.push_table(0, 2);
        ffi::lua_pushcclosure(l, free::<T>, 0);
        ffi::lua_setfield(l, -2, c"__gc".as_ptr());
        // Scripts must not reach the finalizer.
        s.push_bool(false);
        ffi::lua_setfield(l, -2, c"__metatable".as_ptr());
        ffi::lua_setmetatable(l, -2);
    }
    1
}

unsafe extern "C-unwind" fn free<T: 'static>(l: *mut ffi::lua_State) -> c_int {
    // SAFETY: Lua calls this with a live state; the slot is ours, and what it held is dropped once.
    unsafe {
        if let Some(slot) = slot::<T>(&Stack::new(l), 1) {
            drop((*slot).value.take());
        }
    }
    0
}

fn slot<T: 'static>(s: &Stack, i: c_int) -> Option<*mut Slot<T>> {
    if s.kind(i) != ffi::LUA_TUSERDATA || s.len(i) != size_of::<Slot<T>>() {
        return None;
    }
    // SAFETY: it is a userdata of this size; the type's id, its first field, tells whether it is ours.
    unsafe {
        let slot = ffi::lua_touserdata(s.raw(), i).cast::<Slot<T>>();
        ((&raw const (*slot).kind).read_unaligned() == TypeId::of::<T>()).then_some(slot)
    }
}

/// The value of the userdata at `i`.
pub fn get<T: 'static>(s: &Stack, i: c_int) -> Result<Rc<T>, Raise> {
    // SAFETY: the slot is ours and lives while it is on the stack.
    let value = slot::<T>(s, i).and_then(|slot| unsafe { (*slot).value.clone() });
    value.ok_or_else(|| s.bad_argument(i, "object"))
}
