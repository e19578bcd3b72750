--- lua-resty-openssl's cipher (its README): aes-{128,192,256}-{cbc,ecb,ctr,ofb,cfb,cfb8}, aes-{128,256}-gcm, chacha20-poly1305.
--
-- `update` keeps the text: all of it comes from `final`.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

local modes = { cbc = "cbc", ecb = "ecb", ctr = "ctr", ofb = "ofb", cfb = "cfb128", cfb128 = "cfb128", cfb8 = "cfb8", gcm = "gcm" }
local TAG = 16

--- @param name string: as OpenSSL writes it @return object; nil, err
function _M.new(name)
    local lower = tostring(name):lower()
    local size, mode = lower:match("^aes%-(%d+)%-(%w+)$")
    if not size then size, mode = lower:match("^aes(%d+)$"), "cbc" end
    local self
    if lower == "chacha20-poly1305" then
        self = { mode = lower, key_size = 32, iv_size = 12 }
    elseif (size == "128" or size == "192" or size == "256") and modes[mode] and not (size == "192" and mode == "gcm") then
        self = { mode = modes[mode], key_size = size / 8, iv_size = mode == "ecb" and 0 or mode == "gcm" and 12 or 16 }
    else
        return nil, "cipher.new: invalid cipher type \"" .. tostring(name) .. "\""
    end
    self.block_size = (mode == "cbc" or mode == "ecb") and 16 or 1
    self.aead = self.mode == "gcm" or self.mode == "chacha20-poly1305"
    self.parts = {}
    return setmetatable(self, mt)
end

function _M.istype(object)
    return getmetatable(object) == mt
end

local function check(self, key, iv)
    if #(key or "") ~= self.key_size then
        return "incorrect key size, expect " .. self.key_size
    end
    if #(iv or "") ~= self.iv_size then return "incorrect iv size, expect " .. self.iv_size end
end

--- Starts. @param opts table?: is_encrypt, no_padding @return true; nil, err
function _M:init(key, iv, opts)
    local err = check(self, key, iv)
    if err then return nil, "cipher:init: " .. err end
    opts = opts or {}
    self.key, self.iv, self.encrypting, self.padding = key, iv, opts.is_encrypt and true or false, not opts.no_padding
    self.parts, self.tag, self.aad = {}, nil, nil
    return true
end

--- Data that is signed but not hidden. @return true; nil, err
function _M:update_aead_aad(aad)
    if not self.aead then return nil, "cipher:update_aead_aad: not an aead cipher" end
    self.aad = (self.aad or "") .. aad
    return true
end

--- @return the tag of what `final` encrypted; nil, err
function _M:get_aead_tag(size)
    if not self.tag then return nil, "cipher:get_aead_tag: cipher not finalized" end
    return self.tag:sub(1, size or TAG)
end

--- The tag for `final` to check. @return true
function _M:set_aead_tag(tag)
    self.tag = tag
    return true
end

--- Adds texts. @return "": see above
function _M:update(...)
    if not self.key then return nil, "cipher:update: cipher not initialized" end
    for i = 1, select("#", ...) do self.parts[#self.parts + 1] = (select(i, ...)) end
    return ""
end

--- @return bytes; nil, err
function _M:final(text)
    if not self.key then return nil, "cipher:final: cipher not initialized" end
    local all = table.concat(self.parts) .. (text or "")
    self.parts = {}
    if self.aead and not self.encrypting then
        if #(self.tag or "") ~= TAG then return nil, "cipher:final: a tag of 16 bytes is needed" end
        all = all .. self.tag
    end
    local out, err = crypto.aes(self.encrypting, self.mode, self.key, self.iv or "", all, self.padding, self.aad)
    if not out then return nil, "cipher:final: " .. err end
    if self.aead and self.encrypting then
        out, self.tag = out:sub(1, -TAG - 1), out:sub(-TAG)
    end
    return out
end

local function at_once(self, encrypting, key, iv, text, no_padding, aad, tag)
    local ok, err = self:init(key, iv, { is_encrypt = encrypting, no_padding = no_padding })
    if not ok then return nil, err end
    if aad then
        ok, err = self:update_aead_aad(aad)
        if not ok then return nil, err end
    end
    self.tag = tag
    return self:final(text)
end

--- @return bytes; nil, err
function _M:encrypt(key, iv, text, no_padding, aead_aad)
    return at_once(self, true, key, iv, text, no_padding, aead_aad)
end

--- @return text; nil, err
function _M:decrypt(key, iv, text, no_padding, aead_aad, aead_tag)
    return at_once(self, false, key, iv, text, no_padding, aead_aad, aead_tag)
end

return _M
