//! `ngx.pipe`: what scripts get of their processes, and each text that it fails with.

use super::*;
use crate::lua::vm::Purpose;

const SHOW: &str = "local pipe = require('ngx.pipe')
    local function show(...)
        local t = {}
        for i = 1, select('#', ...) do t[i] = tostring((select(i, ...))) end
        return table.concat(t, ' ')
    end ";

#[track_caller]
fn gives(source: &str, expected: &str) {
    assert_eq!(on_a_worker(async { run(&vm(), &format!("{SHOW}{source}")).await }), expected, "{source}");
}

/// The text of the error that a call raises.
#[track_caller]
fn raises(call: &str, expected: &str) {
    let source = format!("return (select(2, pcall(function() {call} end)):gsub('^[%w/.]+:%d+: ', ''))");
    gives(&source, expected);
}

#[test]
fn talks_to_a_process() {
    gives(
        "local proc = pipe.spawn({'wc', '-c'})
         local n = proc:write(('1234'):rep(2048)) + proc:write({'a', 'b'}) + proc:write('') + proc:write(7)
         assert(proc:shutdown('stdin'))
         return show(n, proc:stdout_read_line(), proc:wait())",
        "8195 8195 true exit 0",
    );
    gives(
        "local proc = pipe.spawn('cat; echo err >&2')
         proc:write('one\\r\\ntwo\\nfivesREST')
         proc:shutdown('stdin')
         local out = { proc:stdout_read_line(), proc:stdout_read_line(), proc:stdout_read_bytes(5), proc:stdout_read_any(2) }
         return table.concat(out, ' ') .. ' ' .. proc:stdout_read_all() .. ' ' .. show(proc:stdout_read_all())
            .. ' ' .. proc:stderr_read_all():sub(1, 3)",
        "one two fives RE ST nil closed err",
    );
    gives("local proc = pipe.spawn({'cat'}) return show(type(proc:pid()), proc:pid() > 1)", "number true");
}

#[test]
fn an_end_gives_what_there_was() {
    for (read, expected) in [
        ("stdout_read_line()", "nil closed half"),
        ("stdout_read_bytes(9)", "nil closed half"),
        ("stdout_read_all()", "half"),
        ("stdout_read_any(9)", "half"),
    ] {
        gives(&format!("return show(pipe.spawn({{'printf', 'half'}}):{read})"), expected);
    }
    gives("return show(pipe.spawn('exit'):stdout_read_any(9))", "nil closed");
}

