--- `core.config_util`: life-cycle hooks of configuration items. All phases.
local native = require("moongate.native").apisix
local log = require("apisix.core.log")
local ngx = ngx
local ipairs = ipairs
local pairs = pairs
local pcall = pcall
local setmetatable = setmetatable
local tostring = tostring
local tonumber = tonumber
local type = type

local _M = {}

-- item -> { handler, … }. A plugin's own item takes its handlers along when it goes.
local handlers = setmetatable({}, { __mode = "k" })
local next_id = 0

-- Items that stand for an object of the configuration, kept until it changes. A plugin adds a handler for each item that it
-- keeps something for; more than these are mistakes.
local MAX_WATCHED = 10000
local INTERVAL_SECS = 1

local watched, count = {}, 0
local watching = false

-- The revision of the object that an item stands for, 0 when it is gone; nil for an item of the plugin's own.
local function revision_of(item)
    local kind, id = tostring(item.key):match("^/apisix/([%w_]+)/(.+)$")
    local known, revision = pcall(native.object_revision, kind, id)
    return known and revision or nil
end

-- What is merged of several objects is another one with each of them.
local function has_changed(item)
    for _, part in ipairs(require("moongate.ctx").parts(item) or { item }) do
        if revision_of(part) ~= part.modifiedIndex then
            return true
        end
    end
    return false
end

local function look(premature)
    if premature then
        return
    end
    for item in pairs(watched) do
        if has_changed(item) then
            _M.fire_all_clean_handlers(item)
        end
    end
end

local function start()
    if watching then
        return true
    end
    local ok, err = ngx.timer.every(INTERVAL_SECS, look)
    watching = ok and true
    return ok, err
end

-- True, or nil and why the item cannot be watched.
local function watch(item)
    if type(item) ~= "table" or not item.modifiedIndex or not revision_of(item) then
        return true
    end
    if count >= MAX_WATCHED then
        return nil, "there are handlers for " .. MAX_WATCHED .. " items already"
    end
    local ok, err = start()
    if not ok then
        return nil, err
    end
    watched[item], count = true, count + 1
    return true
end

local function drop(item)
    handlers[item] = nil
    if watched[item] then
        watched[item], count = nil, count - 1
    end
end

--- Calls `f(item)` once when the object that `item` stands for (`ctx.matched_route`, `ctx.service`) is replaced or deleted,
-- about a second later; for an item of the plugin's own when `fire_all_clean_handlers` says so. Returns an id for
-- `cancel_clean_handler`; nil and the reason when too many items have handlers.
function _M.add_clean_handler(item, f)
    local list = handlers[item]
    if not list then
        local ok, err = watch(item)
        if not ok then
            return nil, err
        end
        list = {}
        handlers[item] = list
    end
    next_id = next_id + 1
    list[#list + 1] = { id = next_id, f = f }
    return next_id
end

local function call(handler, item)
    local ok, err = pcall(handler.f, item)
    if not ok then
        log.error("failed to run a clean handler: ", err)
    end
end

--- Takes the handler of that id away; `fire`: and runs it first.
function _M.cancel_clean_handler(item, id, fire)
    local list = handlers[item] or {}
    for i, handler in ipairs(list) do
        if handler.id == id then
            table.remove(list, i)
            if #list == 0 then
                drop(item)
            end
            if fire then
                call(handler, item)
            end
            return
        end
    end
end

--- Runs the item's handlers, once.
function _M.fire_all_clean_handlers(item)
    local list = handlers[item]
    drop(item)
    for _, handler in ipairs(list or {}) do
        call(handler, item)
    end
end

-- The units that may stand in a time, from the largest on, and their seconds.
local UNITS = { "y", "M", "w", "d", "h", "m", "s", "ms" }
local SECONDS = { y = 31536000, M = 2592000, w = 604800, d = 86400, h = 3600, m = 60, s = 1, ms = 0.001 }
local RANK = {}
for i, unit in ipairs(UNITS) do
    RANK[unit] = i
end

-- The seconds of one number with its unit, and the unit's rank, which must be lower than the one before; nil and why not.
local function part(number, unit, rank)
    if unit == "" then
        if rank == RANK.s then
            return nil, "specific unit conflicts with the default unit second"
        end
        unit = "s"
    end
    if not RANK[unit] or RANK[unit] <= rank then
        return nil, "unexpected unit: " .. unit
    end
    return number * SECONDS[unit], RANK[unit]
end

--- nginx's times: a number of seconds, or `1h30m`, `1s100ms`, `1h 30m`; units y, M, w, d, h, m, s, ms, the larger first, and
-- seconds where there is none. Seconds as a number, or nil and the reason. All phases.
function _M.parse_time_unit(text)
    if type(text) == "number" then
        return text
    end
    local total, at, rank = 0, 1, 0
    repeat
        local number, unit, stop = text:match("^%s*(%d+)(%a*)%s*()", at)
        if not number then
            return nil, "invalid data: " .. text:sub(at, at)
        end
        local seconds, its = part(tonumber(number), unit, rank)
        if not seconds then
            return nil, its
        end
        total, at, rank = total + seconds, stop, its
    until at > #text
    return total
end

-- The places of a list of configuration items that hold one: what was deleted is `false`.
local function next_value(values, i)
    local n = #values
    repeat
        i = i + 1
    until i > n or values[i]
    if i <= n then
        return i, values[i]
    end
end

--- Iterates over the items of `values` of a configuration (`conf.values`), passing over those that were deleted.
function _M.iterate_values(values)
    return next_value, values or {}, 0
end

return _M
