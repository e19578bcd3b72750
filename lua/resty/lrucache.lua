--- lua-resty-lrucache: a cache of one VM, bounded by entries, the least recently used go first.

local setmetatable, type = setmetatable, type
local now = ngx.now

local _M = { _VERSION = "0.15" }
local mt = { __index = _M }

-- A slot of the list: 0 is its head, next[0] the most recently used.
local function unlink(self, at)
    local p, n = self.prev[at], self.next[at]
    self.next[p], self.prev[n] = n, p
end

local function link_front(self, at)
    local first = self.next[0]
    self.next[at], self.prev[at] = first, 0
    self.prev[first], self.next[0] = at, at
end

local function init(self)
    self.slots, self.keys, self.values, self.expires, self.flags = {}, {}, {}, {}, {}
    self.prev, self.next, self.used, self.free = { [0] = 0 }, { [0] = 0 }, 0, {}
    return self
end

--- cache, err = new(max_items)
function _M.new(size)
    if type(size) ~= "number" or size < 1 then return nil, "size too small" end
    return setmetatable(init({ size = size }), mt)
end

--- data, stale_data, flags = cache:get(key)
function _M:get(key)
    local at = self.slots[key]
    if not at then return nil end
    if self.next[0] ~= at then
        unlink(self, at)
        link_front(self, at)
    end
    local expires = self.expires[at]
    if expires and expires <= now() then return nil, self.values[at], self.flags[at] end
    return self.values[at], nil, self.flags[at]
end

local function drop(self, at)
    unlink(self, at)
    self.slots[self.keys[at]] = nil
    self.keys[at], self.values[at], self.expires[at], self.flags[at] = nil, nil, nil, nil
end

--- cache:set(key, value, ttl?, flags?): seconds.
function _M:set(key, value, ttl, flags)
    local at = self.slots[key]
    if at then
        unlink(self, at)
    else
        local n = #self.free
        if n > 0 then
            at = self.free[n]
            self.free[n] = nil
        elseif self.used < self.size then
            at = self.used + 1
            self.used = at
        else
            at = self.prev[0]
            drop(self, at)
        end
        self.slots[key], self.keys[at] = at, key
    end
    link_front(self, at)
    self.values[at], self.expires[at], self.flags[at] = value, ttl and now() + ttl or nil, flags or 0
end

--- cache:delete(key)
function _M:delete(key)
    local at = self.slots[key]
    if not at then return false end
    drop(self, at)
    self.free[#self.free + 1] = at
    return true
end

--- cache:count()
function _M:count()
    return self.used - #self.free
end

--- cache:capacity()
function _M:capacity()
    return self.size
end

--- keys = cache:get_keys(max?, res?): most recently used first.
function _M:get_keys(max, res)
    local keys, n, at = res or {}, 0, self.next[0]
    if not max or max == 0 then max = self.size end
    while at ~= 0 and n < max do
        n = n + 1
        keys[n] = self.keys[at]
        at = self.next[at]
    end
    if res then keys[n + 1] = nil end
    return keys
end

--- cache:flush_all()
function _M:flush_all()
    init(self)
end

return _M
