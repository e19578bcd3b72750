--- lua-resty-openssl's pkey (its README): RSA of 1024 bits and more, EC on prime256v1 and secp384r1, Ed25519.
--
-- Not there: other curves, X25519, DH, derive, JWK, sign_raw. A curve signs with its own digest.

local bn = require("resty.openssl.bn")
local digest = require("resty.openssl.digest")
local native = require("moongate.native").pkey

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

_M.PADDINGS = { RSA_PKCS1_PADDING = 1, RSA_SSLV23_PADDING = 2, RSA_NO_PADDING = 3, RSA_PKCS1_OAEP_PADDING = 4, RSA_X931_PADDING = 5,
    RSA_PKCS1_PSS_PADDING = 6 }

local paddings = { [1] = "pkcs1", [4] = "oaep", [6] = "pss" }
local types = { RSA = 6, EC = 408, Ed25519 = 1087 }

local function wrap(key, err)
    if not key then return nil, "pkey.new: " .. err end
    return setmetatable({ key = key }, mt)
end

--- A key of a text, or a new one, which waits for RSA.
-- @param what string: PEM or DER; or table: type ("RSA", "EC", "Ed25519"), bits or curve; nothing: an RSA key of 2048 bits
-- @param options table?: passphrase, type ("pr": it must be a private key)
-- @return pkey; nil, err
function _M.new(what, options)
    if what == nil or type(what) == "table" then
        what = what or {}
        local kind = what.type or "RSA"
        return wrap(native.generate(kind == "ED25519" and "Ed25519" or kind, kind == "EC" and what.curve or what.bits))
    end
    if type(what) ~= "string" then return nil, "pkey.new: unexpected type " .. type(what) .. " at #1" end
    options = options or {}
    local passphrase = options.passphrase
    if not passphrase and options.passphrase_cb then passphrase = options.passphrase_cb() end
    local self, err = wrap(native.load(what, passphrase))
    if self and options.type == "pr" and not self:is_private() then return nil, "pkey.new: not a private key" end
    return self, err
end

function _M.istype(object)
    return getmetatable(object) == mt
end

function _M:is_private()
    local _, _, private = native.info(self.key)
    return private
end

--- @return table: name (RSA, EC, ED25519) and nid; with `nid_only` the number
function _M:get_key_type(nid_only)
    local kind = native.info(self.key)
    if nid_only then return types[kind] end
    return { nid = types[kind], id = types[kind], sn = kind, ln = kind, name = kind }
end

--- @return bytes of a signature at most
function _M:get_size()
    local kind, bits = native.info(self.key)
    if kind == "RSA" then return math.ceil(bits / 8) end
    return kind == "Ed25519" and 64 or bits == "secp384r1" and 104 or 72
end

--- @return table: n, e, d, p, q of RSA; x, y, private of EC as bn; public, private of Ed25519 as bytes
function _M:get_parameters()
    local raw = native.parameters(self.key)
    local kind = native.info(self.key)
    local made = {}
    for name, bytes in pairs(raw) do
        made[name] = (kind == "Ed25519" or name == "public") and bytes or bn.from_binary(bytes)
    end
    return made
end

--- @param which string?: "public" (the default) or "private" @param format string?: PEM (the default) or DER
-- @param pkcs1 boolean?: the older form @return string; nil, err
function _M:tostring(which, format, pkcs1)
    format = format or "PEM"
    if format ~= "PEM" and format ~= "DER" then return nil, "pkey:tostring: unsupported format " .. tostring(format) end
    local private = which == "private" or which == "PrivateKey"
    local text, err = native.export(self.key, private, pkcs1 or false, format == "DER")
    if not text then return nil, "pkey:tostring: " .. err end
    return text
end

function _M:to_PEM(which, pkcs1)
    return self:tostring(which, "PEM", pkcs1)
end

local function text_and_digest(self, what, name)
    if digest.istype(what) then return table.concat(what.parts), what.name end
    local kind, curve = native.info(self.key)
    if name then return what, digest.plain_name(name) end
    return what, kind == "EC" and curve == "secp384r1" and "sha384" or "sha256"
end

--- @param what string, or a resty.openssl.digest that was given it @param name string?: the digest @param padding number?
-- @return bytes; nil, err
function _M:sign(what, name, padding)
    local text, hash = text_and_digest(self, what, name)
    local made, err = native.sign(self.key, paddings[padding or 1] or "", hash, text)
    if not made then return nil, "pkey:sign: " .. err end
    return made
end

--- @return whether it holds; nil, err
function _M:verify(signature, what, name, padding)
    local text, hash = text_and_digest(self, what, name)
    local holds, err = native.verify(self.key, paddings[padding or 1] or "", hash, text, signature)
    if holds == nil then return nil, "pkey:verify: " .. err end
    return holds
end

--- @param padding number?: of PADDINGS: PKCS1 (the default) or OAEP @param options table?: oaep_md @return bytes; nil, err
function _M:encrypt(text, padding, options)
    local hash = options and options.oaep_md and digest.plain_name(options.oaep_md) or "sha1"
    local made, err = native.encrypt(self.key, paddings[padding or 1] or "", hash, text)
    if not made then return nil, "pkey:encrypt: " .. err end
    return made
end

--- @return text; nil, err
function _M:decrypt(bytes, padding, options)
    local hash = options and options.oaep_md and digest.plain_name(options.oaep_md) or "sha1"
    local made, err = native.decrypt(self.key, paddings[padding or 1] or "", hash, bytes)
    if not made then return nil, "pkey:decrypt: " .. err end
    return made
end

return _M
