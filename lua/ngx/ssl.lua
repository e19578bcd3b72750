--- `require("ngx.ssl")` (lua-resty-core): what the connection says of itself, and PEM to DER. Certificates are chosen by the
-- configuration (`ssls`), so what would set them is not supported.

local native = require("moongate.native")

local error, ipairs, type = error, ipairs, type

local _M = { version = "0.1.28", SSL3_VERSION = 0x300, TLS1_VERSION = 0x301, TLS1_1_VERSION = 0x302, TLS1_2_VERSION = 0x303,
    TLS1_3_VERSION = 0x304 }

--- The name that the client asked for (SNI). @return string; nil without one
function _M.server_name()
    return ngx.var.ssl_server_name
end

--- @return number
function _M.server_port()
    return tonumber(ngx.var.server_port)
end

--- @return "TLSv1.3" and so on; nil, err without TLS
function _M.get_tls1_version_str()
    local version = ngx.var.ssl_protocol
    if not version or version == "" then return nil, "no TLS" end
    return version
end

local versions = { ["TLSv1.2"] = _M.TLS1_2_VERSION, ["TLSv1.3"] = _M.TLS1_3_VERSION }

--- @return number: 0x304 for TLS 1.3; nil, err without TLS
function _M.get_tls1_version()
    local version, err = _M.get_tls1_version_str()
    if not version then return nil, err end
    return versions[version]
end

-- The bytes of all blocks of a PEM text whose label has `wanted` in it.
local function der_of(pem, wanted)
    if type(pem) ~= "string" then error("bad argument #1 (string expected, got " .. type(pem) .. ")", 3) end
    local parts = {}
    for label, body in pem:gmatch("%-%-%-%-%-BEGIN ([%u ]+)%-%-%-%-%-(.-)%-%-%-%-%-END") do
        if label:find(wanted, 1, true) then
            if label:find("ENCRYPTED", 1, true) then return nil, "the key is encrypted" end
            parts[#parts + 1] = ngx.decode_base64((body:gsub("%s", ""))) or ""
        end
    end
    local der = table.concat(parts)
    if der == "" then return nil, "no " .. wanted:lower() .. " in the text" end
    return der
end

--- The DER of certificates in a PEM text, one behind the other. @return bytes; nil, err
function _M.cert_pem_to_der(pem)
    return der_of(pem, "CERTIFICATE")
end

--- @return bytes; nil, err
function _M.priv_key_pem_to_der(pem)
    return der_of(pem, "PRIVATE KEY")
end

--- An opaque object of a certificate and those that stand behind it in the text: for sock:setclientcert. @return object; nil, err
function _M.parse_der_cert(der)
    return native.ssl.chain(der)
end
_M.parse_pem_cert = _M.parse_der_cert

--- An opaque object of a private key. @return object; nil, err
function _M.parse_der_priv_key(der)
    local key, err = native.pkey.load(der)
    if not key then return nil, err end
    local _, _, private = native.pkey.info(key)
    if not private then return nil, "not a private key" end
    return native.ssl.key(der)
end
_M.parse_pem_priv_key = _M.parse_der_priv_key

for _, name in ipairs({ "clear_certs", "set_der_cert", "set_cert", "set_der_priv_key", "set_priv_key", "verify_client",
    "raw_server_addr", "raw_client_addr", "get_client_random", "export_keying_material", "get_req_ssl_pointer" }) do
    _M[name] = function()
        return nil, "not supported"
    end
end

return _M
