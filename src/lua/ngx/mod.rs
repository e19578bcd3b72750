//! `ngx.*`: one file per area, named as in lua-nginx-module.
//!
//! What is hot goes through FFI (`fast` entries) with a facade in lua/moongate/ngx.lua that the JIT compiles; what
//! waits or builds tables is a host function. Semantics are those of lua-nginx-module's README; the head of a response
//! is kept until the phase's end, so it may still change after the first `ngx.print`.

pub mod balancer;
pub mod codec;
pub mod handshake;
pub mod header;
pub mod header_names;
pub mod location;
pub mod log;
pub mod object;
pub mod ocsp;
pub mod pipe;
pub mod req;
pub mod resp;
pub mod semaphore;
pub mod shdict;
pub mod socket;
pub mod socket_pool;
pub mod socket_tcp;
pub mod socket_udp;
pub mod ssl;
#[cfg(test)]
mod tests;
pub mod time;
pub mod upstream;
pub mod var;
pub mod worker;
pub mod worker_thread;

use super::api::Api;
use crate::error::Result;

/// A text that FFI hands to Lua: `moongate_str`. Valid until the request or the scratch buffer changes; Lua copies it
/// at once.
#[repr(C)]
pub struct Text {
    pub ptr: *const u8,
    pub len: usize,
}

impl Text {
    /// Points at `text`.
    pub fn set(&mut self, text: &[u8]) {
        (self.ptr, self.len) = (text.as_ptr(), text.len());
    }
}

/// A place for texts that are made on demand; one per thread, as Lua copies before the next call.
pub fn with_scratch<R>(fill: impl FnOnce(&mut Vec<u8>) -> R) -> R {
    thread_local! {
        static SCRATCH: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|buffer| {
        buffer.clear();
        fill(buffer)
    })
}

/// Points `out` at what `fill` writes.
pub fn scratch(out: &mut Text, fill: impl FnOnce(&mut Vec<u8>)) {
    with_scratch(|buffer| {
        fill(buffer);
        out.set(buffer);
    });
}

pub fn register(api: &mut Api) -> Result<()> {
    balancer::register(api)?;
    codec::register(api)?;
    handshake::register(api)?;
    header::register(api)?;
    location::register(api)?;
    log::register(api)?;
    ocsp::register(api)?;
    pipe::register(api)?;
    req::register(api)?;
    resp::register(api)?;
    semaphore::register(api)?;
    shdict::register(api)?;
    socket_tcp::register(api)?;
    socket_udp::register(api)?;
    ssl::register(api)?;
    time::register(api)?;
    upstream::register(api)?;
    var::register(api)?;
    worker::register(api)?;
    worker_thread::register(api)
}

#[cfg(test)]
mod compiled {
    use crate::lua::host::tests::serve;

    /// What stands in the documents as hot must be compiled: a loop over it ends up in a trace that never leaves it.
    #[test]
    fn the_hot_facades_are_compiled() {
        crate::shdict::store().declare("test-hot", 1 << 20);
        for call in [
            "ngx.header['X-A'] = 'b'",
            "x = ngx.header['X-A']",
            "x = ngx.var.host",
            "x = ngx.var.arg_a",
            "ngx.var.mine = 'v'",
            "x = ngx.ctx",
            "x = ngx.status",
            "x = ngx.now()",
            "x = ngx.req.get_method()",
            "x = ngx.get_phase()",
            "d:set('k', i)",
            "x = d:get('k')",
            "x = d:incr('n', 1, 0)",
            "ngx.log(ngx.DEBUG, 'never', i)",
            "x = ngx.re.find('abc1', '[0-9]', 'jo')",
            "x = m:match('10.2.3.4')",
            "ngx.req.set_header('X-B', 'c')",
        ] {
            let chunk = format!(
                "local d, x = ngx.shared['test-hot'], nil
                 local m = require('resty.ipmatcher').new({{'10.0.0.0/8'}})
                 local why, loops = 'no trace', 0
                 jit.attach(function(what, trace, _, _, code)
                     if what == 'abort' then why = 'abort ' .. tostring(code) end
                     if what == 'stop' then
                         why = require('jit.util').traceinfo(trace).linktype
                         if why == 'loop' then loops = loops + 1 end
                     end
                 end, 'trace')
                 for i = 1, 500 do {call} end
                 jit.attach(function() end)
                 return loops > 0 and 'compiled' or why"
            );
            serve(
                |x| {
                    x.request.method = b"GET".to_vec();
                    x.request.host = b"h".to_vec();
                    x.request.args = b"a=1".to_vec();
                },
                &chunk,
                "compiled",
            );
        }
    }

    /// So that the test above can fail: a host function is no part of a loop's trace.
    #[test]
    fn a_host_function_ends_a_trace() {
        serve(
            |_| {},
            "local loops = 0
             jit.attach(function(what, trace)
                 if what == 'stop' and require('jit.util').traceinfo(trace).linktype == 'loop' then loops = loops + 1 end
             end, 'trace')
             for i = 1, 500 do ngx.md5('x') end
             jit.attach(function() end)
             return tostring(loops)",
            "0",
        );
    }
}
