--- Counting in fixed windows in a shared dictionary of this gateway.
--
-- `local lim = require("apisix.plugins.limit-count.limit-count-local").new("plugin-limit-count", 10, 60)`, then
-- `lim:incoming(key, commit, conf, cost)`.
local max = math.max
local ngx_shared = ngx.shared
local setmetatable = setmetatable

local dict = ngx_shared["plugin-limit-count"]

local _M = {}
local mt = { __index = _M }

--- Counts `cost` in the window of `key`: what is left of `count` (negative: over it) and the seconds until the window ends;
--- nil and the dictionary's error.
function _M.count(key, cost, count, window)
    local remaining, err = dict:incr(key, -cost, count, window)
    if not remaining then
        return nil, err
    end
    return remaining, dict:ttl(key) or window
end

--- A limiter of `limit` per `window` seconds in the dictionary of that name.
function _M.new(dict_name, limit, window)
    return setmetatable({ dict = ngx_shared[dict_name], limit = limit, window = window }, mt)
end

-- What is left, without counting.
local function look(self, key, cost)
    local left = self.dict:get(key) or self.limit
    if cost > 0 and left < cost then
        return nil, "rejected", self.dict:ttl(key) or 0
    end
    return 0, max(0, left - cost), self.dict:ttl(key) or 0
end

--- Counts `cost` (1) for `key`, or only looks when `commit` is false: 0, what is left and the seconds until the window ends;
--- nil and "rejected" when it is over the limit.
function _M:incoming(key, commit, _, cost)
    cost = cost or 1
    if not commit then
        return look(self, key, cost)
    end
    local left, err = self.dict:incr(key, -cost, self.limit, self.window)
    if not left then
        return nil, err
    end
    local reset = self.dict:ttl(key) or self.window
    if left < 0 then
        return nil, "rejected", reset
    end
    return 0, left, reset
end

return _M
