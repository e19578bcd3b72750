--- `resty.rsa`: RSA keys of 1024 bits and more (lua-resty-rsa's README). The work is native (src/lua/host/pkey.rs).

local pkey = require("moongate.native").pkey

local setmetatable, tostring, type = setmetatable, tostring, type

local _M = { _VERSION = "1.1.0" }
local mt = { __index = _M }

--- Paddings of `encrypt` and `decrypt`; without padding and with SSLv23's there is none.
_M.PADDING = {
    RSA_PKCS1_PADDING = 1, RSA_SSLV23_PADDING = 2, RSA_NO_PADDING = 3, RSA_PKCS1_OAEP_PADDING = 4,
    RSA_PKCS1_PSS_PADDING = 6,
}

_M.KEY_TYPE = { PKCS1 = "PKCS#1", PKCS8 = "PKCS#8" }

local paddings = { [1] = "pkcs1", [4] = "oaep", [6] = "pss" }

-- As OpenSSL knows digests: `SHA256`, `sha-256`, `RSA-SHA256`.
local function digest_name(algorithm)
    local name = tostring(algorithm):lower():gsub("^rsa%-", ""):gsub("%-", "")
    return name == "sha" and "sha1" or name
end

--- A public and a private key as PEM texts; waits while they are made.
-- @param bits number: 1024 to 8192
-- @param in_pkcs8 boolean?: in PKCS #8's and X.509's form instead of PKCS #1's
-- @return public key, private key; nil, nil, err
function _M.generate_rsa_keys(_, bits, in_pkcs8)
    -- Also as a plain function.
    if type(_) == "number" then bits, in_pkcs8 = _, bits end
    local key, err = pkey.generate("RSA", bits)
    if not key then return nil, nil, err end
    return pkey.export(key, false, not in_pkcs8), pkey.export(key, true, not in_pkcs8)
end

--- An object with one key.
-- @param opts table: `public_key` or `private_key` (PEM), `password` for the latter, `padding` (of PADDING), `algorithm` (a
--   digest: of signatures, and of OAEP, SHA1 by default there); `key_type` is told by the text itself
-- @return the object; nil, err
function _M.new(_, opts)
    opts = opts or {}
    local text = opts.public_key or opts.private_key
    if not text then return nil, "public_key or private_key is required" end
    local key, err = pkey.load(text, opts.password)
    if not key then return nil, err end
    local kind, _, private = pkey.info(key)
    if kind ~= "RSA" then return nil, "not an RSA key" end
    if opts.private_key and not opts.public_key and not private then return nil, "not a private key" end
    local padding = paddings[opts.padding or _M.PADDING.RSA_PKCS1_PADDING]
    if not padding then return nil, "unsupported padding" end
    return setmetatable({ key = key, public = opts.public_key ~= nil, padding = padding,
        algorithm = opts.algorithm and digest_name(opts.algorithm) }, mt)
end

--- Bytes that the private key decrypts. @return bytes; nil, err
function _M:encrypt(text)
    if not self.public then return nil, "not inited for encrypt" end
    return pkey.encrypt(self.key, self.padding, self.algorithm or "sha1", text)
end

--- @return text; nil, err
function _M:decrypt(bytes)
    if self.public then return nil, "not inited for decrypt" end
    return pkey.decrypt(self.key, self.padding, self.algorithm or "sha1", bytes)
end

local function signing(self)
    return self.padding == "pss" and "pss" or "pkcs1"
end

--- The signature of a text. @return bytes; nil, err
function _M:sign(text)
    if self.public or not self.algorithm then return nil, "not inited for sign" end
    return pkey.sign(self.key, signing(self), self.algorithm, text)
end

--- Whether a signature is the text's. @return true; false, err; nil, err
function _M:verify(text, signature)
    if not self.public or not self.algorithm then return nil, "not inited for verify" end
    local holds, err = pkey.verify(self.key, signing(self), self.algorithm, text, signature)
    if holds then return true end
    if holds == false then return false, "verify failed" end
    return nil, err
end

return _M
