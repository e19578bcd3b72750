--- Counting in this gateway's memory, in step with a Redis once per `sync_interval`.
--
-- In the shared dictionary lie, for each key, what the Redis last said (the quota) and what was let through since (the delta), and for
-- each conf a queue of the keys that have a delta. A worker that let something through has a timer that adds the deltas to the Redis.
-- A key without a quota, or with one that is too old, asks the Redis at once.
local core = require("apisix.core")
local cjson = require("cjson.safe")
local ngx_now, timer_at = ngx.now, ngx.timer.at
local ngx_shared = ngx.shared
local min = math.min
local setmetatable, tostring = setmetatable, tostring

local _M = {}
local mt = { __index = _M }

-- Keys of a conf that wait for their turn. At a hundred bytes each the queue takes a tenth of the dictionary.
local MAX_QUEUE = 10000

-- A timer has its say before a request asks by itself: so many intervals is a quota good for.
local STALE_AFTER = 2

-- Seconds after which a worker that died in the middle of a sync does not keep others from it any more. Longer than any sensible
-- timeouts of a Redis together: two at it would count twice.
local LOCK_TTL = 60

--- For a dictionary, a limit per `window` seconds, a conf with `sync_interval`, and a limiter with `incoming` and `commit`
-- (`limit-count-redis`).
function _M.new(dict_name, limit, window, conf, limiter)
    return setmetatable({
        dict = ngx_shared[dict_name], limit = limit, window = window, interval = conf.sync_interval,
        limiter = limiter, sliding = conf.window_type == "sliding",
    }, mt)
end

--- Where the keys wait that have something for the Redis, of the confs with that id.
function _M.key_local_delta_keys(_, id)
    return "delayed:queue:" .. id
end

--- Where the quota of a key lies: JSON of `remaining`, `reset` (seconds) and `sync_at` (when it was so).
function _M.key_remote_quota(self, key)
    return "delayed:quota:" .. self.limit .. ":" .. self.window .. ":" .. key
end

local function key_delta(self, key)
    return "delayed:delta:" .. self.limit .. ":" .. self.window .. ":" .. key
end

local function read_quota(self, key)
    local text = self.dict:get(self:key_remote_quota(key))
    local quota = text and cjson.decode(text)
    if not quota then
        return nil
    end
    quota.reset = quota.reset - (ngx_now() - quota.sync_at)
    return quota.reset > 0 and quota or nil
end

-- What the Redis said. Within a fixed window less is never more again: an answer that was overtaken does not count.
local function write_quota(self, key, remaining, reset)
    local before = not self.sliding and read_quota(self, key)
    if before then
        remaining = min(remaining, before.remaining)
    end
    if reset <= 0 then
        return
    end
    local text = cjson.encode({ remaining = remaining, reset = reset, sync_at = ngx_now() })
    local ok, err = self.dict:set(self:key_remote_quota(key), text, reset)
    if not ok then
        core.log.warn("failed to keep what the Redis said of ", key, ": ", err)
    end
end

local function enqueue(self, key, id)
    local queue = self:key_local_delta_keys(id)
    if (self.dict:llen(queue) or 0) >= MAX_QUEUE then
        core.log.warn("delayed-sync queue saturated, skipping enqueue of ", key)
        return
    end
    local length, err = self.dict:lpush(queue, key)
    if not length then
        core.log.warn("failed to queue ", key, " for the Redis: ", err)
    end
end

-- What was let through is the Redis' now. Whatever came meanwhile waits for the next time.
local function settle(self, key, id, delta)
    local rest = self.dict:incr(key_delta(self, key), -delta)
    if rest and rest > 0 then
        enqueue(self, key, id)
    end
end

-- Adds a key's delta to the Redis, unless somebody else is at it: true; nil and why the Redis did not take it.
local function flush(self, key, id)
    local delta = self.dict:get(key_delta(self, key)) or 0
    local lock = "delayed:lock:" .. self:key_remote_quota(key)
    if delta <= 0 or not self.dict:add(lock, true, LOCK_TTL) then
        return true
    end
    -- Who had the lock before may have taken it.
    delta = self.dict:get(key_delta(self, key)) or 0
    local ok, remaining, reset = true, nil, nil
    if delta > 0 then
        local called
        called, ok, remaining, reset = pcall(self.limiter.commit, self.limiter, key, delta)
        if not called then
            ok, remaining = nil, ok
        end
    end
    if ok and remaining then
        write_quota(self, key, remaining, reset)
        settle(self, key, id, delta)
    end
    self.dict:delete(lock)
    if not ok then
        return nil, remaining
    end
    return true
end

-- Goes through what was queued when it began. At the first failure the rest waits: the Redis is likely to be gone for all.
local function flush_all(self, id)
    local queue = self:key_local_delta_keys(id)
    for _ = 1, self.dict:llen(queue) or 0 do
        local key = self.dict:rpop(queue)
        if not key then
            return
        end
        local ok, err = flush(self, key, id)
        if not ok then
            core.log.error("failed to sync ", key, " to redis, it is tried again: ", err)
            enqueue(self, key, id)
            return
        end
    end
end

local arm

local function on_timer(premature, self, id)
    -- The next timer comes when this one has done: a slow Redis is not asked by many at once.
    local ok, err = pcall(flush_all, self, id)
    self.armed = false
    if not ok then
        core.log.error("failed to sync to redis: ", err)
    end
    if not premature and (self.dict:llen(self:key_local_delta_keys(id)) or 0) > 0 then
        arm(self, id)
    end
end

function arm(self, id)
    if self.armed then
        return
    end
    local ok, err = timer_at(self.interval, on_timer, self, id)
    if not ok then
        core.log.error("failed to create the timer of delayed sync: ", err)
        return
    end
    self.armed = true
end

-- Asks the Redis, for this request and for what waits: what is left, and seconds.
local function ask(self, key, cost, id)
    local ok, err = flush(self, key, id)
    if not ok then
        return nil, nil, err
    end
    local delay, remaining, reset = self.limiter:incoming(key, cost)
    if delay then
        write_quota(self, key, remaining, reset)
        return remaining, reset
    end
    if remaining ~= "rejected" then
        return nil, nil, remaining
    end
    write_quota(self, key, 0, reset)
    return -1, reset
end

--- Counts `cost` for `key`: what is left of the limit (negative: refused, not counted) and the seconds until the window ends; nil, nil
-- and the reason. `id` names the queue: one for each conf. Waits where the Redis has to be asked.
function _M.delayed_sync(self, key, cost, id)
    local quota = read_quota(self, key)
    if not quota or ngx_now() - quota.sync_at > STALE_AFTER * self.interval then
        return ask(self, key, cost, id)
    end
    -- A fixed window ends with its quota; of a sliding one, the next needs to know what was let through.
    local ttl = quota.reset + (self.sliding and self.window or 0)
    local delta, err = self.dict:incr(key_delta(self, key), cost, 0, ttl)
    if not delta then
        return nil, nil, tostring(err)
    end
    local remaining = quota.remaining - delta
    if remaining < 0 then
        self.dict:incr(key_delta(self, key), -cost)
        return -1, quota.reset
    end
    -- One that only looks has nothing to tell.
    if delta == cost and cost > 0 then
        -- What is left of the time before, when all of it was the Redis', says nothing.
        self.dict:expire(key_delta(self, key), ttl)
        enqueue(self, key, id)
    end
    arm(self, id)
    return remaining, quota.reset
end

return _M
