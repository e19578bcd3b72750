--- lua-resty-limit-traffic: requests per fixed window.

local shared = ngx.shared

local _M = { _VERSION = "0.09" }
local mt = { __index = _M }

--- obj, err = new(dict_name, limit, window_seconds)
function _M.new(dict_name, limit, window)
    local dict = shared[dict_name]
    if not dict then return nil, "shared dict not found" end
    assert(limit > 0 and window > 0)
    return setmetatable({ dict = dict, limit = limit, window = window }, mt)
end

--- 0, remaining = obj:incoming(key, commit); nil, "rejected" over the limit.
function _M:incoming(key, commit)
    local remaining, err
    if commit then
        remaining, err = self.dict:incr(key, -1, self.limit, self.window)
        if not remaining then return nil, err end
    else
        remaining = (self.dict:get(key) or self.limit) - 1
    end
    if remaining < 0 then return nil, "rejected" end
    return 0, remaining
end

--- Takes back what `incoming` committed.
function _M:uncommit(key)
    local remaining, err = self.dict:incr(key, 1)
    if not remaining then
        if err == "not found" then return self.limit end
        return nil, err
    end
    return remaining
end

return _M
