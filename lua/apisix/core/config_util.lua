--- `core.config_util`: life-cycle hooks of configuration items.
local setmetatable = setmetatable
local ipairs = ipairs
local tonumber = tonumber
local type = type

local _M = {}

-- item -> { handler, … }; the item's table is the key, so that a dropped item takes its handlers along.
local handlers = setmetatable({}, { __mode = "k" })
local next_id = 0

--- Calls `f(item)` once when `item` is replaced or deleted. Returns an id for `cancel_clean_handler`.
function _M.add_clean_handler(item, f)
    local list = handlers[item]
    if not list then
        list = {}
        handlers[item] = list
    end
    next_id = next_id + 1
    list[#list + 1] = { id = next_id, f = f }
    return next_id
end

--- Takes the handler of that id away; `fire`: and runs it first.
function _M.cancel_clean_handler(item, id, fire)
    for i, handler in ipairs(handlers[item] or {}) do
        if handler.id == id then
            table.remove(handlers[item], i)
            if fire then
                handler.f(item)
            end
            return
        end
    end
end

--- Runs the item's handlers, once.
function _M.fire_all_clean_handlers(item)
    local list = handlers[item]
    handlers[item] = nil
    for _, handler in ipairs(list or {}) do
        handler.f(item)
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
