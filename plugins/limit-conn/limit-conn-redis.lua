--- Requests under way, in a Redis, for all gateways that share it: one script per request, in the Redis' own time.
--
-- A place belongs to a request by its id and expires after `key_ttl`, so that a gateway that dies does not keep it. Places are given back
-- from a timer, as the log phase cannot wait; what a Redis that is away does not take is tried again until it would have expired.
local core = require("apisix.core")
local redis_script = require("apisix.utils.redis-script")
local integer, float = redis_script.integer, redis_script.float
local timer_at, ngx_now = ngx.timer.at, ngx.now
local floor, max = math.floor, math.max
local setmetatable = setmetatable

local _M = {}
local mt = { __index = _M }

-- Seconds: APISIX's default.
local DEFAULT_KEY_TTL = 3600

-- Places that wait to be given back, of one conf in one worker. What is more expires by itself.
local MAX_WAITING = 10000

-- Seconds until a Redis that did not take one is asked again.
local RETRY_AFTER = 1

-- KEYS[1]: a sorted set of requests by the millisecond at which their place expires. ARGV: milliseconds to expire, how many there may
-- be, the id.
local enter = redis_script.new([[
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
local count = redis.call('ZCARD', KEYS[1])
if count >= tonumber(ARGV[2]) then
    return { 0, count }
end
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[1]), ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return { 1, count + 1 }
]])

-- KEYS[1]: the same set. ARGV: the id.
local leave = redis_script.new("return redis.call('ZREM', KEYS[1], ARGV[1])")

-- Ids of this VM's requests.
local ids, last_id = core.utils.uuid() .. ":", 0

local function next_id()
    last_id = last_id + 1
    return ids .. last_id
end

-- conf -> `{ first, last, [n] = { conf, key, id, ends }, running }`; goes with the conf.
local queues = setmetatable({}, { __mode = "k" })

local function queue_of(conf)
    local queue = queues[conf]
    if not queue then
        queue = { first = 1, last = 0, running = false }
        queues[conf] = queue
    end
    return queue
end

local function drop_first(queue)
    queue[queue.first] = nil
    queue.first = queue.first + 1
end

local function start(queue, conf, delay, give_back)
    local ok, err = timer_at(delay, give_back, queue, conf)
    queue.running = ok and true or false
    if not ok then
        core.log.error("failed to create the timer that gives places of limit-conn back: ", err)
    end
end

local function give_back(premature, queue, conf)
    while queue.first <= queue.last do
        local place = queue[queue.first]
        local ok, err = true, nil
        if place.ends > ngx_now() then
            ok, err = leave:run(conf, place.key, place.id)
        end
        if not ok then
            core.log.error("failed to record the connection leaving request: ", err)
            queue.running = false
            if not premature then
                start(queue, conf, RETRY_AFTER, give_back)
            end
            return
        end
        drop_first(queue)
    end
    queue.running = false
end

local function give_back_later(place)
    local queue = queue_of(place.conf)
    if queue.last - queue.first + 1 >= MAX_WAITING then
        core.log.warn("too many places of limit-conn wait to be given back, one is left to expire: ", place.key)
        return
    end
    queue.last = queue.last + 1
    queue[queue.last] = place
    if not queue.running then
        start(queue, place.conf, 0, give_back)
    end
end

local function key_ttl(conf)
    -- A place that expires at once would limit nothing.
    return max(conf.key_ttl or DEFAULT_KEY_TTL, 1)
end

--- A limiter of `limit` requests at once and `burst` more that wait, each for about `delay` seconds until it knows better.
function _M.new(limit, burst, delay)
    return setmetatable({ max = limit, burst = burst, unit_delay = delay }, mt)
end

--- Takes a place in the Redis of `conf`, one of limit-conn: the seconds to wait, how many have one, and the place; nil and "rejected"
-- when there is none; nil and the reason. Waits.
function _M:incoming(key, _, conf)
    local ttl = key_ttl(conf)
    local place = { conf = conf, key = "limit_conn:" .. key, id = next_id(), ends = ngx_now() + ttl }
    local reply, err = enter:run(conf, place.key, integer(ttl * 1000), float(self.max + self.burst), place.id)
    self.committed = reply and reply[1] == 1
    if not reply then
        -- The Redis may have heard a question whose answer did not come.
        if err == "timeout" or err == "closed" then
            give_back_later(place)
        end
        return nil, err
    end
    if reply[1] == 0 then
        return nil, "rejected"
    end
    local count = reply[2]
    if count > self.max then
        return self.unit_delay * floor((count - 1) / self.max), count, place
    end
    return 0, count, place
end

--- Whether the last `incoming` took a place.
function _M:is_committed()
    return self.committed
end

--- Gives a place back, soon; the latency (seconds) teaches how long the next has to wait. Does not wait.
function _M:leaving(_, latency, place)
    give_back_later(place)
    if latency then
        self.unit_delay = (latency + self.unit_delay) / 2
    end
    return true
end

return _M
