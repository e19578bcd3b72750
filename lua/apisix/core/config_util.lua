--- `core.config_util`: life-cycle hooks of configuration items.
local setmetatable = setmetatable
local ipairs = ipairs
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

function _M.fire_all_clean_handlers(item)
    local list = handlers[item]
    handlers[item] = nil
    for _, handler in ipairs(list or {}) do
        handler.f(item)
    end
end

--- `10`, `10s`, `5m`, `1h`, `2d`, `1M`, `1y` → seconds; nil and the reason for anything else.
function _M.parse_time_unit(text)
    if type(text) == "number" then
        return text
    end
    local units = { ms = 0.001, s = 1, m = 60, h = 3600, d = 86400, w = 604800, M = 2592000, y = 31536000 }
    local total, at = 0, 1
    while at <= #text do
        local number, unit, stop = text:match("^(%d+)%s*(%a*)()", at)
        if not number then
            return nil, "invalid data: " .. text:sub(at)
        end
        if unit == "" then
            unit = "s"
        end
        if not units[unit] then
            return nil, "invalid data: " .. text:sub(at)
        end
        total = total + number * units[unit]
        at = stop
    end
    return total
end

return _M
