//! Tests of the libraries that are packed, from the script's side: known answers, and what they refuse.

use super::tests::{check, fails};
use crate::lua::{Vm, VmConfig, vm::Purpose};

const RSA_KEY: &str = include_str!("testdata/rsa.pem");
const RSA_ENCRYPTED: &str = include_str!("testdata/rsa_encrypted.pem");
const CERTIFICATE: &str = include_str!("testdata/rsa.crt");
/// RSASSA-PKCS1-v1_5 with SHA-256 of `text`, by OpenSSL.
const SIGNATURE: &str = include_str!("testdata/rsa.sig");

/// Runs each expression after the same first lines and compares what `show` makes of its values.
#[track_caller]
fn table(head: &str, cases: &[(&str, &str)]) {
    for (expression, expected) in cases {
        check(
            &format!(
                "local function show(...)
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
fn the_core_of_openresty_is_there() {
    table(
        "local base = require('resty.core.base')",
        &[
            ("require('resty.core').version", "0.1.28"),
            ("type(base.new_tab(1, 1)), type(base.clear_tab), base.FFI_OK, base.FFI_DECLINED", "table function 0 -5"),
            ("base.get_string_buf_size(), require('ffi').sizeof(base.get_string_buf(8000))", "4096 8000"),
            ("base.get_string_buf(10) == base.get_string_buf(20)", "true"),
            ("require('resty.core.utils').str_replace_char('a-b-c', '-', '_')", "a_b_c"),
            (
                "require('ngx.base64').encode_base64url('\\251\\255'), require('ngx.base64').decode_base64url('-_8')",
                "-_8 \u{fffd}\u{fffd}",
            ),
            ("table.concat(require('ngx.re').split('a,b;c', '[,;]'), '|')", "a|b|c"),
            (
                "require('table.nkeys')({1, a = 2}), require('table.isempty')({}), require('table.isarray')({1})",
                "2 true true",
            ),
            ("require('table.clone')({a = 1}).a, require('resty.lrucache.pureffi').new(2) ~= nil", "1 true"),
            ("(function() local d = require('thread.exdata') d(5) return d() end)()", "5"),
        ],
    );
    for part in [
        "regex", "shdict", "request", "response", "uri", "time", "base64", "hash", "var", "ctx", "misc", "exit",
        "phase", "worker",
    ] {
        check(&format!("return type(require('resty.core.{part}'))"), "table");
    }
}

#[test]
fn ngx_ssl_reads_certificates_and_keys() {
    table(
        &format!("local ssl, key, certificate = require('ngx.ssl'), [[{RSA_KEY}]], [[{CERTIFICATE}]]"),
        &[
            ("#ssl.cert_pem_to_der(certificate .. certificate) == 2 * #ssl.cert_pem_to_der(certificate)", "true"),
            (
                "type(ssl.parse_der_cert(ssl.cert_pem_to_der(certificate))), type(ssl.parse_pem_cert(certificate .. certificate)),
                    type(ssl.parse_pem_priv_key(key)), type(ssl.parse_der_priv_key(ssl.priv_key_pem_to_der(key)))",
                "userdata userdata userdata userdata",
            ),
            ("ssl.priv_key_pem_to_der(certificate)", "nil PEM_read_bio_PrivateKey() failed"),
            ("ssl.parse_der_cert(ssl.cert_pem_to_der(certificate) .. 'x')", "nil d2i_X509_bio() failed"),
            ("ssl.parse_pem_cert('no')", "nil PEM_read_bio_X509_AUX() failed"),
            ("ssl.parse_pem_priv_key(certificate)", "nil PEM_read_bio_PrivateKey() failed"),
            ("ssl.parse_der_priv_key(ssl.cert_pem_to_der(certificate))", "nil d2i_PrivateKey_bio() failed"),
            ("pcall(ssl.parse_pem_cert, 5)", "false bad argument #1 (string expected, got number)"),
            ("pcall(ssl.set_cert)", "false API disabled in the context of init_worker_by_lua*"),
        ],
    );
    table(
        &format!("local ssl, text = require('ngx.ssl'), [[{RSA_ENCRYPTED}]]"),
        &[
            ("ssl.priv_key_pem_to_der(text)", "nil PEM_read_bio_PrivateKey() failed"),
            ("ssl.priv_key_pem_to_der(text, 'wrong')", "nil PEM_read_bio_PrivateKey() failed"),
            ("type(ssl.parse_der_priv_key(ssl.priv_key_pem_to_der(text, 'secret')))", "userdata"),
            ("type(ssl.parse_pem_priv_key(text, 'secret'))", "userdata"),
        ],
    );
}

/// What the connection's side answers comes through as it is. The rest of the module is in t/libraries/ocsp.rs.
#[test]
fn ngx_ocsp_hands_a_response_to_the_connection() {
    check(
        "local native = require('moongate.native')
         native.ssl.set_ocsp = function(response) return true, 'no status req to ' .. response end
         local ok, warning = require('ngx.ocsp').set_ocsp_status_resp('staple')
         return tostring(ok) .. ' ' .. warning",
        "true no status req to staple",
    );
}

#[test]
fn cookies_end_at_semicolons_only() {
    use super::tests::serve;
    serve(
        |x| x.request.headers.append("cookie", "a=1,2; b=\"q\";c"),
        "local c = require('resty.cookie'):new() return c:get('a') .. '|' .. c:get('b') .. '|' .. tostring(c:get('d'))",
        "1,2|q|nil",
    );
}

#[test]
fn sha224_is_the_one_of_fips_180() {
    table(
        "local hex = require('resty.string').to_hex local c = require('moongate.native').crypto
         local h = require('resty.sha224'):new() h:update('a') h:update('bc')",
        &[
            ("hex(h:final())", "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            // RFC 4231, 4.3 and 4.7.
            (
                "hex(c.hmac('sha224', 'Jefe', 'what do ya want for nothing?'))",
                "a30e01098bc6dbbf45690f3a7e9e6d0f8bbea2a39e6148008fd05e44",
            ),
            (
                "hex(c.hmac('sha224', ('\\170'):rep(131), 'Test Using Larger Than Block-Size Key - Hash Key First'))",
                "95e9a0db962095adaebe9b2d6f0dbce2d499f112f2d2b7273fa6870e",
            ),
        ],
    );
}

/// NIST SP 800-38A, F.2 to F.5: the first block of each.
#[test]
fn aes_modes_are_the_ones_of_nist() {
    let head = "local c, hex = require('moongate.native').crypto, require('resty.string').to_hex
        local key, text = c.unhex('2b7e151628aed2a6abf7158809cf4f3c'), c.unhex('6bc1bee22e409f96e93d7e117393172a')
        local iv, counter = c.unhex('000102030405060708090a0b0c0d0e0f'), c.unhex('f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff')
        local function both(mode, iv)
            local made = c.aes(true, mode, key, iv, text, false)
            return hex(made), c.aes(false, mode, key, iv, made, false) == text
        end";
    table(
        head,
        &[
            ("both('cbc', iv)", "7649abac8119b246cee98e9b12e9197d true"),
            ("both('cfb128', iv)", "3b3fd92eb72dad20333449f8e83cfb4a true"),
            ("both('cfb8', iv)", "3b79424c9c0dd436bace9e0ed4586a4f true"),
            ("both('ofb', iv)", "3b3fd92eb72dad20333449f8e83cfb4a true"),
            ("both('ctr', counter)", "874d6191b620e3261bef6864990db6ce true"),
            ("c.aes(true, 'ctr', key, 'short', text)", "nil failed to encrypt"),
            ("c.aes(true, 'xts', key, iv, text)", "nil unsupported cipher"),
        ],
    );
}

#[test]
fn rsa_keys_work_with_those_of_openssl() {
    let head = format!(
        "local rsa = require('resty.rsa') local key, certificate = [[{RSA_KEY}]], [[{CERTIFICATE}]]
         local signature = ngx.decode_base64('{SIGNATURE}')
         local signer = assert(rsa:new({{private_key = key, algorithm = 'SHA256'}}))
         local verifier = assert(rsa:new({{public_key = certificate, algorithm = 'SHA256'}}))
         local function pair(options)
             options.public_key = certificate
             local public = assert(rsa:new(options))
             options.public_key, options.private_key = nil, key
             return public, assert(rsa:new(options))
         end
         local function round(options, text)
             local public, private = pair(options)
             local bytes, err = public:encrypt(text)
             if not bytes then return nil, err end
             return private:decrypt(bytes)
         end"
    );
    table(
        &head,
        &[
            ("signer:sign('text') == signature, verifier:verify('text', signature)", "true true"),
            ("verifier:verify('texu', signature)", "false verify failed"),
            ("verifier:verify('text', 'short')", "false verify failed"),
            ("round({}, 'a')", "a"),
            ("round({padding = rsa.PADDING.RSA_PKCS1_OAEP_PADDING}, 'b')", "b"),
            ("round({padding = 4, algorithm = 'SHA512'}, 'c')", "c"),
            ("round({}, ('x'):rep(246))", "nil failed to encrypt: the text is too long for the key"),
            ("(select(2, pair({}))):decrypt('no such bytes')", "nil failed to decrypt"),
            ("(pair({})):decrypt('x')", "nil not inited for decrypt"),
            ("(select(2, pair({}))):encrypt('x')", "nil not inited for encrypt"),
            ("(select(2, pair({}))):sign('x')", "nil not inited for sign"),
            ("(pair({})):verify('x', 'y')", "nil not inited for verify"),
            ("rsa:new({public_key = 'no key'})", "nil failed to load the key"),
            ("rsa:new({private_key = certificate})", "nil not a private key"),
            ("rsa:new({public_key = certificate, padding = 3})", "nil unsupported padding"),
            ("rsa:new({})", "nil public_key or private_key is required"),
        ],
    );
    let head = format!("local rsa, text = require('resty.rsa'), [[{RSA_ENCRYPTED}]]");
    table(
        &head,
        &[
            ("rsa:new({private_key = text, password = 'secret'}) ~= nil", "true"),
            ("rsa:new({private_key = text, password = 'wrong'})", "nil failed to decrypt the key"),
            ("rsa:new({private_key = text})", "nil the key needs a password"),
        ],
    );
}

/// RFC 7515, A.1.
const JOSE: &str = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFt\
    cGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";

#[test]
fn tokens_are_verified_and_refused() {
    let head = format!(
        "local jwt, is = require('resty.jwt'), require('resty.jwt-validators') local jose = '{JOSE}'
         local key = require('ngx.base64').decode_base64url('AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow')
         local token = jwt:sign('k', {{header = {{typ = 'JWT', alg = 'HS256', kid = 'one'}}, payload = {{sub = 'x', n = 5, roles = {{'a', 'b'}}}}}})
         local function reason(...) local o = jwt:verify(...) return o.verified, o.reason end"
    );
    let good = "true everything is awesome~ :p";
    table(
        &head,
        &[
            ("reason(key, jose)", "false 'exp' claim expired at Tue, 22 Mar 2011 18:43:00 GMT"),
            ("reason(key, jose, {iss = is.equals('joe')})", good),
            ("reason(key, jose, {lifetime_grace_period = 1e9})", good),
            ("reason('other', jose, {})", "false signature mismatch: dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
            ("reason(function(kid) return kid == 'one' and 'k' end, token)", good),
            ("reason(function() end, token)", "false no secret for kid one"),
            ("reason('k', token, {sub = is.equals('y')})", "false Claim 'sub' ('x') returned failure"),
            (
                "reason('k', token, {sub = is.matches('^x$'), n = is.greater_than(4), roles = is.contains_any_of({'b'})})",
                good,
            ),
            ("reason('k', token, {aud = is.required()})", "false 'aud' claim is required."),
            ("reason('k', token, {aud = is.opt_equals('y')})", good),
            (
                "reason('k', token, {__jwt = is.require_one_of({'aud', 'azp'})})",
                "false Missing one of claims - [ aud, azp ].",
            ),
            (
                "reason('k', token, {sub = is.is_not_expired()})",
                "false 'sub' is malformed.  Expected to be a positive numeric value.",
            ),
            (
                "reason('k', token, {n = is.chain(is.required(), is.less_than(5))})",
                "false Claim 'n' ('5') returned failure",
            ),
            ("reason('k', token, {require_exp_claim = true})", "false 'exp' claim is required."),
            ("reason('k', 'a.b')", "false invalid jwt string"),
            ("reason('k', 'e30.e30.')", "false unsupported alg: nil"),
            ("reason('k', 'eyJhbGciOiJub25lIn0.e30.')", "false unsupported alg: none"),
            ("jwt:load_jwt(token).payload.sub, jwt:load_jwt(token).verified, jwt:load_jwt('').valid", "x false false"),
            (
                "(function() local j = jwt.new() j:set_alg_whitelist({RS256 = 1}) return j:verify('k', token).reason end)()",
                "whitelist unsupported alg: HS256",
            ),
            (
                "select(2, pcall(jwt.sign, jwt, 'k', {header = {alg = 'none'}, payload = {}})).reason",
                "unsupported alg: none",
            ),
        ],
    );
    let head = format!(
        "local jwt, key, certificate = require('resty.jwt'), [[{RSA_KEY}]], [[{CERTIFICATE}]]
         local function sealed(header, secret, other)
             local o = jwt:verify(other or secret, jwt:sign(secret, {{header = header, payload = {{a = 'in'}}}}))
             return o.verified, o.payload and o.payload.a
         end"
    );
    table(
        &head,
        &[
            ("sealed({alg = 'RS256'}, key, certificate)", "true in"),
            ("sealed({alg = 'PS512'}, key, certificate)", "true in"),
            ("sealed({alg = 'dir', enc = 'A128CBC-HS256'}, ('k'):rep(32))", "true in"),
            ("sealed({alg = 'dir', enc = 'A256CBC-HS512'}, ('k'):rep(64), ('z'):rep(64))", "false nil"),
            ("sealed({alg = 'RSA-OAEP-256', enc = 'A192CBC-HS384'}, certificate, key)", "true in"),
            // The public key must not serve as the secret of HS256.
            (
                "(function() local t = jwt:sign(certificate, {header = {alg = 'HS256'}, payload = {}}) return jwt:verify(certificate, t).reason end)()",
                "a public key is no secret of HS256",
            ),
        ],
    );
}

#[test]
fn balancers_share_by_weight() {
    table(
        "local function turns(name, nodes, n)
             local b, r = require(name):new(nodes), {}
             for i = 1, n do r[i] = b:find() end
             return table.concat(r)
         end
         local c = require('resty.chash'):new({a = 1, b = 2, c = 1}) local count = {a = 0, b = 0, c = 0}
         for i = 1, 4000 do local id = c:find('key' .. i) count[id] = count[id] + 1 end",
        &[
            ("turns('resty.swrr', {a = 5, b = 1, c = 1}, 7)", "aabacaa"),
            ("turns('resty.roundrobin', {a = 2, b = 1}, 6)", "abaaba"),
            ("require('resty.roundrobin'):new({a = 0}):find()", "nil"),
            ("count.b > 1600 and count.b < 2400, count.a > 700, count.c > 700", "true true true"),
            ("c:find('x') == c:find('x'), require('resty.chash'):new({}):find('x')", "true nil"),
            (
                "(function() local nginx = require('resty.chash'):new({['127.0.0.1\\0001980'] = 1, ['127.0.0.1\\0001981'] = 1})
                  local out = '' for _, key in ipairs({'jack', 'tom', '127.0.0.1', 'cuscookie'}) do
                     out = out .. nginx:find(key):sub(-1) end return out end)()",
                "1001",
            ),
            // Who goes takes nobody else's keys along.
            (
                "(function()
                     local moved = 0
                     local less = require('resty.chash'):new({a = 1, b = 2})
                     for i = 1, 1000 do
                         local before = c:find(i)
                         if before ~= 'c' and before ~= less:find(i) then moved = moved + 1 end
                     end
                     return moved
                 end)()",
                "0",
            ),
            (
                "(function() local id, at = c:find('k') for _ = 1, 640 do id, at = c:next(at) end return at == select(2, c:find('k')) end)()",
                "true",
            ),
            ("(function() c:delete('b') c:set('a', 0) return (c:find('x')) end)()", "c"),
            (
                "(function() local n = {a = 1} local r = require('resty.roundrobin'):new(n) r:incr('b') r:decr('a') return r:find(), n.a end)()",
                "b 1",
            ),
            (
                "pcall(require('resty.chash').new, nil, {a = 'x'})",
                "false the weight of a must be a whole number from 0",
            ),
        ],
    );
}

#[test]
fn limiters_combine() {
    crate::shdict::store().declare("bundled-limits", 1 << 20);
    table(
        "local traffic, count = require('resty.limit.traffic'), require('resty.limit.count')
         local one, two = count.new('bundled-limits', 5, 60), count.new('bundled-limits', 2, 60)",
        &[
            (
                "(function() local s = {} local d = traffic.combine({one, two}, {'a', 'b'}, s) return d, s[1], s[2] end)()",
                "0 4 1",
            ),
            ("traffic.combine({one, two}, {'a', 'b'})", "0"),
            ("traffic.combine({one, two}, {'a', 'b'})", "nil rejected"),
            // The refused one did not count for the other.
            ("select(2, one:incoming('a', false))", "2"),
        ],
    );
}

#[test]
fn templates_are_filled() {
    let head =
        "local t = require('resty.template') local function go(view, context) return t.process(view, context) end";
    table(
        head,
        &[
            ("go('{{a}} {*a*}{# no #}', {a = '<b>\"&\\''})", "&lt;b&gt;&quot;&amp;&#39; <b>\"&'"),
            ("go('{% for i = 1, 2 do %}\\n{*i*},\\n{% end %}\\nend', {})", "1,\n2,\nend"),
            ("go('{-raw-}{{a}}{-raw-} \\\\{{a}} { a } {{a', {a = 1})", "{{a}} {{a}} { a } {{a"),
            ("go('{-side-}<{{a}}>{-side-}main {*blocks.side*}', {a = 1})", "main <1>"),
            ("go('{% layout = \"[{*view*}|{*title*}]\" %}body', {title = 'T'})", "[body|T]"),
            ("go('{(\"<{{a}}>\", {a = 2})} {[\"{{a}}\" .. b]}', {a = 1, b = '+'})", "<2> 1+"),
            ("go('{{f()}}{{nothing}}{{null}}', {f = function() return 'F' end, null = ngx.null})", "F"),
            ("t.compile_string('x{{a}}')({a = 1}), select(2, t.compile_string('x{{a}}'))", "x1 true"),
            (
                "(function() local v = t.new('v{{a}}', '({*view*})') v.a = 3 return tostring(v), v:process({a = 4}) end)()",
                "(v3) (v4)",
            ),
            (
                "(function() local f = t.compile('{{a}}{*f and f({a = 2}) or \"\"*}{{a}}') return f({a = 1, f = f}) end)()",
                "1221",
            ),
            ("select('#', require('resty.template.safe').process('{% x( %}', {})), t.escape('{', true)", "2 &#123;"),
            ("pcall(t.load_file, 'no/such/file')", "false no such template: no/such/file"),
        ],
    );
}

#[test]
fn addresses_are_taken_apart_and_put_together() {
    // RFC 3986, 5.4.
    for (reference, expected) in [
        ("g", "http://a/b/c/g"),
        ("./g", "http://a/b/c/g"),
        ("g/", "http://a/b/c/g/"),
        ("/g", "http://a/g"),
        ("//g", "http://g/"),
        ("?y", "http://a/b/c/d;p?y"),
        ("g?y#s", "http://a/b/c/g?y#s"),
        ("", "http://a/b/c/d;p?q"),
        (".", "http://a/b/c/"),
        ("..", "http://a/b/"),
        ("../../g", "http://a/g"),
        ("../../../g", "http://a/g"),
        ("g:h", "g:h"),
    ] {
        check(
            &format!("return tostring(require('net.url').parse('http://a/b/c/d;p?q'):resolve('{reference}'))"),
            expected,
        );
    }
    table(
        "local url = require('net.url') local u = url.parse('http://u:p%40@H.com:80/a b/../c?x=1&y[a]=2&z[]=1&z[]=2#f')",
        &[
            (
                "u.scheme, u.user, u.password, u.host, u.port, u.path, u.query.y.a, u.query.z[2], u.fragment",
                "http u p@ h.com 80 /a%20b/../c 2 2 f",
            ),
            ("u:normalize()", "http://u:p%40@h.com/c?x=1&y[a]=2&z[1]=1&z[2]=2#f"),
            ("url.parse('http://[::1]:8/x').host, url.parse('http://[::1]:8/x').port", "[::1] 8"),
            ("url.parse('http://e.com/x') / 'y z'", "http://e.com/x/y%20z"),
            ("url.parse('HTTP://E.com') == url.parse('http://e.com/')", "true"),
            ("url.buildQuery({a = 'x y', b = {c = 1}})", "a=x%20y&b[c]=1"),
        ],
    );
}

#[test]
fn values_are_shown() {
    table(
        "local inspect = require('inspect') local loop = {} loop.me = loop",
        &[
            ("inspect({1, 'a', x = {true}})", "{ 1, \"a\",\n  x = { true }\n}"),
            ("inspect('a\"b'), inspect('\\n\\0001')", "'a\"b' \"\\n\\0001\""),
            ("inspect(loop)", "<1>{\n  me = <table 1>\n}"),
            ("inspect({{{}}}, {depth = 1})", "{ {...} }"),
            ("inspect({['a b'] = 1, [1.5] = 2}, {newline = '', indent = ''})", "{[1.5] = 2,[\"a b\"] = 1}"),
            (
                "inspect({a = 1, b = 2}, {newline = '', indent = '', process = function(v) if v ~= 2 then return v end end})",
                "{a = 1}",
            ),
        ],
    );
}

#[test]
fn yaml_is_read_and_written() {
    table(
        "local y = require('lyaml')",
        &[
            ("y.load('a: [x, ~, 1.5]').a[1], y.load('a: [x, ~]').a[2] == y.null, y.isnull(y.null)", "x true true"),
            ("y.load('a: &r {d: 1}\\ne: {<<: *r, f: 2}').e.d, y.load('1: one')[1]", "1 one"),
            ("#y.load('a\\n---\\nb\\n', {all = true}), y.load('')", "2 nil"),
            ("y.dump({{a = 1, b = {'x', true}}, 's'})", "---\na: 1\nb:\n- x\n- true\n--- s\n...\n"),
            ("pcall(y.load, ('['):rep(1000))", "false recursion limit exceeded at line 1 column 129"),
            ("(pcall(y.load, 'a: ['))", "false"),
            ("(pcall(y.dump, {function() end}))", "false"),
            // An alias inside of its anchor's like again and again.
            (
                "(pcall(y.load, 'a: &a [x,x,x,x,x,x,x,x,x]\\n' .. ('b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\\n') .. 'c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\\nf: [*e,*e,*e,*e,*e,*e,*e,*e,*e]'))",
                "false",
            ),
        ],
    );
}

#[test]
fn messages_are_encoded_as_the_format_says() {
    let head = "local pb, protoc = require('pb'), require('protoc')
        assert(protoc:load([[syntax = 'proto3'; package t;
            enum Kind { A = 0; B = 5; }
            message Phone { string number = 1; int64 n = 2; }
            message Person { string name = 1; repeated Phone phones = 2; map<string, int32> m = 3; Kind kind = 4; bytes raw = 5;
                oneof o { int32 x = 6; string y = 7; } repeated int32 nums = 8; }]], 't.proto'))
        assert(protoc:load([[syntax = 'proto2'; import 't.proto'; message Test1 { optional int32 a = 1; }
            message Test2 { optional string b = 2; } message Test4 { repeated int32 e = 6 [packed = true]; optional int32 f = 7 [default = 41]; }
            message Test5 { optional t.Phone p = 1; }]], 'doc.proto'))
        local function hex(name, value) return pb.tohex(pb.encode(name, value)) end
        local function back(value) return pb.decode('t.Person', pb.encode('.t.Person', value)) end";
    table(
        head,
        &[
            // The examples of protobuf.dev's page on the encoding.
            ("hex('Test1', {a = 150})", "08 96 01"),
            ("hex('Test2', {b = 'testing'})", "12 07 74 65 73 74 69 6E 67"),
            ("hex('Test4', {e = {3, 270, 86942}})", "32 06 03 8E 02 9E A7 05"),
            (
                "pb.decode('Test1', pb.fromhex('089601')).a, pb.decode('Test4', '').f, pb.defaults('Test4').f",
                "150 nil 41",
            ),
            (
                "back({phones = {{number = '1'}}, m = {k = 3}, kind = 'B', y = 'why'}).phones[1].number, back({m = {k = 3}}).m.k",
                "1 3",
            ),
            (
                "back({kind = 'B'}).kind, back({kind = 5}).kind, back({y = 'w'}).x, back({x = 0}).x, back({}).name, #back({}).nums",
                "B B nil 0  0",
            ),
            ("back({raw = '\\255'}).raw == '\\255'", "true"),
            (
                "(function() pb.option('int64_as_string') return pb.decode('t.Phone', pb.encode('t.Phone', {n = '#9007199254740993'})).n end)()",
                "#9007199254740993",
            ),
            ("(function() pb.option('enum_as_value') return back({kind = 'B'}).kind end)()", "5"),
            ("(function() pb.option('no_default_values') return back({}).name end)()", "nil"),
            ("pb.enum('t.Kind', 'B'), pb.enum('t.Kind', 5), pb.enum('t.Kind', 'C'), pb.enum('none', 1)", "5 B nil nil"),
            ("pb.type('t.Person')", ".t.Person Person message"),
            ("pb.field('t.Person', 'phones')", "phones 2 .t.Phone nil repeated nil nil"),
            ("pb.field('t.Person', 6)", "x 6 int32 0 optional o 1"),
            ("(function() local n = 0 for _ in pb.fields('t.Person') do n = n + 1 end return n end)()", "8"),
            (
                "(function() local old = pb.state() local t = pb.type('Test1') pb.state(old) return t, (pb.type('Test1')) end)()",
                "nil .Test1",
            ),
            ("pcall(pb.encode, 'none', {})", "false type 'none' does not exists"),
            ("pcall(pb.encode, 't.Person', {name = {}})", "false string expected for field 'name', got table"),
            ("pcall(pb.encode, 't.Person', {name = '\\255'})", "false field 'name' is not UTF-8"),
            ("pcall(pb.encode, 't.Person', {kind = 'C'})", "false invalid enum value 'C' for field 'kind'"),
            ("(pcall(pb.decode, 't.Person', '\\10\\255'))", "false"),
            ("pb.load('junk') and 1, (pcall(protoc.load, protoc, 'syntax ='))", "false false"),
            ("pcall(protoc.load, protoc, 'import \"none.proto\";')", "false module load error: none.proto"),
            // A file that comes again takes the place of the one before.
            (
                "(function() protoc:load('syntax = \"proto3\"; message N { int32 a = 1; }', 'n.proto') protoc:load('syntax = \"proto3\"; message N { int32 b = 1; }', 'n.proto') return pb.field('N', 1) end)()",
                "b 1 int32 0 optional nil nil",
            ),
        ],
    );
    fails(
        "local protoc, pb = require('protoc'), require('pb')
         protoc:load('syntax = \"proto3\"; message R { R r = 1; }')
         local deep = {} for _ = 1, 200 do deep = {r = deep} end pb.encode('R', deep)",
        "a message is nested too deeply",
    );
}

#[test]
fn texts_by_characters() {
    table(
        "local u = require('lua-utf8')",
        &[
            ("u.len('äöü')", "3"),
            ("u.len('a\\255')", "nil 2"),
            ("u.sub('äöü', 2, 2), u.sub('äöü', -1), u.sub('äöü', 3, 2)", "ö ü "),
            ("u.upper('äß'), u.lower('ÄÖ'), u.reverse('aé'), u.fold('Σς')", "Äß äö éa σσ"),
            ("u.char(228, 8364, 128512), u.codepoint('€')", "ä€😀 8364"),
            ("u.offset('äbc', 3), u.offset('äbc', -2), u.offset('ä', 3)", "4 3 nil"),
            ("u.find('aäöb', 'ö')", "3 3"),
            ("u.find('a.b', '.', 2, true)", "2 2"),
            ("u.match('k=wörd;', '(%w+)=(%w+)')", "k wörd"),
            ("u.match('äöü', '()ö()')", "2 3"),
            ("u.gsub('äöü', '[ö-ü]', 'x')", "äxx 2"),
            ("u.gsub('héllo wörld', '%w+', '<%0>', 1)", "<héllo> wörld 1"),
            ("u.gsub('ab', '', '-')", "-a-b- 3"),
            ("u.gsub('äb', '^ä', {['ä'] = 'q'})", "qb 1"),
            (
                "(function() local r = {} for w in u.gmatch('één twee', '%w+') do r[#r + 1] = w end return table.concat(r, '|') end)()",
                "één|twee",
            ),
            (
                "(function() local r = {} for p, c in u.codes('aé') do r[#r + 1] = p .. ':' .. c end return table.concat(r, ' ') end)()",
                "1:97 2:233",
            ),
            ("u.width('中a'), u.insert('äc', 2, 'b'), u.remove('äbc', 2, 2), u.ncasecmp('Ä', 'ä')", "3 äbc äc 0"),
            ("u.isvalid('\\255'), u.clean('a\\255b', '?')", "false a?b false"),
            ("u.normalize_nfc('e\\204\\129')", "é false"),
            ("u.next('äb', 1)", "3 98"),
            ("u.escape('%u228%x{20ac}')", "ä€"),
            ("(pcall(u.codepoint, '\\255'))", "false"),
            ("(pcall(u.find, 'a', '('))", "false"),
        ],
    );
}

#[test]
fn xml_is_read_and_written() {
    let head = "local xml, tree = require('xml2lua'), require('xmlhandler.tree')
        local function read(text) local h = tree:new() xml.parser(h):parse(text) return h.root end";
    table(
        head,
        &[
            (
                "read('<a><b x=\"1\">t &amp; &#8364;</b><b/></a>').a.b[1][1], read('<a><b x=\"1>\">t</b></a>').a.b._attr.x",
                "t & € 1>",
            ),
            (
                "read('<?xml version=\"1.0\"?><!DOCTYPE a [<!ENTITY e \"x\">]><!-- c --><a>&e;<![CDATA[<]]>]]></a>').a[1]",
                "&e;",
            ),
            ("xml.toXml({a = {_attr = {k = 'v'}, b = {'1', '<'}}})", "<a k=\"v\">\n  <b>1</b>\n  <b>&lt;</b>\n</a>\n"),
            (
                "(function() local d = require('xmlhandler.dom'):new() xml.parser(d):parse('<a><b>t</b></a>') return d.root._name, d.root._children[1]._children[1]._text end)()",
                "a t",
            ),
            ("pcall(read, '<a>\\n<b></a>')", "false XML parse error at line 2"),
            ("pcall(read, '<a')", "false XML parse error at line 1"),
            ("pcall(read, '<a>')", "false XML parse error at line 1"),
            ("pcall(read, ('<a>'):rep(2000))", "false XML is nested too deeply"),
        ],
    );
}

#[test]
fn files_and_directories() {
    let dir = tempfile::tempdir().expect("a directory");
    let head = format!(
        "local lfs, path, dir, file = require('lfs'), require('pl.path'), require('pl.dir'), require('pl.file') local at = '{}'",
        dir.path().display()
    );
    table(
        &head,
        &[
            ("lfs.mkdir(at .. '/x')", "true"),
            ("lfs.mkdir(at .. '/x')", "nil File exists 17"),
            ("lfs.attributes(at .. '/x', 'mode')", "directory nil nil"),
            ("file.write(at .. '/x/f', 'hello'), lfs.attributes(at .. '/x/f').size", "true 5"),
            (
                "lfs.touch(at .. '/x/f', 100, 200), lfs.attributes(at .. '/x/f').access, (lfs.attributes(at .. '/x/f', 'modification'))",
                "true 100 200",
            ),
            (
                "lfs.link('f', at .. '/x/l', true), lfs.symlinkattributes(at .. '/x/l').target, (lfs.attributes(at .. '/x/l', 'mode'))",
                "true f file",
            ),
            (
                "(function() local r = {} for name in lfs.dir(at .. '/x') do r[#r + 1] = name end table.sort(r) return table.concat(r, ' ') end)()",
                ". .. f l",
            ),
            (
                "(function() local h = io.open(at .. '/x/f') local a, b = lfs.lock(h, 'r'), lfs.unlock(h) h:close() return a, b end)()",
                "true true",
            ),
            (
                "(function() local l = lfs.lock_dir(at) local _, err = lfs.lock_dir(at) l:free() return err, lfs.lock_dir(at):free() end)()",
                "File exists true",
            ),
            (
                "lfs.attributes(at .. '/none')",
                &format!(
                    "nil cannot obtain information from file '{}/none': No such file or directory 2",
                    dir.path().display()
                ),
            ),
            ("select(2, pcall(lfs.attributes, at, 'bogus'))", "invalid attribute name 'bogus'"),
            ("lfs.rmdir(at .. '/x')", "nil Directory not empty 39"),
            ("(pcall(lfs.dir, at .. '/none'))", "false"),
            ("dir.makepath(at .. '/x/p/q'), #dir.getallfiles(at), #dir.getfiles(at .. '/x', 'f*')", "true 2 1"),
            (
                "dir.clonetree(at .. '/x', at .. '/y'), file.read(at .. '/y/f'), dir.rmtree(at .. '/x'), path.exists(at .. '/x')",
                "true hello true nil",
            ),
        ],
    );
}

#[test]
fn penlight_does_what_its_manual_says() {
    table(
        "local List, sx, tx, class = require('pl.List'), require('pl.stringx'), require('pl.tablex'), require('pl.class')
         local pretty, path, utils, types = require('pl.pretty'), require('pl.path'), require('pl.utils'), require('pl.types')",
        &[
            ("List{1, 2}:append(3):map('_*2'), List.range(3):reverse(), List{1} .. List{2}, List{1, 2} == List{1, 2}", "{2,4,6} {3,2,1} {1,2} true"),
            ("List{3, 1}:sort():join('-'), List{1, 2, 3}:slice(-2), List{1, 2, 1}:count(1), List.split('a b')", "1-3 {2,3} 2 {a,b}"),
            ("sx.split('a,b,,c', ','):join('|'), sx.strip('--x-', '-'), sx.partition('k=v=w', '=')", "a|b||c x k = v=w"),
            ("sx.startswith('abc', {'x', 'ab'}), sx.center('a', 5, '*'), sx.count('aaa', 'aa'), sx.replace('a.b', '.', '%')", "true **a** 1 a%b"),
            ("sx.shorten('hello world', 8), sx.expandtabs('a\\tb', 4), sx.rfind('abcabc', 'b'), sx.title('ab cD')", "hello... a   b 5 Ab Cd"),
            ("sx.Template('$a ${b}c $$'):substitute({a = 1, b = 2}), (pcall(sx.Template('$x').substitute, nil, {}))", "1 2c $ false"),
            ("tx.deepcompare({a = {1}}, {a = {1}}), tx.find({5, 6}, 6), tx.reduce('+', {1, 2, 3}), tx.size({1, a = 2})", "true 2 6 2"),
            ("pretty.write({1, a = 'x'}, ''), pretty.read('{1, a = {\"x\"}}').a[1]", "{1,a=\"x\"} x"),
            ("pretty.read('{os.exit()}')", "nil cannot have functions in table definition"),
            ("pretty.read('{f\"x\"}')", "nil cannot have functions in table definition"),
            ("path.join('a', '/b', 'c'), path.normpath('/a/./b/../c'), path.relpath('/a/b/c', '/a/d')", "/b/c /a/c ../b/c"),
            ("path.splitext('a/b.tar.gz')", "a/b.tar .gz"),
            ("utils.string_lambda('|x, y| x + y')(1, 2), utils.bind1('+', 5)(3), utils.escape('a.b'), utils.quote_arg('it\\'s')", "3 8 a%.b 'it'\\''s'"),
            ("types.to_bool('yes'), types.is_empty(' ', true), types.is_integer(1.5), types.type(List())", "true true false List"),
            (
                "(function()
                     local A = class() function A:_init(n) self.n = n end function A:get() return self.n end
                     local B = class(A) function B:_init(n) self:super(n + 1) end
                     local b = B(1)
                     return b:get(), b:is_a(A), A:class_of(b), A(1):is_a(B)
                 end)()",
                "2 true true false",
            ),
        ],
    );
}

#[test]
fn openssl_without_openssl() {
    let head = format!(
        "local o = require('resty.openssl').load_modules() local hex = require('resty.string').to_hex
         local key, cert = assert(o.pkey.new([[{RSA_KEY}]])), assert(o.x509.new([[{CERTIFICATE}]]))
         local signature = ngx.decode_base64('{SIGNATURE}')"
    );
    table(
        &head,
        &[
            ("hex(o.digest.new('SHA-256'):final('abc'))", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            ("o.digest.new('no')", "nil digest.new: invalid digest type \"no\""),
            ("hex(o.mac.new('Jefe', 'HMAC', nil, 'md5'):final('what do ya want for nothing?'))", "750c783e6ab0b503eaa86e310a5db738"),
            // RFC 6070 and RFC 5869, A.1.
            ("hex(o.kdf.derive({type = o.kdf.PBKDF2, pass = 'password', salt = 'salt', pbkdf2_iter = 4096, outlen = 20, md = 'sha1'}))", "4b007901b765489abead49d926f721d065a429c1"),
            (
                "(function() local un = require('moongate.native').crypto.unhex
                     return hex(o.kdf.derive({type = o.kdf.HKDF, md = 'sha256', hkdf_key = ('\\11'):rep(22), outlen = 42,
                         salt = un('000102030405060708090a0b0c'), hkdf_info = un('f0f1f2f3f4f5f6f7f8f9')})) end)()",
                "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            ),
            ("o.kdf.derive({type = o.kdf.PBKDF2, pbkdf2_iter = 1e9, outlen = 20})", "nil iterations or length out of range"),
            (
                "(function() local c = o.cipher.new('aes-256-gcm') local k, iv = ('k'):rep(32), ('i'):rep(12)
                     local made = c:encrypt(k, iv, 'text', false, 'aad') local tag = c:get_aead_tag()
                     return #made, c:decrypt(k, iv, made, false, 'aad', tag), c:decrypt(k, iv, made, false, 'other', tag) end)()",
                "4 text nil cipher:final: failed to decrypt",
            ),
            ("o.cipher.new('rc4')", "nil cipher.new: invalid cipher type \"rc4\""),
            ("o.cipher.new('aes-128-cbc'):encrypt('short', '', 'x')", "nil cipher:init: incorrect key size, expect 16"),
            ("key:sign('text', 'sha256') == signature, cert:get_pubkey():verify(signature, 'text', 'sha256')", "true true"),
            ("key:get_key_type().sn, key:get_size(), key:is_private(), cert:get_pubkey():is_private()", "RSA 256 true false"),
            ("key:get_parameters().e, key:tostring('public') == cert:get_pubkey():tostring('public')", "65537 true"),
            ("key:sign('x', 'sha3')", "nil pkey:sign: unsupported digest"),
            ("o.pkey.new('no key')", "nil pkey.new: failed to load the key"),
            ("cert:get_subject_name(), cert:get_issuer_name():find('O').blob, cert:get_serial_number():to_hex()", "O=moongate/CN=test.example moongate 1234"),
            ("cert:get_subject_alt_name(), cert:get_version(), cert:get_not_after() > ngx.time(), cert:verify(key)", "DNS:test.example/IP:127.0.0.1 3 true true"),
            ("o.x509.new(cert:tostring()):digest('sha256') == cert:digest('sha256')", "true"),
            ("o.x509.new('no certificate')", "nil x509.new: failed to load the certificate"),
            ("o.bn.new(4):mod_exp(13, 497), o.bn.mod_inverse(3, 11), o.bn.from_hex('ff') + 1, -o.bn.new(5), o.bn.new(2) ^ 100", "445 4 256 -5 1267650600228229401496703205376"),
            ("o.bn.new(7) > 6, o.bn.new('10', 16) == o.bn.new(16), o.bn.new(258):to_binary(4):byte(3), o.bn.new(9):is_odd()", "true true 1 true"),
            ("(pcall(function() return o.bn.new(1) / 0 end)), (pcall(function() return o.bn.new(2) ^ 1e6 end)), o.bn.new('x')", "false false nil bn: not a number"),
        ],
    );
    for (kind, size) in
        [("type = 'EC', curve = 'prime256v1'", 72), ("type = 'EC', curve = 'secp384r1'", 104), ("type = 'Ed25519'", 64)]
    {
        table(
            &format!(
                "local pkey = require('resty.openssl.pkey') local made = assert(pkey.new({{{kind}}}))
                 local key, public = assert(pkey.new(made:tostring('private', 'DER'))), assert(pkey.new(made:tostring()))
                 local signature = assert(key:sign('text'))"
            ),
            &[
                ("public:verify(signature, 'text'), public:verify(signature, 'texu'), public:is_private()", "true false false"),
                ("public:sign('text')", "nil pkey:sign: only private keys sign"),
                ("key:get_size()", &size.to_string()),
            ],
        );
    }
}

/// What the sandbox of uploaded functions closes is not opened by a library.
#[test]
fn libraries_open_nothing_to_functions() {
    let vm = Vm::new(VmConfig { purpose: Purpose::Functions, ..VmConfig::default() }).expect("a VM");
    let run = |source: &str| -> String {
        let chunk = format!(
            "local made = assert(require('moongate.functions').load('probe', [==[{source}]==]))
             local ok, value = pcall(made)
             return tostring(ok) .. ' ' .. tostring(value)"
        );
        vm.lua.load(&chunk).set_name("=test").eval::<String>().unwrap_or_else(|e| panic!("{source}: {e}"))
    };
    for module in [
        "lfs",
        "resty.shell",
        "resty.signal",
        "pl.path",
        "pl.file",
        "pl.dir",
        "ffi",
        "io",
        "string.buffer",
        "jit.profile",
        "jit.util",
        "moongate.native",
        "moongate.chunk",
    ] {
        let got = run(&format!("return require('{module}')"));
        assert!(got.starts_with("false ") && got.ends_with("is not open to functions"), "{module}: {got}");
    }
    for (source, expected) in [
        ("return require('_G').io", "true nil"),
        ("return require('_G').require == require and require('_G').loadstring == loadstring", "true true"),
        ("require('string').find = function() end return (pcall(require, 'moongate.native'))", "true false"),
        ("string.find, string.byte = nil, nil return (pcall(require, 'moongate.native'))", "true false"),
        ("return getmetatable(require('apisix.core.string')).__index == string", "true true"),
        ("return load('\\27LJ')", "true nil"),
        ("return (pcall(require('apisix.core').ctx.register_var, 'remote_addr', print))", "true false"),
        ("return (pcall(require('apisix.core').event.register, 1, print))", "true false"),
        ("return require('pl.class')().is_a(require('protoc').new())", "true nil"),
        ("return rawequal(require('protoc').new().__index, require('protoc'))", "true false"),
        ("return (pcall(require, 'apisix.plugin'))", "true false"),
        ("return (pcall(require, 'apisix.http.items'))", "true false"),
        ("return (pcall(require, 'apisix.plugins.file-logger'))", "true false"),
        ("return (pcall(require, 'apisix.utils.serverless'))", "true false"),
        ("return require('pl.utils').readfile", "true nil"),
        ("return require('pl.utils').executeex", "true nil"),
        ("return require('pl.compat').execute", "true nil"),
        ("return require('pl.compat').setfenv", "true nil"),
        ("return require('pl.utils').string_lambda('|x| io')(1)", "true nil"),
        ("return require('pl.compat').load('return io')()", "true nil"),
        ("return require('pl.compat').load('\\27LJ')", "true nil"),
        ("return require('resty.template').process('{{io}}{{debug}}{{getfenv}}{{os.execute}}', {})", "true "),
        ("return (pcall(require('resty.template').process, '{% require(\"ffi\") %}', {}))", "true false"),
        ("return (pcall(require('resty.template').load_file, '/etc/passwd'))", "true false"),
        ("return require('resty.template').load('/etc/passwd')", "true /etc/passwd"),
        ("return (pcall(require('pl.utils').import, 'ffi', {}))", "true false"),
        ("return (pcall(require('pl.stringx').import))", "true false"),
        ("return (pcall(require('xml2lua').loadFile, '/etc/passwd'))", "true false"),
        ("return require('pb').loadfile('/etc/passwd')", "true false"),
        (
            "local p = require('protoc').new() p:addpath('/etc') return (pcall(p.load, p, 'import \"passwd\";'))",
            "true false",
        ),
        ("return require('pl.pretty').dump({}, '/tmp/moongate-no')", "true nil"),
        ("return require('resty.core.base').get_string_buf", "true nil"),
        ("require('pl.class').Stray() return Stray", "true nil"),
        ("return require('pl.class')().is_a('text')", "true false"),
        ("return getmetatable(require('pl.tablex').sub('text', 1, 0))", "true nil"),
        ("return getmetatable(require('pl.tablex').filter('text', '_'))", "true nil"),
        // And what they may have works.
        ("return require('resty.template').process('{{a}}', {a = 1})", "true 1"),
        ("return require('pl.stringx').strip(' x ')", "true x"),
        ("return require('inspect')({1})", "true { 1 }"),
    ] {
        assert_eq!(run(source), expected, "{source}");
    }
}

/// Every byte of a good input changed in turn, and every beginning of it: an answer or an error, never a panic.
#[test]
fn damaged_input_never_panics() {
    let head = "local function damaged(text, read)
            local seen = {}
            local function try(bytes)
                local ok, err = pcall(read, bytes)
                if not ok and tostring(err):find('panicked', 1, true) then error(err) end
                seen[ok] = (seen[ok] or 0) + 1
            end
            for i = 1, #text do
                try(text:sub(1, i - 1))
                try(text:sub(1, i - 1) .. string.char((text:byte(i) + 1) % 256) .. text:sub(i + 1))
                try(text:sub(1, i - 1) .. '\\255' .. text:sub(i + 1))
            end
            return (seen[true] or 0) + (seen[false] or 0) == 3 * #text
        end
        local native = require('moongate.native')";
    let certificate = format!("native.x509.parse([[{CERTIFICATE}]]).der");
    let key = format!("native.pkey.export(native.pkey.load([[{CERTIFICATE}]]), false, false, true)");
    let ec = "native.pkey.export(native.pkey.generate('EC', 'secp384r1'), true, false, true)";
    for (input, read) in [
        (certificate.as_str(), "native.x509.parse"),
        (key.as_str(), "native.pkey.load"),
        (ec, "native.pkey.load"),
        ("'a: &x [1, {b: \"c\\\\n\"}, ~]\\nd: *x\\n? [k]\\n: |\\n  text\\n'", "require('lyaml').load"),
        (
            "'<?xml version=\"1.0\"?><a b=\"c\"><!-- d --><e/>&amp;<![CDATA[f]]></a>'",
            "function(t) require('xml2lua').parser(require('xmlhandler.tree'):new()):parse(t) end",
        ),
        (
            "'{{a}}{% if a then %}b{% end %}{-c-}d{-c-}{# e #}'",
            "function(t) return require('resty.template').compile(t, 'no-cache', true) end",
        ),
        ("'http://u:p@h:80/a;b?c[d]=e#f'", "function(t) return tostring(require('net.url').parse(t):normalize()) end"),
        (
            "'aä€😀e\\204\\129'",
            "function(t) local u = require('lua-utf8') return u.len(t), u.upper(t), u.width(t), u.gsub(t, '.', '%0'), u.sub(t, 2, -2) end",
        ),
        (
            "require('resty.jwt'):sign('k', {header = {alg = 'HS256'}, payload = {a = 1}})",
            "function(t) return require('resty.jwt'):verify('k', t) end",
        ),
    ] {
        check(&format!("{head} return tostring(damaged({input}, {read}))"), "true");
    }
    check(
        &format!(
            "{head} local pb, protoc = require('pb'), require('protoc')
             local source = 'syntax = \"proto3\"; message M {{ string a = 1; repeated M m = 2; map<string, int64> n = 3; }}'
             protoc:load(source)
             local bytes = pb.encode('M', {{a = 'x', m = {{{{a = 'y'}}}}, n = {{k = 5}}}})
             return tostring(damaged(bytes, function(b) return pb.decode('M', b) end)
                 and damaged(source, function(t) return native.pb.compile('x.proto', {{['x.proto'] = t}}) end)
                 and damaged(native.pb.compile('x.proto', {{['x.proto'] = source}}), function(b)
                     local state = native.pb.new()
                     return native.pb.load(state, b) and native.pb.types(state)
                 end))"
        ),
        "true",
    );
}
