//! `lua.limits.memory_mb`: what is live counts, whatever garbage lies beside it.

use serde_json::{Value, json};

use crate::support::{Gateway, Upstream};

/// One worker whose VM may hold so much, with `acme-mem.lua` as given.
fn gateway(memory_mb: usize, plugin: &str) -> (Gateway, Upstream) {
    let (up, dir) = (Upstream::echo(), crate::support::Dir::new());
    dir.configure(json!({
        "lua": {"limits": {"memory_mb": memory_mb}},
        "nginx_config": {"worker_processes": 1},
    }));
    dir.write("plugins/acme-mem.lua", plugin);
    dir.write("plugins/acme-busy.lua", BUSY);
    let gw = Gateway::in_dir(dir);
    gw.route("mem", "/mem", &up, json!({"acme-mem": {}}));
    gw.route("busy", "/busy", &up, json!({"acme-busy": {}}));
    (gw, up)
}

/// Makes garbage for longer than the watchdog leaves a script alone.
const BUSY: &str = "
    local _M = { version = 0.1, priority = 1, name = 'acme-busy', schema = { type = 'object' } }
    function _M.access()
        local begun, n = os.clock(), 0
        while os.clock() - begun < 0.15 do
            for i = 1, 1000 do n = n + #(('x'):rep(1000) .. i .. n) end
        end
    end
    return _M";

const REPLACED: &str = "it is replaced";
const TOO_MUCH: &str = "the VM holds more memory than lua.limits.memory_mb allows";

fn all_served(gw: &Gateway, path: &str, times: usize) {
    let refused: Vec<u16> = (0..times).map(|_| gw.get(path).status).filter(|status| *status != 200).collect();
    assert!(refused.is_empty(), "{path}: {refused:?}");
}

fn memory_bytes(gw: &Gateway) -> u64 {
    let held: Value = crate::support::get(&gw.control(), "/v1/lua").json();
    held["workers"][0]["vms"][0]["memory_bytes"].as_u64().expect("a number")
}

#[test]
fn one_that_takes_all_memory_is_ended_and_costs_nobody_else() {
    let (gw, _up) = gateway(
        128,
        "local _M = { version = 0.1, priority = 1, name = 'acme-mem', schema = { type = 'object' } }
        function _M.access() local t = {} for i = 1, 1e9 do t[i] = ('x'):rep(1000) .. i end end
        return _M",
    );
    for times in 1..=4 {
        assert_eq!(gw.get("/mem").status, 500);
        assert_eq!(gw.log().matches(TOO_MUCH).count(), times);
        assert!(memory_bytes(&gw) < 64 << 20, "{}", memory_bytes(&gw));
        all_served(&gw, "/busy", 4);
    }
    assert_eq!(gw.log().matches(TOO_MUCH).count(), 4);
    assert!(!gw.log().contains(REPLACED));
}

/// Keeps so many megabytes, and counts its requests.
fn keeper(mb: usize) -> String {
    format!(
        "local _M = {{ version = 0.1, priority = 1, name = 'acme-mem', schema = {{ type = 'object' }} }}
        local kept, count = {{}}, 0
        for i = 1, {mb} * 1024 do kept[i] = ('x'):rep(1000) .. i end
        function _M.access() count = count + 1 return 200, tostring(count) end
        return _M"
    )
}

#[test]
fn what_is_live_below_the_limit_costs_nobody() {
    let (gw, _up) = gateway(128, &keeper(90));
    for _ in 0..5 {
        all_served(&gw, "/busy", 8);
        all_served(&gw, "/mem", 60);
    }
    assert!(memory_bytes(&gw) < 160 << 20, "{}", memory_bytes(&gw));
    // Looked at every 256 requests: the VM, and what its plugins keep, is the first one.
    assert_eq!(gw.get("/mem").text(), "301");
    assert!(!gw.log().contains(REPLACED) && !gw.log().contains(TOO_MUCH));
}

#[test]
fn what_is_live_above_the_limit_is_replaced() {
    let (gw, _up) = gateway(
        128,
        "local _M = { version = 0.1, priority = 1, name = 'acme-mem', schema = { type = 'object' } }
        local kept = {}
        function _M.access() kept[#kept + 1] = ('x'):rep(1024 * 1024) .. #kept return 200, tostring(#kept) end
        return _M",
    );
    all_served(&gw, "/mem", 255);
    assert!(!gw.log().contains(REPLACED));
    all_served(&gw, "/mem", 1);
    gw.expect_log("the plugin VM holds more than lua.limits.memory_mb (128): it is replaced");
    assert_eq!(gw.get("/mem").text(), "1");
}
