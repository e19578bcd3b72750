--- lua-resty-openssl's x509 (its README), to be read: certificates are not made or changed here.

local altname = require("resty.openssl.x509.altname")
local bn = require("resty.openssl.bn")
local crypto = require("moongate.native").crypto
local digest = require("resty.openssl.digest")
local name = require("resty.openssl.x509.name")
local native = require("moongate.native").x509
local pkey = require("resty.openssl.pkey")

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

--- @param text string: PEM or DER @return x509; nil, err
function _M.new(text)
    if type(text) ~= "string" then return nil, "x509.new: expect a string at #1" end
    local data, err = native.parse(text)
    if not data then return nil, "x509.new: " .. err end
    return setmetatable({ data = data }, mt)
end

function _M.istype(object)
    return getmetatable(object) == mt
end

--- @param format string?: PEM (the default) or DER @return string
function _M:tostring(format)
    if format == "DER" then return self.data.der end
    local text = ngx.encode_base64(self.data.der)
    return "-----BEGIN CERTIFICATE-----\n" .. text:gsub(("."):rep(64), "%0\n"):gsub("\n$", "") .. "\n-----END CERTIFICATE-----\n"
end

function _M:to_PEM()
    return self:tostring()
end

function _M:get_subject_name() return name.of(self.data.subject) end
function _M:get_issuer_name() return name.of(self.data.issuer) end
function _M:get_serial_number() return bn.from_binary(self.data.serial) end
function _M:get_version() return self.data.version end

--- Seconds since the epoch.
function _M:get_not_before() return self.data.not_before end
function _M:get_not_after() return self.data.not_after end

--- @return not_before, not_after
function _M:get_lifetime() return self.data.not_before, self.data.not_after end

--- @return pkey; nil, err
function _M:get_pubkey() return pkey.new(self.data.public_key) end

--- @return altname, or nil when there is none
function _M:get_subject_alt_name()
    if #self.data.alt_names == 0 then return nil end
    return altname.of(self.data.alt_names)
end

--- Whether it may sign others.
function _M:get_ca() return self.data.ca end
_M.get_basic_constraints = function(self, field)
    if field and field:lower() ~= "ca" then return nil end
    return field and self.data.ca or { ca = self.data.ca }
end

--- Bytes of a digest over the certificate. @param hash string?: sha1 by default @return bytes; nil, err
function _M:digest(hash)
    return crypto.digest(digest.plain_name(hash or "sha1"), self.data.der)
end

--- Bytes of a digest over the public key.
function _M:pubkey_digest(hash)
    return crypto.digest(digest.plain_name(hash or "sha1"), self.data.public_key)
end

local algorithms = {
    ["1.2.840.113549.1.1.5"] = "sha1", ["1.2.840.113549.1.1.11"] = "sha256", ["1.2.840.113549.1.1.12"] = "sha384",
    ["1.2.840.113549.1.1.13"] = "sha512", ["1.2.840.10045.4.3.2"] = "sha256", ["1.2.840.10045.4.3.3"] = "sha384",
    ["1.3.101.112"] = "sha512",
}

--- Whether a key signed the certificate. @param key pkey @return boolean; nil, err
function _M:verify(key)
    local hash = algorithms[self.data.signature_oid]
    if not hash then return nil, "x509:verify: unsupported signature algorithm" end
    return key:verify(self.data.signature, self.data.signed, hash)
end

return _M
