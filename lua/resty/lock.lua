--- lua-resty-lock: a lock in a shared dictionary; waits by sleeping.

local shared, sleep, now = ngx.shared, ngx.sleep, ngx.now
local min = math.min

local _M = { _VERSION = "0.09" }
local mt = { __index = _M }

--- obj, err = new(dict_name, { exptime=30, timeout=5, step=0.001, ratio=2, max_step=0.5 })
function _M.new(_, dict_name, opts)
    local dict = shared[dict_name]
    if not dict then return nil, "dictionary not found" end
    opts = opts or {}
    local timeout = opts.timeout or 5
    local exptime = opts.exptime or 30
    if timeout > exptime then timeout = exptime end
    return setmetatable({
        dict = dict, exptime = exptime, timeout = timeout, step = opts.step or 0.001, ratio = opts.ratio or 2,
        max_step = opts.max_step or 0.5,
    }, mt)
end

--- elapsed, err = obj:lock(key): seconds waited.
function _M:lock(key)
    if not key then return nil, "nil key" end
    if self.key then return nil, "locked" end
    local dict, exptime = self.dict, self.exptime
    local step, elapsed = self.step, 0
    local start = now()
    while true do
        local ok, err = dict:add(key, true, exptime)
        if ok then
            self.key = key
            return elapsed
        end
        if err ~= "exists" then return nil, err end
        local left = self.timeout - elapsed
        if left <= 0 then return nil, "timeout" end
        sleep(min(step, left))
        elapsed = now() - start
        step = min(step * self.ratio, self.max_step)
    end
end

--- ok, err = obj:unlock()
function _M:unlock()
    local key = self.key
    if not key then return nil, "unlocked" end
    self.key = nil
    local ok, err = self.dict:delete(key)
    if not ok then return nil, err end
    return 1
end

--- ok, err = obj:expire(seconds?)
function _M:expire(seconds)
    if not self.key then return nil, "unlocked" end
    local ok, err = self.dict:expire(self.key, seconds or self.exptime)
    if not ok then return nil, err end
    return true
end

return _M
