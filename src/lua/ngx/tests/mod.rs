//! Runs Lua against servers of this process, as a worker runs it.

mod http;
mod libraries;
mod pipe;
mod process;
mod socket;
mod udp;

use std::{future::Future, rc::Rc};

use mlua::ffi;
use tokio::net::{TcpListener, TcpStream};

use crate::lua::{
    Vm, VmConfig,
    sched::{self, Outcome, background, end_background},
};

/// Runs `test` as a worker runs: one thread, local tasks.
pub(super) fn on_a_worker<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

pub(super) fn vm() -> Rc<Vm> {
    Vm::new(VmConfig::default()).expect("a VM")
}

/// Runs a chunk as a request of its own; what it returns as text, or its error's first line.
pub(super) async fn run(vm: &Rc<Vm>, source: &str) -> String {
    let f: mlua::Function = vm.lua.load(source).set_name("@t.lua").into_function().expect("compiles");
    let f = vm.keep(f).expect("kept");
    let mut x = background(vm);
    let push = |s: &crate::lua::Stack| {
        s.get_index(ffi::LUA_REGISTRYINDEX, f as usize);
        0
    };
    let read = |s: &crate::lua::Stack| String::from_utf8_lossy(s.bytes(1).unwrap_or(b"nil")).into_owned();
    let outcome = sched::call(vm, &mut x, push, read).await;
    end_background(vm, &mut x);
    match outcome {
        Outcome::Done(text) => text,
        Outcome::Exit(n) => format!("exit {n}"),
        Outcome::Failed(text) => text.lines().next().unwrap_or_default().to_owned(),
    }
}

/// A server that does the same for every connection; its port.
async fn server<F: Future<Output = ()> + 'static>(each: impl Fn(TcpStream) -> F + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::task::spawn_local(each(stream));
        }
    });
    port
}

/// Puts `show(...)`, `PORT` and a connected `sock` before a chunk.
fn connected(port: u16, source: &str) -> String {
    unconnected(port, &format!("assert(sock:connect('127.0.0.1', PORT))\n{source}"))
}

fn unconnected(port: u16, source: &str) -> String {
    format!(
        "local PORT = {port}
        local function show(...)
            local t = {{}}
            for i = 1, select('#', ...) do t[i] = tostring((select(i, ...))) end
            return table.concat(t, ' ')
        end
        local sock = ngx.socket.tcp()
        {source}"
    )
}
