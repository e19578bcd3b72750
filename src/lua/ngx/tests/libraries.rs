//! Libraries that wait while others run: commands, and the making of keys.

use super::*;

#[track_caller]
fn gives(source: &str, expected: &str) {
    let show = "local function show(...)
        local parts = {}
        for i = 1, select('#', ...) do parts[i] = tostring((select(i, ...))) end
        return table.concat(parts, ' ')
    end ";
    assert_eq!(on_a_worker(async { run(&vm(), &format!("{show}{source}")).await }), expected, "{source}");
}

#[test]
fn commands_run_beside_the_worker() {
    for (arguments, expected) in [
        ("'cat; echo err >&2; exit 3', 'input'", "nil input err\n exit 3"),
        ("{'echo', 'a  b'}", "true a  b\n  exit 0"),
        ("'sleep 60 & sleep 60', nil, 20", "nil   timeout nil"),
        ("'yes', nil, 60000, 4", "nil y\ny\n  too much data nil"),
        ("{'/no/such/program'}", "nil   No such file or directory nil"),
        ("'kill -9 $$'", "nil   signal 9"),
    ] {
        let got = on_a_worker(async {
            run(
                &vm(),
                &format!(
                    "local parts = {{ n = 5, require('resty.shell').run({arguments}) }}
                     for i = 1, 5 do parts[i] = tostring(parts[i]) end
                     return table.concat(parts, ' ')"
                ),
            )
            .await
        });
        assert_eq!(got, expected, "{arguments}");
    }
    gives("return show((pcall(require('resty.shell').run)))", "false");
}

#[test]
fn a_light_thread_goes_on_while_a_command_runs() {
    gives(
        "local sem = require('ngx.semaphore').new(0)
         local thread = ngx.thread.spawn(function() return (select(2, require('resty.shell').run('read line; echo $line', 'in'))) end)
         sem:post()
         local waited = sem:wait(5)
         return show(waited, ngx.thread.wait(thread))",
        "true true in\n",
    );
}

#[test]
fn signals_go_to_one_process() {
    for (call, expected) in [
        ("signum('TERM')", "15"),
        ("signum('NOPE')", "nil unknown signal name"),
        ("kill(ngx.worker.pid(), 0)", "true"),
        ("kill(ngx.worker.pid(), 'NONE')", "true"),
        ("kill(-1, 'KILL')", "nil invalid argument"),
        ("kill(0, 'KILL')", "nil invalid argument"),
        ("kill('x', 'KILL')", "nil bad pid: x"),
        ("kill(2147483647, 'TERM')", "nil No such process"),
    ] {
        gives(&format!("return show(require('resty.signal').{call})"), expected);
    }
}

#[test]
fn rsa_keys_are_made_off_the_worker() {
    gives(
        "local rsa = require('resty.rsa')
         local public, private = rsa:generate_rsa_keys(1024)
         local pkcs8 = (rsa:generate_rsa_keys(1024, true))
         local text = rsa:new({private_key = private}):decrypt(rsa:new({public_key = public}):encrypt('t'))
         return show(text, public:match('^[^\\n]*'), private:match('^[^\\n]*'), pkcs8:match('^[^\\n]*'))",
        "t -----BEGIN RSA PUBLIC KEY----- -----BEGIN RSA PRIVATE KEY----- -----BEGIN PUBLIC KEY-----",
    );
    gives("return show(require('resty.rsa'):generate_rsa_keys(512))", "nil nil bits must be 1024 to 8192");
    gives("return show(require('resty.openssl.pkey').new({type = 'RSA', bits = 1024}):get_size())", "128");
    gives("return show(require('resty.openssl.pkey').new({type = 'DH'}))", "nil pkey.new: unsupported key type");
}
