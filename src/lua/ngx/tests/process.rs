//! The process and its log as scripts see them: `ngx.worker`, `ngx.process`, `ngx.errlog`, and the modules `ngx.req` and `ngx.resp`.

use super::*;
use crate::{
    exchange::Exchange,
    lua::{host::tests::serve, ngx::worker, vm::Purpose},
    observe::capture,
};

#[track_caller]
fn gives(vm: &Rc<Vm>, source: &str, expected: &str) {
    let show = "local function show(...)
        local parts = {}
        for i = 1, select('#', ...) do parts[i] = tostring((select(i, ...))) end
        return table.concat(parts, ' ')
    end ";
    assert_eq!(on_a_worker(async { run(vm, &format!("{show}{source}")).await }), expected, "{source}");
}

fn vm_for(purpose: Purpose) -> Rc<Vm> {
    Vm::new(VmConfig { purpose, ..VmConfig::default() }).expect("a VM")
}

#[test]
fn captured_lines_are_taken_once() {
    let vm = vm();
    let missing = "nil directive \"lua_capture_error_log\" is not set";
    gives(&vm, "return show(require('ngx.errlog').get_logs())", missing);
    gives(&vm, "return show(require('ngx.errlog').set_filter_level(ngx.WARN))", missing);
    capture::start(100 << 10);
    gives(
        &vm,
        "local errlog = require('ngx.errlog')
         ngx.log(ngx.ERR, 'one')
         errlog.raw_log(ngx.WARN, 'two')
         local level, time, text = unpack(assert(errlog.get_logs(1)))
         local rest = { 1, 2, 3, 4, 5 }
         assert(errlog.get_logs(0, rest) == rest)
         return show(level, time <= ngx.now() and time > ngx.now() - 60, text:match('%[lua%] t.lua:6.*'), text:match('%[%w+%]'),
            rest[1], rest[3]:match(': (.*)'), rest[4], #errlog.get_logs())",
        "4 true [lua] t.lua:6: one [error] 5 two nil 0",
    );
    gives(
        &vm,
        "local errlog = require('ngx.errlog')
         local set = show(errlog.set_filter_level(ngx.ERR), (errlog.set_filter_level()), (errlog.set_filter_level(9)))
         ngx.log(ngx.WARN, 'no') ngx.log(ngx.ERR, 'yes')
         return show(set, #errlog.get_logs(), errlog.get_sys_filter_level())",
        "true nil nil 3 5",
    );
    for (call, expected) in [
        ("raw_log('x', 'text')", "t.lua:1: bad argument #1 to 'raw_log' (must be a number)"),
        ("raw_log(4)", "t.lua:1: bad argument #2 to 'raw_log' (must be a string)"),
        ("raw_log(9, 'text')", "t.lua:1: bad log level"),
        ("raw_log(-1, 'text')", "t.lua:1: bad log level"),
        ("get_logs('x')", "t.lua:1: bad argument #1 to 'get_logs' (number expected, got string)"),
    ] {
        let call = format!("return select(2, pcall(function() require('ngx.errlog').{call} end))");
        assert_eq!(on_a_worker(run(&vm, &call)), expected);
    }
    let functions = vm_for(Purpose::Functions);
    gives(&functions, "return show(require('ngx.errlog').get_logs())", "nil not open to functions");
    gives(&functions, "return show(require('ngx.errlog').set_filter_level(ngx.ERR))", "nil not open to functions");
}

#[test]
fn the_process_is_one_and_its_threads_are_workers() {
    let vm = vm();
    let pid = std::process::id();
    gives(
        &vm,
        "local p = require('ngx.process')
         return show(p.type(), p.get_master_pid(), ngx.worker.pid(), ngx.worker.pids()[1], ngx.worker.id(), ngx.worker.count())",
        &format!("worker {pid} {pid} {pid} 0 1"),
    );
    gives(
        &vm,
        "return (select(2, pcall(require('ngx.process').enable_privileged_agent)):gsub('^.-: ', ''))",
        "API disabled in the current context",
    );
    let checks = vm_for(Purpose::Check);
    gives(&checks, "return show(require('ngx.process').type(), ngx.worker.id())", "master nil");
    let told = vm.run("x.lua", "return select(2, require('ngx.process').enable_privileged_agent())").expect("runs");
    assert!(told[0].to_string().expect("a text").starts_with("there is no privileged agent"));
    let refused = "return show(require('ngx.process').signal_graceful_exit())";
    gives(&vm_for(Purpose::Check), refused, "nil nothing is served here");
    let raised = "return (select(2, pcall(require('ngx.process').signal_graceful_exit)):gsub('^.-: ', ''))";
    gives(&vm_for(Purpose::Functions), raised, "signal_graceful_exit is not open to functions");
}

#[test]
fn a_worker_exits_once_its_vm_closes_or_the_gateway_drains() {
    let (old, new) = (vm(), vm());
    let exiting = "return show(ngx.worker.exiting())";
    gives(&old, exiting, "false");
    old.close();
    gives(&old, exiting, "true");
    gives(&new, exiting, "false");
    worker::set_exiting();
    gives(&new, exiting, "true");
}

fn nothing(_: &mut Exchange) {}

#[test]
fn request_headers_and_the_extension_of_the_path() {
    serve(
        |x| x.request.headers.append("X-A", "1"),
        "local req = require('ngx.req')
         req.add_header('X-A', '2') req.add_header('X-A', {3, '4'}) req.add_header('X-B', true)
         return table.concat(ngx.req.get_headers()['x-a'], ' ') .. ' ' .. ngx.req.get_headers()['x-b']",
        "1 2 3 4 true",
    );
    for (value, why) in [("nil", "string or table expected, got nil"), ("{}", "non-empty table expected")] {
        let chunk = format!("return (select(2, pcall(function() require('ngx.req').add_header('X', {value}) end)))");
        serve(nothing, &chunk, &format!("test:1: bad 'value' argument: {why}"));
    }
    for (path, max, expected) in
        [("/a/test.m3u8", "", "m3u8"), ("/a.b/c", "", ""), ("/x.tar.gz", "1", "g"), ("/a/b.", "", "")]
    {
        let chunk = format!("return '<' .. require('ngx.req').get_uri_ext({max}) .. '>'");
        serve(|x| x.request.path = path.into(), &chunk, &format!("<{expected}>"));
    }
}

#[test]
fn response_headers_status_and_phrase() {
    let x = serve(
        nothing,
        "local resp = require('ngx.resp')
         resp.add_header('X-A', 'a') resp.add_header('X-A', {'b', 3})
         resp.add_header('Content-Type', 'a/b') resp.add_header('Content-Type', 'c/d')
         resp.set_status(299, 'Quite Fine')
         return table.concat(ngx.header['X-A'], ' ') .. ' ' .. ngx.header['Content-Type'] .. ' ' .. ngx.status",
        "a b 3 c/d 299",
    );
    assert_eq!((x.response.status, &x.response.reason[..]), (299, &b"Quite Fine"[..]));
    let x = serve(
        nothing,
        "local r = require('ngx.resp') r.set_status(299, 'F') r.set_status('404') return ngx.status .. ''",
        "404",
    );
    assert!(x.response.reason.is_empty());
    for (call, expected) in [
        ("add_header('X', nil)", "invalid header value"),
        ("add_header('X', {})", "invalid header value"),
        ("set_status('x', 'y')", "number expected, got string"),
        ("set_status(200, 'a\\r\\nX: y')", "bad argument #2 to 'set_status' (bad reason)"),
        ("set_status(1e9, 'a')", "bad argument #1 to 'set_status' (bad status)"),
    ] {
        let chunk = format!("return (select(2, pcall(function() require('ngx.resp').{call} end)):gsub('^.-: ', ''))");
        serve(nothing, &chunk, expected);
    }
    let late = serve(
        |x| {
            x.response.head_sent = true;
            x.response.status = 200;
        },
        "local r = require('ngx.resp') r.set_status(500, 'No') r.add_header('X-A', 'b') return ngx.status .. ''",
        "200",
    );
    assert!(late.response.headers.is_empty());
}
