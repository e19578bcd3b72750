--- `require("ngx.ssl")` (lua-resty-core): the connection with the client, and what decides about its handshake. What sets
-- certificates works in `ssl_certificate_by_lua*`.

local native = require("moongate.native").ssl

local error, ipairs, sub, type = error, ipairs, string.sub, type

local _M = { version = "0.1.28", SSL3_VERSION = 0x300, TLS1_VERSION = 0x301, TLS1_1_VERSION = 0x302, TLS1_2_VERSION = 0x303,
    TLS1_3_VERSION = 0x304 }

local names = { [0x300] = "SSLv3", [0x301] = "TLSv1", [0x302] = "TLSv1.1", [0x303] = "TLSv1.2", [0x304] = "TLSv1.3" }

local function text_argument(n, value)
    if type(value) ~= "string" then
        error("bad argument #" .. n .. " (string expected, got " .. type(value) .. ")", 3)
    end
end

--- The name that the client asked for (SNI). @return string; nil without one
_M.server_name = native.server_name

--- @return number; nil, err
_M.server_port = native.port

--- The address that the client has reached. @return 4 or 16 bytes, "inet" or "inet6"; nil, nil, err
function _M.raw_server_addr()
    return native.address(false)
end

--- The client's address. @return 4 or 16 bytes, "inet" or "inet6"; nil, nil, err
function _M.raw_client_addr()
    return native.address(true)
end

--- The version of the connection; before it is agreed on, the newest that both sides have. @return 0x304 for TLS 1.3; nil, err
_M.get_tls1_version = native.version

--- The same as text. @return "TLSv1.3" and so on; nil, err
function _M.get_tls1_version_str()
    local number, err = native.version()
    if not number then return nil, err end
    local name = names[number]
    if not name then return nil, "unknown version" end
    return name
end

--- What the client sent as its random value. @param outlen at most so many bytes (32); 0: how many there are.
-- @return bytes or number; nil, err
function _M.get_client_random(outlen)
    local random, err = native.client_random()
    if not random then return nil, err end
    if outlen == 0 then return #random end
    return (sub(random, 1, outlen or 32))
end

--- Cipher suites that both sides know, by number, in the client's order. @param filter_grease false: those of RFC 8701 too.
-- @return array; nil, err
function _M.get_req_shared_ssl_ciphers(filter_grease)
    return native.shared_ciphers(filter_grease == false)
end
_M.get_shared_ssl_ciphers = _M.get_req_shared_ssl_ciphers

--- Key material that the client can derive as well (RFC 5705), over HTTP/1. @param length number: bytes @param label string
-- @param context string?: none and an empty one differ with TLS 1.2. @return bytes; nil, err
function _M.export_keying_material(length, label, context)
    return native.export(length, label, context)
end

--- The same of early data, which is not taken. @return nil, err
function _M.export_keying_material_early()
    return nil, "there is no early data: 0-RTT is not offered"
end

-- What is parsed --------------------------------------------------------------------------------------------------

--- Certificates of a PEM text as an object for set_cert and sock:setclientcert. @return object; nil, err
function _M.parse_pem_cert(pem)
    text_argument(1, pem)
    local chain = native.chain(pem)
    if not chain then return nil, "PEM_read_bio_X509_AUX() failed" end
    return chain
end

--- The same from DER, one behind the other. @return object; nil, err
function _M.parse_der_cert(der)
    text_argument(1, der)
    local chain = native.chain(der)
    if not chain then return nil, "d2i_X509_bio() failed" end
    return chain
end

--- A private key of a PEM text as an object for set_priv_key and sock:setclientcert. @param passphrase of an encrypted PKCS #8 key.
-- @return object; nil, err
function _M.parse_pem_priv_key(pem, passphrase)
    text_argument(1, pem)
    local key = native.key(pem, passphrase)
    if not key then return nil, "PEM_read_bio_PrivateKey() failed" end
    return key
end

--- The same from DER (PKCS #8, PKCS #1, SEC 1). @return object; nil, err
function _M.parse_der_priv_key(der)
    text_argument(1, der)
    local key = native.key(der)
    if not key then return nil, "d2i_PrivateKey_bio() failed" end
    return key
end

--- The DER of certificates in a PEM text, one behind the other. @return bytes; nil, err
function _M.cert_pem_to_der(pem)
    local chain, err = _M.parse_pem_cert(pem)
    if not chain then return nil, err end
    return (native.chain_der(chain))
end

--- @param passphrase of an encrypted PKCS #8 key. @return bytes; nil, err
function _M.priv_key_pem_to_der(pem, passphrase)
    local key, err = _M.parse_pem_priv_key(pem, passphrase)
    if not key then return nil, err end
    return (native.key_der(key))
end

-- What decides: ssl_certificate_by_lua* ----------------------------------------------------------------------------

--- Takes away the certificates that the configuration has for the name, and those set so far. @return true
_M.clear_certs = native.clear_certs

--- The certificate of the connection and those above it, from parse_*_cert. @return true; nil, err
_M.set_cert = native.set_chain

--- Its private key, from parse_*_priv_key. @return true; nil, err
_M.set_priv_key = native.set_key

--- @param der certificates one behind the other, the connection's first. @return true; nil, err
function _M.set_der_cert(der)
    local chain, err = _M.parse_der_cert(der)
    if not chain then return nil, err end
    return _M.set_cert(chain)
end

--- @return true; nil, err
function _M.set_der_priv_key(der)
    local key, err = _M.parse_der_priv_key(der)
    if not key then return nil, err end
    return _M.set_priv_key(key)
end

--- Asks for the client's certificate. The handshake goes on whatever it is worth: `$ssl_client_verify` says. Such a connection leaves no
-- session to resume. @param client_certs authorities that are named to the client, @param depth certificates between (1),
-- @param trusted_certs authorities that are not named. @return true; nil, err
_M.verify_client = native.verify_client

-- What OpenSSL alone has: its objects, and secrets that the TLS library keeps to itself.
for _, name in ipairs({ "get_server_random", "get_session_master_key", "get_req_ssl_pointer", "get_upstream_ssl_pointer",
    "ssl_session_reused" }) do
    _M[name] = function()
        return nil, "not supported: the TLS library is not OpenSSL"
    end
end

return _M