#[test]
fn both_outputs_are_apart_or_one() {
    let source = "local proc = pipe.spawn('echo out; echo err >&2', { merge_stderr = MERGE })
         local out = {}
         for _, name in ipairs({ 'all', 'line', 'bytes', 'any' }) do
            out[#out + 1] = show(proc['stderr_read_' .. name](proc, 1))
         end
         out[#out + 1] = show(proc:shutdown('stderr'))
         return proc:stdout_read_all():gsub('\\n', ' ') .. table.concat(out, '|')";
    gives(&source.replace("MERGE", "true"), &format!("out err {}", ["nil merged to stdout"; 5].join("|")));
    gives(
        "local proc = pipe.spawn('echo out; echo err >&2') return show(proc:stdout_read_line(), proc:stderr_read_line())",
        "out err",
    );
}

#[test]
fn waits_for_the_end_once() {
    gives(
        "local proc = pipe.spawn('exit 2') return show(proc:wait()) .. '|' .. show(proc:wait()) .. '|' .. show(proc:kill(15))
            .. '|' .. show(proc:shutdown('stdout')) .. '|' .. show(proc:write('x'))",
        "false exit 2|nil exited|nil exited|nil closed|nil closed",
    );
    gives("return show(pipe.spawn('kill -9 $$'):wait())", "false signal 9");
    gives(
        "local proc = pipe.spawn({'cat'})
         local t = ngx.thread.spawn(proc.wait, proc)
         local second = show(proc:wait())
         proc:kill(15)
         return second .. '|' .. show(ngx.thread.wait(t))",
        "nil pipe busy waiting|true false signal 15",
    );
    gives(
        "local proc = pipe.spawn({'cat'}, { wait_timeout = 10 })
         local late = show(proc:wait())
         local t = ngx.thread.spawn(proc.wait, proc)
         ngx.thread.kill(t)
         proc:shutdown('stdin') proc:set_timeouts(nil, nil, nil, 0)
         return late .. '|' .. show(proc:wait())",
        "nil timeout|true exit 0",
    );
    // A process that has ended without a wait: its end is still told once.
    gives(
        "local proc = pipe.spawn('exit 3')
         while proc:kill(0) do ngx.sleep(0) end
         return show(proc:kill(0)) .. '|' .. show(proc:wait()) .. '|' .. show(proc:wait())",
        "nil exited|false exit 3|nil exited",
    );
}

#[test]
fn signals_are_numbers() {
    gives("return show(pipe.spawn({'cat'}):kill(0), pipe.spawn({'cat'}):kill(1000))", "true nil invalid signal");
    gives("return show(pipe.spawn({'cat'}):kill(-1))", "nil invalid signal");
    raises("pipe.spawn({'cat'}):kill('TERM')", "bad signal arg: number expected, got string");
}

#[test]
fn waits_have_limits() {
    gives(
        "local proc = pipe.spawn('printf x; kill -STOP $$', { stdout_read_timeout = 20, stderr_read_timeout = 10 })
         local out = show(proc:stdout_read_bytes(2)) .. '|' .. show(proc:stderr_read_any(1)) .. '|'
         proc:set_timeouts(10, 10)
         return out .. show(proc:stdout_read_line()) .. '|' .. show(proc:write(('x'):rep(1000000)))",
        "nil timeout x|nil timeout|nil timeout |nil timeout",
    );
    for call in ["pipe.spawn({'cat'}):set_timeouts(-1)", "pipe.spawn({'cat'}, { wait_timeout = -1 })"] {
        raises(call, "bad timeout value");
    }
}

#[test]
fn one_light_thread_at_a_time_and_shutdown_ends_its_wait() {
    gives(
        "local proc = pipe.spawn({'cat'})
         local out = {}
         local reads = ngx.thread.spawn(proc.stdout_read_line, proc)
         local errors = ngx.thread.spawn(proc.stderr_read_all, proc)
         out[1], out[2] = show(proc:stdout_read_all()), show(proc:stderr_read_any(1))
         out[3] = show(proc:shutdown('stdout'), proc:shutdown('stderr'))
         out[4], out[5] = show(ngx.thread.wait(reads)), show(ngx.thread.wait(errors))
         out[6] = show(proc:stdout_read_line())
         return table.concat(out, '|')",
        "nil pipe busy reading|nil pipe busy reading|true true|true nil aborted|true nil aborted|nil closed",
    );
    gives(
        "local proc = pipe.spawn('kill -STOP $$')
         local writes = ngx.thread.spawn(proc.write, proc, ('x'):rep(1000000))
         local busy = show(proc:write('y'))
         proc:shutdown('stdin')
         return show(busy, ngx.thread.wait(writes)) .. '|' .. show(proc:write('y'))",
        "nil pipe busy writing true nil aborted|nil closed",
    );
    // A light thread that is killed waits no more.
    gives(
        "local proc = pipe.spawn({'cat'})
         ngx.thread.kill(ngx.thread.spawn(proc.stdout_read_line, proc))
         proc:write('on\\n')
         return show(proc:stdout_read_line())",
        "on",
    );
    raises("pipe.spawn({'cat'}):shutdown('all')", "bad shutdown arg: all");
    raises("pipe.spawn({'cat'}):shutdown()", "bad shutdown arg: string expected, got nil");
}

#[test]
fn options_are_checked_and_obeyed() {
    gives(
        "return pipe.spawn({'/usr/bin/env'}, { environ = {'A=b c', 'D='}, buffer_size = 1 }):stdout_read_all():gsub('\\n', ' ')",
        "A=b c D= ",
    );
    gives("return show(pipe.spawn({'/no/such/program'}))", "nil No such file or directory");
    for (call, expected) in [
        ("spawn()", "bad args arg: table expected, got nil"),
        ("spawn({})", "bad args arg: non-empty table expected"),
        ("spawn({'a', {}})", "bad args arg: table of strings expected, got table"),
        ("spawn('a', 1)", "bad opts arg: table expected, got number"),
        ("spawn('a', { buffer_size = 0 })", "bad buffer_size option"),
        ("spawn('a', { environ = 'A=b' })", "bad environ option: table expected, got string"),
        ("spawn('a', { environ = {'A'} })", "bad environ option: name=value expected"),
        ("spawn({'cat'}):stdout_read_any(0)", "bad max arg: number expected, got number"),
        ("spawn({'cat'}):stdout_read_bytes()", "bad len arg: number expected, got nil"),
        ("spawn({'cat'}).write({}, 'x')", "not a process instance"),
    ] {
        raises(&format!("pipe.{call}"), expected);
    }
    let many = "local t = {} for i = 1, 2000 do t[i] = 'x' end pipe.spawn(t)";
    raises(many, "bad args arg: more than 1024 strings");
}

/// Whether there is a process with this number: not even one that nobody has reaped.
fn is_there(pid: &str) -> bool {
    std::path::Path::new("/proc").join(pid).exists()
}

#[test]
fn a_process_ends_with_its_request_with_all_that_it_started() {
    on_a_worker(async {
        let vm = vm();
        let source = "kept = pipe.spawn('cat & echo $!; cat') return show(kept:pid(), kept:stdout_read_line())";
        let pids = run(&vm, &format!("{SHOW}{source}")).await;
        let (shell, child) = pids.split_once(' ').expect("two numbers");
        let gone = async {
            while is_there(shell)
                || std::fs::read_to_string(format!("/proc/{child}/cmdline")).is_ok_and(|c| c == "cat\0")
            {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), gone).await.expect("killed and reaped");
        let later = run(&vm, "return select(2, pcall(kept.wait, kept))").await;
        assert!(later.ends_with("bad request"), "{later}");
    });
}

#[test]
fn a_process_that_nobody_holds_is_killed() {
    gives(
        "local pid = pipe.spawn({'cat'}):pid()
         collectgarbage() collectgarbage()
         while require('resty.signal').kill(pid, 0) do ngx.sleep(0) end
         return 'gone'",
        "gone",
    );
}

#[test]
fn functions_and_checks_start_nothing() {
    let refused = |purpose: Purpose, source: &str| {
        let vm = Vm::new(VmConfig { purpose, ..VmConfig::default() }).expect("a VM");
        on_a_worker(async { run(&vm, source).await })
    };
    let required = refused(Purpose::Functions, "return select(2, pcall(require, 'ngx.pipe'))");
    assert!(required.contains("module 'ngx.pipe' is not open to functions"), "{required}");
    let native = "return select(2, require('moongate.native').pipe.spawn('exit'))";
    assert_eq!(refused(Purpose::Functions, native), "not open to functions");
    assert_eq!(refused(Purpose::Check, native), "no processes while a plugin is checked");
}
