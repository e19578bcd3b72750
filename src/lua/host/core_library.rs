//! Tests of `apisix.core` and `apisix.utils` from the script's side: known answers, bounds, and what they refuse.

use super::tests::{check, fails};

/// Runs each expression after `head`, and compares what its values look like.
#[track_caller]
fn table(head: &str, cases: &[(&str, &str)]) {
    for (expression, expected) in cases {
        check(
            &format!(
                "local core = require('apisix.core')
                 local function show(...)
                     local parts = {{}}
                     for i = 1, select('#', ...) do parts[i] = tostring((select(i, ...))) end
                     return table.concat(parts, ' ')
                 end
                 {head}
                 return show({expression})"
            ),
            expected,
        );
    }
}

#[test]
fn json_is_apisix_s() {
    table(
        "local json = core.json",
        &[
            ("json.encode({ a = '/x' })", r#"{"a":"/x"}"#),
            ("json.encode(json.decode('{\"a\":[]}'))", r#"{"a":[]}"#),
            ("require('cjson').new().encode({ '/' })", r#"["/"]"#),
            ("json.decode('{\"a\":null}').a == json.null", "true"),
            ("json.decode('{\"a\":null,\"b\":{\"c\":null}}', { null_as_nil = true }).b.c", "nil"),
            ("json.decode('null', { null_as_nil = true })", "nil nil"),
            ("json.decode('{')", "nil Expected object key string but found T_END at character 2"),
            ("json.stably_encode({ b = 1, a = { 1, { d = 2, c = '/' } } })", r#"{"a":[1,{"c":"/","d":2}],"b":1}"#),
            ("json.stably_encode({ [1] = 'x', a = 2 })", r#"{"1":"x","a":2}"#),
            (
                "(function() local t = {} t.t = t return (json.encode(t, true):gsub('0x%x+', '')) end)()",
                r#"{"t":{"t":"table: "}}"#,
            ),
            ("(json.encode({ f = print }, true):gsub(': .*', ''))", r#"{"f":"function"#),
            ("show(json.delay_encode({ a = 1 }), json.delay_encode({ b = 2 }))", r#"{"a":1} {"b":2}"#),
        ],
    );
    table("local t = {} t.t = t", &[("core.json.stably_encode(t)", "nil Cannot serialise, excessive depth (1001)")]);
    table(
        "local f = core.json.stably_encode",
        &[("select(1, f({ print }))", "nil Cannot serialise function: type not supported")],
    );
}

#[test]
fn as_many_delayed_values_live_as_are_said() {
    table(
        "local first = core.json.delay_encode({ n = 1 })
         for n = 2, 16 do core.json.delay_encode({ n = n }) end
         local before = tostring(first)
         core.json.delay_encode({ n = 17 })",
        &[("before, first", r#"{"n":1} {"n":17}"#)],
    );
}

#[test]
fn tables_are_merged_patched_and_copied() {
    table(
        "local t, json = core.table, core.json.stably_encode",
        &[
            (
                "t.set_eq({ a = 1 }, { a = 2 }), t.set_eq({ a = 1 }, { a = 1, b = 1 }), t.set_eq({}, {})",
                "true false true",
            ),
            (
                "json(t.merge({ a = { b = 1, c = 2 }, l = { 1, 2 } }, { a = { b = 3, c = ngx.null }, l = { 9 } }))",
                r#"{"a":{"b":3},"l":[9]}"#,
            ),
            ("json(select(3, t.patch({ a = { b = 1 } }, 'a/b', { 5 })))", r#"{"a":{"b":[5]}}"#),
            ("json(select(3, t.patch({}, 'a/b', 1)))", r#"{"a":{"b":1}}"#),
            ("t.patch({ a = 1 }, 'a/b/c', 1)", "400 invalid sub-path: /a"),
            ("t.try_read_attr({ a = { b = 1 } }, 'a', 'b'), t.try_read_attr({ a = 1 }, 'a', 'b')", "1 nil"),
            (
                "(function()
                     local v = { plugins = { p = {} }, plugins2 = { p = {} } }
                     local c = t.deepcopy(v, { shallow_prefix = 'self.plugins' })
                     return show(c.plugins == v.plugins, c.plugins.p == v.plugins.p, c.plugins2.p == v.plugins2.p)
                 end)()",
                "false true false",
            ),
        ],
    );
}

#[test]
fn small_helpers_answer() {
    table(
        "local utils, time = core.utils, core.config_util.parse_time_unit",
        &[
            ("utils.parse_addr('[::1]:80')", "[::1] 80"),
            ("utils.parse_addr('::1')", "::1 nil"),
            ("utils.resolve_var('a\\\\$b ${c??d} $e', { e = 'f' })", "a\\$b d f nil 1"),
            ("utils.resolve_var_with_captures('$1-${2}-$9-${1', { 'x', '${1}' })", "x-${1}--${1 nil 2"),
            (
                "utils.validate_header_field('X-A'), utils.validate_header_field('a:b'), utils.validate_header_field('a b')",
                "true false false",
            ),
            (
                "type(utils.get_seed_from_urandom()), utils.get_seed_from_urandom() == utils.get_seed_from_urandom()",
                "number false",
            ),
            ("time('1h  30m'), time('1h110'), time(5)", "5400 3710 5"),
            ("time('1m1h')", "nil unexpected unit: h"),
            ("time('1s1')", "nil specific unit conflicts with the default unit second"),
            ("time('-1')", "nil invalid data: -"),
            ("time('')", "nil invalid data: "),
            (
                "core.response.get_last_upstream_token('-, 0.002 : 0.5'), core.response.get_last_upstream_token('')",
                "0.5 nil",
            ),
            ("core.env.fetch_by_uri(1)", "nil error env_uri type: number"),
            ("core.env.fetch_by_uri('env://A')", "nil error env_uri prefix: env://A"),
            ("require('apisix.secret').fetch_by_uri('secret://')", "nil error secret_uri prefix: secret://"),
            ("require('apisix.secret').fetch_by_uri('$secret://')", "nil error format: no secret manager"),
            ("require('apisix.secret').fetch_by_uri('$secret://vault/2/')", "nil error format: no secret key id"),
            (
                "require('apisix.secret').has_secret_ref({ a = { '$ENV://X' } }), require('apisix.secret').has_secret_ref({ 'x' })",
                "true false",
            ),
        ],
    );
}

#[test]
fn fields_are_encrypted_as_apisix_stores_them() {
    // The text is OpenSSL's: `printf hello | openssl enc -aes-128-cbc -K … -iv … -base64`.
    let head = "local de = core.data_encryption
        local old, new = de.init_iv_tbl('qeddd145sfvddff3'), de.init_iv_tbl({ ('k'):rep(32), 'qeddd145sfvddff3' })";
    table(
        head,
        &[
            ("de.aes_cbc_encrypt(old, 'hello'), #new", "RdO7hElVO+FhS5u1spmKUQ== 2"),
            ("de.aes_cbc_decrypt(new, de.aes_cbc_encrypt(old, 'hello'))", "hello"),
            (
                "de.aes_cbc_decrypt(old, de.aes_cbc_encrypt(new, 'hello'))",
                "nil decrypt failed: no key of the keyring fits",
            ),
            ("de.aes_cbc_decrypt(old, '?')", "nil base64 decode failed"),
            ("#de.init_iv_tbl({ 'short' })", "0"),
        ],
    );
    let plugin = "local plugin, conf = require('apisix.plugin'), { a = { { k = 'x' }, { k = 'y' } }, l = { 'p', 'q' } }
        local function f(text) if text == 'q' then return nil, 'no' end return '<' .. text .. '>' end
        plugin.process_encrypt_field(conf, 'a.k', f, 'test', 'encrypt')
        plugin.process_encrypt_field(conf, 'l', f, 'test', 'encrypt')
        plugin.process_encrypt_field(conf, 'none.k', f, 'test', 'encrypt')";
    table(plugin, &[("conf.a[1].k, conf.a[2].k, conf.l[1], conf.l[2]", "<x> <y> <p> q")]);
}

#[test]
fn a_cache_keeps_failures_and_releases_what_goes() {
    table(
        "local made, gone = 0, {}
         local cache = core.lrucache.new({ ttl = 60, count = 2, neg_ttl = 60, release = function(v) gone[#gone + 1] = v end })
         local function make(v) made = made + 1 return v, 'none' end
         cache('k', 1, make, 'a') cache('k', 1, make, 'b') cache('k', 2, make, 'c')
         local first = show(cache('f', 1, make, nil))
         cache('f', 1, make, nil)",
        &[("made, table.concat(gone), cache('k', 2, make), first", "3 a c nil none")],
    );
    fails(
        "require('apisix.core').lrucache.new({ serial_creating = true })('k', 1, function() error('no luck', 0) end)",
        "no luck",
    );
}

#[test]
fn lines_of_syslog_and_logs_without_credentials() {
    let syslog = "local line = require('apisix.utils.rfc5424').encode
        local function cut(s) return (s:gsub('%d+-%d+-%d+T%d+:%d+:%d+%.%d+Z', 'NOW')) end";
    table(
        syslog,
        &[
            (
                "cut(line('SYSLOG', 'INFO', 'h', 'a', 1, 'm', { { name = 'p', value = 'x\"]\\\\' } }))",
                r#"<46>1 NOW h a 1 - [logservice p="x\"\]\\"] m"#,
            ),
            ("cut(line('USER', 'ERR', nil, nil, nil, 'm'))", "<11>1 NOW - - - - - m"),
        ],
    );
    fails("require('apisix.utils.rfc5424').encode('NONE', 'INFO')", "unknown facility NONE");
    table(
        "local redact = require('apisix.utils.log-sanitize').redact_params
         local params = { host = 'h', headers = { Authorization = 'b', ['X-Api-Key'] = 'k', Accept = 'a' } }
         local out = redact(params)",
        &[
            (
                "out.headers.Authorization, out.headers['X-Api-Key'], out.headers.Accept, out.host",
                "[REDACTED] [REDACTED] a h",
            ),
            ("params.headers.Authorization", "b"),
        ],
    );
}

#[test]
fn balancers_pick_what_was_not_tried() {
    table(
        "local balancer = require('apisix.balancer')
         local function ctx_of(kind, key)
             return { var = { remote_addr = '10.0.0.1' }, upstream_key = kind .. (key or ''), upstream_version = 1, upstream_conf = {
                 type = kind, key = 'remote_addr', nodes = {
                     { host = 'a', port = 1, weight = 1 }, { host = 'b', port = 1, weight = 1 },
                     { host = 'low', port = 1, weight = 1, priority = -1 } } } }
         end
         local function tries(kind)
             local ctx, out = ctx_of(kind), {}
             for _ = 1, 2 do out[#out + 1] = balancer.pick_server(nil, ctx).host end
             table.sort(out)
             out[3] = balancer.pick_server(nil, ctx).host
             local server, err = balancer.pick_server(nil, ctx)
             return table.concat(out, ' ') .. ' ' .. tostring(server) .. ' ' .. err
         end
         local all = 'failed to find valid upstream server, all servers tried'",
        &[
            ("tries('roundrobin')", "a b low nil failed to find valid upstream server, all servers tried"),
            ("tries('chash')", "a b low nil failed to find valid upstream server, all servers tried"),
            ("tries('least_conn')", "a b low nil failed to find valid upstream server, all servers tried"),
            ("tries('ewma')", "a b low nil failed to find valid upstream server, all servers tried"),
            ("balancer.pick_server(nil, ctx_of('nobody'))", "nil failed to fetch server picker: invalid balancer type: nobody"),
            ("balancer.pick_server(nil, ctx_of('../x'))", "nil failed to fetch server picker: invalid balancer type: ../x"),
        ],
    );
    // The servers that the gateway's own ring has for these keys.
    table(
        "local chash = require('apisix.balancer.chash')
         local picker = chash.new({ ['127.0.0.1:1980'] = 1, ['127.0.0.1:1981'] = 1 }, { key = 'arg_key' })
         local function of(key) return (picker.get({ var = { arg_key = key } })) end",
        &[
            ("of('jack')", "127.0.0.1:1981"),
            ("of('tom')", "127.0.0.1:1980"),
            ("of('127.0.0.1')", "127.0.0.1:1980"),
            ("of('cuscookie')", "127.0.0.1:1981"),
        ],
    );
    fails(
        "require('apisix.balancer').run()",
        "the gateway balances what it forwards; choose an upstream with apisix.upstream in rewrite or access",
    );
}
