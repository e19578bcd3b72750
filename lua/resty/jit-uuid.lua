--- lua-resty-jit-uuid: random UUIDs, and those of a name.

local crypto = require("moongate.native").crypto

local byte, format = string.byte, string.format
local random_bytes, digest = crypto.random, crypto.digest
local find = ngx.re.find

local _M = { _VERSION = "0.0.7" }

local function text(bytes, version)
    local a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p = byte(bytes, 1, 16)
    g, i = g % 16 + version * 16, i % 64 + 128
    return format("%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
                  a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p)
end

--- Randomness comes from the system; nothing to seed.
function _M.seed() end

--- A random UUID (version 4).
function _M.generate_v4()
    return text(random_bytes(16), 4)
end

local function of_name(namespace, name, hash, version)
    local hex = namespace:gsub("-", "")
    local bytes = crypto.unhex(hex)
    if not bytes or #bytes ~= 16 then return nil, "invalid namespace" end
    return text(digest(hash, bytes .. name), version)
end

function _M.generate_v3(namespace, name)
    return of_name(namespace, name, "md5", 3)
end

function _M.generate_v5(namespace, name)
    return of_name(namespace, name, "sha1", 5)
end

function _M.factory_v3(namespace)
    return function(name) return _M.generate_v3(namespace, name) end
end

function _M.factory_v5(namespace)
    return function(name) return _M.generate_v5(namespace, name) end
end

function _M.is_valid(s)
    if type(s) ~= "string" then return false end
    return find(s, "^[a-f0-9]{8}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{4}-[a-f0-9]{12}$", "ijo") ~= nil
end

return setmetatable(_M, { __call = _M.generate_v4 })
