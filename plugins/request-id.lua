--- Gives each request an id, for the upstream and the client.
local core = require("apisix.core")
local uuid = require("resty.jit-uuid")
local random_bytes = require("resty.random").bytes
local ngx_time = ngx.time
local math_random = math.random
local byte, char, sub = string.byte, string.char, string.sub
local floor = math.floor
local concat = table.concat

local name = "request-id"

local _M = {
    version = 0.1,
    priority = 12015,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

local NANOID_ALPHABET = "ModuleSymbhasOwnPr-0123456789ABCDEFGHNRVfgctiUvz_KqYTJkLxpZXIjQW"
local NANOID_LENGTH = 21
local BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
-- A KSUID counts seconds from this second: 2014-05-13.
local KSUID_EPOCH, KSUID_LENGTH = 1400000000, 27

local function from_alphabet(alphabet, length)
    local out = {}
    local size = #alphabet
    for i = 1, length do
        local at = math_random(size)
        out[i] = sub(alphabet, at, at)
    end
    return concat(out)
end

-- 20 bytes as base 62, by long division.
local function base62(bytes)
    local digits = { byte(bytes, 1, -1) }
    local out = {}
    for i = KSUID_LENGTH, 1, -1 do
        local remainder = 0
        for j = 1, #digits do
            local value = remainder * 256 + digits[j]
            digits[j] = floor(value / 62)
            remainder = value % 62
        end
        out[i] = sub(BASE62, remainder + 1, remainder + 1)
    end
    return concat(out)
end

local function ksuid()
    local t = ngx_time() - KSUID_EPOCH
    local stamp = char(floor(t / 16777216) % 256, floor(t / 65536) % 256, floor(t / 256) % 256, t % 256)
    return base62(stamp .. random_bytes(16))
end

-- RFC 9562, 5.7: 48 bits of milliseconds, then random.
local function uuidv7()
    local ms = floor(ngx.now() * 1000)
    local stamp = ("%012x"):format(ms)
    local r = { byte(random_bytes(10), 1, 10) }
    return ("%s-%s-%04x-%04x-%02x%02x%02x%02x%02x%02x"):format(
        sub(stamp, 1, 8), sub(stamp, 9, 12),
        0x7000 + (r[1] % 16) * 256 + r[2],
        0x8000 + (r[3] % 64) * 256 + r[4],
        r[5], r[6], r[7], r[8], r[9], r[10]
    )
end

local makers = {
    uuid = function()
        return uuid()
    end,
    nanoid = function()
        return from_alphabet(NANOID_ALPHABET, NANOID_LENGTH)
    end,
    range_id = function(conf)
        return from_alphabet(conf.range_id.char_set, conf.range_id.length)
    end,
    ksuid = ksuid,
    uuidv7 = uuidv7,
}

function _M.rewrite(conf, ctx)
    local id = core.request.header(ctx, conf.header_name)
    if not id then
        id = makers[conf.algorithm](conf)
        core.request.set_header(ctx, conf.header_name, id)
    end
    ctx.var.apisix_request_id = id
    if conf.include_in_response then
        ctx["request-id"] = ctx["request-id"] or {}
        ctx["request-id"][conf.header_name] = id
    end
end

function _M.idle_in(conf, phase)
    return phase == "header_filter" and not conf.include_in_response
end

function _M.header_filter(conf, ctx)
    local ids = ctx["request-id"]
    local id = ids and ids[conf.header_name]
    if id and not core.response.get_header(conf.header_name) then
        core.response.set_header(conf.header_name, id)
    end
end

return _M
