--- lua-resty-string's AES: `aes:new(key, salt, cipher, hash, rounds)`, encrypt, decrypt.

local crypto = require("moongate.native").crypto

local _M = { _VERSION = "0.15" }
local mt = { __index = _M }

_M.hash = { md5 = "md5", sha1 = "sha1", sha224 = "sha224", sha256 = "sha256", sha384 = "sha384", sha512 = "sha512" }

local modes = { cbc = "cbc", ecb = "ecb", gcm = "gcm", ctr = "ctr", ofb = "ofb", cfb128 = "cfb128", cfb8 = "cfb8" }

--- Modes: cbc (the default), ecb, gcm (128, 256), ctr, ofb, cfb128, cfb8; sizes 128 (the default), 192, 256.
function _M.cipher(size, mode)
    size, mode = size or 128, (mode or "cbc"):lower()
    if size ~= 128 and size ~= 192 and size ~= 256 then return nil end
    if not modes[mode] or mode == "gcm" and size == 192 then return nil end
    return { size = size, cipher = mode }
end

-- OpenSSL's EVP_BytesToKey: digests of (last digest, key, salt), hashed `rounds` times each.
local function bytes_to_key(digest, key, salt, rounds, key_len, iv_len)
    local out, last = "", ""
    while #out < key_len + iv_len do
        last = crypto.digest(digest, last .. key .. (salt or ""))
        for _ = 2, rounds do last = crypto.digest(digest, last) end
        out = out .. last
    end
    return out:sub(1, key_len), out:sub(key_len + 1, key_len + iv_len)
end

function _M.new(_, key, salt, cipher, hash, rounds, iv_len, enable_padding)
    cipher = cipher or _M.cipher(128, "cbc")
    hash = hash or _M.hash.md5
    local size = cipher.size / 8
    iv_len = iv_len or (cipher.cipher == "gcm" and 12 or 16)
    local self = { mode = cipher.cipher, padding = enable_padding ~= false }
    -- The documented way to give an iv is in place of the hash; some pass it with the salt's place left empty.
    if type(hash) == "table" then
        if not hash.iv then return nil, "iv is needed" end
        if hash.method then
            self.key = hash.method(key)
        else
            if #key ~= size then return nil, "bad key length" end
            self.key = key
        end
        self.iv = hash.iv
        if #self.key ~= size then return nil, "bad key length" end
    else
        if salt and #salt ~= 8 then return nil, "salt must be 8 characters or nil" end
        self.key, self.iv = bytes_to_key(hash, key, salt, rounds or 1, size, iv_len)
    end
    return setmetatable(self, mt)
end

function _M:encrypt(s)
    local out, err = crypto.aes(true, self.mode, self.key, self.iv, s, self.padding)
    if not out then return nil, err end
    if self.mode == "gcm" then return { out:sub(1, -17), out:sub(-16) } end
    return out
end

function _M:decrypt(s, tag)
    if self.mode == "gcm" then s = s .. (tag or "") end
    return crypto.aes(false, self.mode, self.key, self.iv, s, self.padding)
end

return _M
