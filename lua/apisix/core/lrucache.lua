--- `core.lrucache`: caches with a bound, an age and a version.
--
-- `local cache = core.lrucache.new({ ttl = 300, count = 512 })`, then `cache(key, version, create, ...)`: the cached value,
-- or what `create(...)` returns. A value of another version is made anew. `create` may return nil and an error, which is
-- returned and not cached (unless `neg_ttl` is set). All phases.
local lru_new = require("resty.lrucache").new
local error = error
local setmetatable = setmetatable
local type = type

-- Defaults of APISIX: enough for one plugin's confs; seconds.
local GLOBAL_TTL, GLOBAL_COUNT = 60 * 60, 1024
local PLUGIN_TTL, PLUGIN_COUNT = 5 * 60, 8
local NEG_TTL, NEG_COUNT = 60, 64

local _M = {}

local function is_stale_usable(entry, version, invalid_stale)
    return entry and not invalid_stale and entry.ver == version and entry.val ~= nil
end

--- A cache. `opts`: `ttl` seconds, `count` entries, `type` = "plugin" for smaller defaults, `invalid_stale` makes a
-- value anew when its age is over (else its age starts again), `neg_ttl` and `neg_count` cache errors,
-- `release(value)` is called for a value that is replaced.
function _M.new(opts)
    local is_plugin = opts and opts.type == "plugin"
    local count = opts and opts.count or (is_plugin and PLUGIN_COUNT or GLOBAL_COUNT)
    local ttl = opts and opts.ttl or (is_plugin and PLUGIN_TTL or GLOBAL_TTL)
    local neg_ttl = opts and opts.neg_ttl
    local invalid_stale = opts and opts.invalid_stale
    local release = opts and opts.release
    local cache, err = lru_new(count)
    if not cache then
        error("failed to create the lrucache: " .. err)
    end
    local failures = neg_ttl and lru_new(opts.neg_count or NEG_COUNT)

    local function keep(key, version, value)
        cache:set(key, { val = value, ver = version }, ttl)
        return value
    end

    return function(key, version, create, ...)
        local entry, stale = cache:get(key)
        if entry and entry.ver == version then
            return entry.val
        end
        if is_stale_usable(stale, version, invalid_stale) then
            cache:set(key, stale, ttl)
            return stale.val
        end
        if failures then
            local failure = failures:get(key)
            if failure and failure.ver == version then
                return nil, failure.err
            end
        end
        local value, create_err = create(...)
        if value ~= nil then
            local old = entry or stale
            if release and old and old.val ~= nil then
                release(old.val)
            end
            return keep(key, version, value), create_err
        end
        if failures then
            failures:set(key, { ver = version, err = create_err }, neg_ttl or NEG_TTL)
        end
        return nil, create_err
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

local global = _M.new()

return setmetatable(_M, {
    __index = { global = global },
    __call = function(_, key, ...)
        if type(key) == "nil" then
            error("lrucache: a key is needed", 2)
        end
        return global(key, ...)
    end,
})
