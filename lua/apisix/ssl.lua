--- `apisix.ssl`: certificates and keys of `/ssls`. The gateway picks certificates by itself. All phases unless said.
local core = require("apisix.core")
local ngx_ssl = require("ngx.ssl")
local data_encryption = require("apisix.core.data_encryption")
local lower, sub, type = string.lower, string.sub, type

local _M = {}

--- The name that the client asked for (SNI) in lower case; without one `apisix.ssl.fallback_sni`. nil and the reason. Phases: the
-- handshake's, and those of requests over TLS.
function _M.server_name()
    local name, err = ngx_ssl.server_name()
    if err then
        return nil, err
    end
    if not name then
        local apisix = core.config_local.local_conf().apisix
        name = core.table.try_read_attr(apisix, "ssl", "fallback_sni")
        if not name then
            return nil, "failed to find SNI"
        end
    end
    return lower(name)
end

--- The stored form of a private key, or of a value of the plugin field `field`: under config.yaml's keyring. What is no PEM
-- is taken as encrypted already.
function _M.aes_encrypt_pkey(text, field)
    if not field and sub(text, 1, 3) ~= "---" then
        return text
    end
    local apisix = core.config_local.local_conf().apisix
    return data_encryption.aes_cbc_encrypt(data_encryption.init_iv_tbl(core.table.try_read_attr(apisix, "data_encryption",
        "keyring") or {}), text)
end

--- The plain form of a private key as stored; nil and the reason when no key of the keyring fits.
function _M.aes_decrypt_pkey(stored, field)
    if not field and sub(stored, 1, 3) == "---" then
        return stored
    end
    local apisix = core.config_local.local_conf().apisix
    return data_encryption.aes_cbc_decrypt(data_encryption.init_iv_tbl(core.table.try_read_attr(apisix, "data_encryption",
        "keyring") or {}), stored)
end

--- Whether a certificate chain and its private key (PEM, the key also as stored) can be read: true, or nil and the reason.
function _M.validate(cert, key)
    local parsed, err = ngx_ssl.parse_pem_cert(cert)
    if not parsed then
        return nil, "failed to parse cert: " .. err
    end
    if key == nil then
        return true
    end
    key = _M.aes_decrypt_pkey(key)
    if not key then
        return nil, "failed to decrypt previous encrypted key"
    end
    parsed, err = ngx_ssl.parse_pem_priv_key(key)
    if not parsed then
        return nil, "failed to parse key: " .. err
    end
    return true
end

local function check_pair(cert, key)
    if require("apisix.secret").is_reference(cert) or require("apisix.secret").is_reference(key) then
        return true
    end
    return _M.validate(cert, key)
end

--- Checks the table of an ssl object: true, or nil and the reason.
function _M.check_ssl_conf(_, conf)
    local ok, err = core.schema.check(core.schema.ssl, conf)
    if not ok then
        return nil, "invalid configuration: " .. err
    end
    ok, err = check_pair(conf.cert, conf.key)
    if not ok then
        return nil, err
    end
    local certs, keys = conf.certs or {}, conf.keys or {}
    if #certs ~= #keys then
        return nil, "mismatched number of certs and keys"
    end
    for i = 1, #certs do
        ok, err = check_pair(certs[i], keys[i])
        if not ok then
            return nil, "failed to handle cert-key pair[" .. i .. "]: " .. err
        end
    end
    local ca = type(conf.client) == "table" and conf.client.ca
    if ca then
        ok, err = _M.validate(ca)
        if not ok then
            return nil, "failed to validate client_cert: " .. err
        end
    end
    return true
end

--- Whether clients can be asked for certificates (`client.ca` of an ssl object): true.
function _M.support_client_verification()
    return true
end

return _M
