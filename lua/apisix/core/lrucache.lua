--- `core.lrucache`: caches with a bound, an age and a version.
--
-- `local cache = core.lrucache.new({ ttl = 300, count = 512 })`, then `cache(key, version, create, ...)`: the cached value,
-- or what `create(...)` returns. A value of another version is made anew. `create` may return nil and an error, which is
-- returned and not cached (unless `neg_ttl` is set). All phases.
local lru_new = require("resty.lrucache").new
local semaphore = require("ngx.semaphore")
local error = error
local now = ngx.now
local pcall = pcall

-- Defaults of APISIX: enough for one plugin's confs; seconds.
local GLOBAL_TTL, GLOBAL_COUNT = 60 * 60, 1024
local PLUGIN_TTL, PLUGIN_COUNT = 5 * 60, 8
local NEG_TTL, NEG_COUNT = 60, 64

-- Seconds that a request waits for another to make a value; for the next turn as long again, and no more.
local MAX_WAIT = 5

local _M = {}

local function is_stale_usable(entry, version, invalid_stale)
    return entry and not invalid_stale and entry.ver == version and entry.val ~= nil
end

local function settings(opts)
    opts = opts or {}
    local is_plugin = opts.type == "plugin"
    return {
        count = opts.count or (is_plugin and PLUGIN_COUNT or GLOBAL_COUNT),
        ttl = opts.ttl or (is_plugin and PLUGIN_TTL or GLOBAL_TTL),
        neg_ttl = opts.neg_ttl or opts.neg_count and NEG_TTL,
        neg_count = opts.neg_count or NEG_COUNT,
        invalid_stale = opts.invalid_stale,
        serial = opts.serial_creating,
        release = opts.release,
    }
end

local function store(count)
    local cache, err = lru_new(count)
    if not cache then
        error("failed to create the lrucache: " .. err, 3)
    end
    return cache
end

-- What is kept for a key and holds: true and what `create` gave, or false and what is to be released.
local function recall(self, key, version)
    local entry, stale = self.cache:get(key)
    if entry and entry.ver == version then
        return true, entry.val
    end
    if is_stale_usable(stale, version, self.invalid_stale) then
        self.cache:set(key, stale, self.ttl)
        return true, stale.val
    end
    local failure = self.failures and self.failures:get(key)
    if failure and failure.ver == version then
        return true, nil, failure.err
    end
    return false, entry or stale
end

local function make(self, old, key, version, create, ...)
    local value, err = create(...)
    if value ~= nil then
        if self.release and old and old.val ~= nil then
            self.release(old.val)
        end
        self.cache:set(key, { val = value, ver = version }, self.ttl)
    elseif self.failures then
        self.failures:set(key, { ver = version, err = err }, self.neg_ttl)
    end
    return value, err
end

local function wake(turn)
    if turn.waiting > 0 then
        turn.semaphore:post(turn.waiting)
    end
end

-- One that took so long that another got the next turn has something for those who wait for that, too.
local function finish(self, key, turn, ok, ...)
    local current = self.turns[key]
    if current == turn then
        self.turns[key] = nil
    elseif current then
        wake(current)
    end
    wake(turn)
    if not ok then
        error((...), 0)
    end
    return ...
end

-- The turn of another that is under way. One that has not ended by then was given up along with its request.
local function turn_of_another(self, key)
    local turn = self.turns[key]
    return turn and now() - turn.since < MAX_WAIT and turn or nil
end

-- Waits for the turn's end: whether that is possible here.
local function await(turn)
    turn.waiting = turn.waiting + 1
    local possible = pcall(turn.semaphore.wait, turn.semaphore, turn.since + MAX_WAIT - now())
    turn.waiting = turn.waiting - 1
    return possible
end

-- One at a time makes the value of a key; the others wait for it and look again. When it came to nothing, or was given up, one of
-- them has the next turn. Where nothing can wait each makes its own.
local function make_in_turn(self, old, key, version, ...)
    local until_then = now() + 2 * MAX_WAIT
    local turn = turn_of_another(self, key)
    while turn do
        if now() >= until_then then
            return nil, "timeout"
        elseif not await(turn) then
            return make(self, old, key, version, ...)
        end
        local known, value, err = recall(self, key, version)
        if known then
            return value, err
        end
        old, turn = value, turn_of_another(self, key)
    end
    turn = { semaphore = semaphore.new(0), waiting = 0, since = now() }
    self.turns[key] = turn
    return finish(self, key, turn, pcall(make, self, old, key, version, ...))
end

--- A cache. `opts`: `ttl` seconds, `count` entries, `type` = "plugin" for smaller defaults, `invalid_stale` makes a
-- value anew when its age is over (else its age starts again), `neg_ttl` seconds and `neg_count` entries cache that
-- `create` failed, `serial_creating` has one request make a value and the others wait for it, up to 10 seconds
-- (nil, "timeout"), `release(value)` is called
-- for a value that is replaced.
function _M.new(opts)
    local self = settings(opts)
    self.cache = store(self.count)
    self.failures = self.neg_ttl and store(self.neg_count)
    self.turns = {}
    local maker = self.serial and make_in_turn or make
    return function(key, version, create, ...)
        local known, value, err = recall(self, key, version)
        if known then
            return value, err
        end
        return maker(self, value, key, version, create, ...)
    end
end

local function plugin_key(api_ctx, extra_key)
    local key = api_ctx.conf_type .. "#" .. api_ctx.conf_id
    if extra_key then
        key = key .. "#" .. extra_key
    end
    return key
end

--- A value that belongs to the conf under which the plugin runs: kept as long as that conf's version lasts.
function _M.plugin_ctx(cache, api_ctx, extra_key, create, ...)
    return cache(plugin_key(api_ctx, extra_key), api_ctx.conf_version, create, ...)
end

--- A text that names the plugin's conf and its version.
function _M.plugin_ctx_id(api_ctx, extra_key)
    return plugin_key(api_ctx, extra_key) .. "#" .. api_ctx.conf_version
end

--- The cache that everyone shares: `core.lrucache.global(key, version, create, ...)`; 1024 entries, for an hour.
_M.global = _M.new()

return _M
