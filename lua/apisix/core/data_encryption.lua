--- `core.data_encryption`: what `encrypt_fields` of plugins are stored as (plugin-develop.md, "data encryption"). All phases.
--
-- AES in CBC mode under the keyring of config.yaml; a key is 16 bytes (AES-128) or 32 (AES-256), its first 16 bytes are the
-- initialisation vector, the text is base64. The first key encrypts, each of them is tried to decrypt.
local crypto_aes = require("moongate.native").crypto.aes
local config_local = require("apisix.core.config_local")
local log = require("apisix.core.log")
local decode_base64, encode_base64 = ngx.decode_base64, ngx.encode_base64
local ipairs, sub, type = ipairs, string.sub, type

local _M = {}

local PADDED = true

--- The ciphers of a keyring: a key, or an array of keys. One of another length is left out with a line of error.log.
function _M.init_iv_tbl(keys)
    local out = {}
    for _, key in ipairs(type(keys) == "table" and keys or { keys }) do
        key = tostring(key)
        if #key == 16 or #key == 32 then
            out[#out + 1] = { key = key, iv = sub(key, 1, 16) }
        else
            log.error("failed to create a cipher: expected a 16 byte (AES-128) or 32 byte (AES-256) key, got ", #key,
                " bytes")
        end
    end
    return out
end

--- The stored form of `text` under the first cipher; the text itself where there is none, or it cannot be encrypted.
function _M.aes_cbc_encrypt(ciphers, text)
    local first = ciphers and ciphers[1]
    if not first then
        return text
    end
    local bytes, err = crypto_aes(true, "cbc", first.key, first.iv, text, PADDED)
    if not bytes then
        log.error("failed to encrypt: ", err)
        return text
    end
    return encode_base64(bytes)
end

--- The plain form of a stored text; nil and the reason when no cipher fits.
function _M.aes_cbc_decrypt(ciphers, stored)
    local bytes = decode_base64(stored)
    if not bytes then
        return nil, "base64 decode failed"
    end
    for _, cipher in ipairs(ciphers or {}) do
        local text = crypto_aes(false, "cbc", cipher.key, cipher.iv, bytes, PADDED)
        if text then
            return text
        end
    end
    return nil, "decrypt failed: no key of the keyring fits"
end

local own

local function keyring()
    if not own then
        local apisix = config_local.local_conf().apisix
        local conf = apisix and apisix.data_encryption
        own = _M.init_iv_tbl(conf and conf.enable_encrypt_fields and conf.keyring or {})
    end
    return own
end

--- Whether fields of plugins are encrypted: `apisix.data_encryption.enable_encrypt_fields`, with a key to do it.
function _M.enable_encrypt_fields()
    return #keyring() > 0
end

--- The stored form of `text` under config.yaml's keyring; the text itself without one.
function _M.encrypt(text)
    return _M.aes_cbc_encrypt(keyring(), text)
end

--- The plain form of a stored text under config.yaml's keyring; nil and the reason when no key fits. Without a keyring
-- the text itself.
function _M.decrypt(stored)
    local ciphers = keyring()
    if #ciphers == 0 then
        return stored
    end
    return _M.aes_cbc_decrypt(ciphers, stored)
end

return _M
