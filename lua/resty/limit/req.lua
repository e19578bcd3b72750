--- lua-resty-limit-traffic: requests per second with a leaky bucket.

local ffi = require("ffi")

local max, abs = math.max, math.abs
local shared, now = ngx.shared, ngx.now

-- Excess in thousandths of a request, and when it was so in milliseconds.
local record = ffi.typeof("struct { double excess, last; }")
local record_ptr = ffi.typeof("const struct { double excess, last; } *")
local SIZE = ffi.sizeof(record)

local _M = { _VERSION = "0.09" }
local mt = { __index = _M }

--- obj, err = new(dict_name, rate, burst)
function _M.new(dict_name, rate, burst)
    local dict = shared[dict_name]
    if not dict then return nil, "shared dict not found" end
    assert(rate > 0 and burst >= 0)
    return setmetatable({ dict = dict, rate = rate * 1000, burst = burst * 1000 }, mt)
end

local buffer = record()

local function store(self, key, excess, time)
    buffer.excess, buffer.last = excess, time
    return self.dict:set(key, ffi.string(buffer, SIZE))
end

local function load(self, key)
    local kept = self.dict:get(key)
    if type(kept) ~= "string" or #kept ~= SIZE then return nil end
    local rec = ffi.cast(record_ptr, kept)
    return rec.excess, rec.last
end

--- delay, excess = obj:incoming(key, commit); nil, "rejected" over the burst.
function _M:incoming(key, commit)
    local time = now() * 1000
    local excess, last = load(self, key)
    if excess then
        excess = max(excess - self.rate * abs(time - last) / 1000 + 1000, 0)
        if excess > self.burst then return nil, "rejected" end
    else
        excess = 0
    end
    if commit then
        local ok, err = store(self, key, excess, time)
        if not ok then return nil, err end
    end
    return excess / self.rate, excess / 1000
end

--- Takes back what `incoming` committed.
function _M:uncommit(key)
    local excess, last = load(self, key)
    if not excess then return nil, "not found" end
    return store(self, key, max(excess - 1000, 0), last)
end

function _M:set_rate(rate) self.rate = rate * 1000 end

function _M:set_burst(burst) self.burst = burst * 1000 end

return _M
