--- `apisix.secret`: references to secrets in confs: `$env://NAME`, `$env://NAME/field`, `$secret://manager/id/key`
-- (terminology/secret.md). What asks a manager waits, 4 seconds at most; answers are kept as `apisix.lru.secret` of config.yaml
-- says. Where a manager cannot be reached, or says that it cannot answer now, its last value goes on for up to
-- `apisix.lru.secret.stale_ttl` seconds (an hour), with a warning each time that it is asked in vain.
local native = require("moongate.native").apisix
local env = require("apisix.core.env")
local log = require("apisix.core.log")
local lrucache = require("apisix.core.lrucache")
local config_local = require("apisix.core.config_local")
local lru_new = require("resty.lrucache").new
local deepcopy = require("apisix.core.table").deepcopy
local byte, find, gsub, sub, upper = string.byte, string.find, string.gsub, string.sub, string.upper
local error, floor, pairs, pcall, require, tonumber, tostring, type =
    error, math.floor, pairs, pcall, require, tonumber, tostring, type
local get_phase, now, null, sleep, thread = ngx.get_phase, ngx.now, ngx.null, ngx.sleep, ngx.thread

local PREFIX = "$secret://"
local DOLLAR = byte("$")
-- Seconds for all that a manager is asked for one value: connections, attempts and tokens. Less than the 5 that core.lrucache has
-- others wait, so that they get what the first one got.
local DEADLINE_SECS = 4
-- Seconds that a value goes on while its manager cannot be asked, where config.yaml does not say. Long enough for people to mend it,
-- short enough for a secret that was withdrawn meanwhile.
local STALE_SECS = 3600
-- Phases in which nothing can wait.
local CANNOT_WAIT = { header_filter = true, body_filter = true, log = true, balancer = true, set = true }

local _M = { PREFIX = PREFIX }

local function starts_with(text, prefix)
    return upper(sub(text, 1, #prefix)) == upper(prefix)
end

--- Whether the text names a secret rather than being one.
function _M.is_reference(text)
    return type(text) == "string" and byte(text) == DOLLAR
        and (starts_with(text, env.PREFIX) or starts_with(text, PREFIX))
end

--- The managers' configurations: an array of `{ value = { id = "vault/1", … } }`, and their version, which changes whenever one
-- does.
function _M.secrets()
    return native.secrets()
end

-- `$secret://manager/id/key` in its parts; nil and what is missing. A key may have slashes.
local function parse(uri)
    local rest = sub(uri, #PREFIX + 1)
    local slash = find(rest, "/", 1, true)
    if not slash then
        return nil, "error format: no secret manager"
    end
    local manager = sub(rest, 1, slash - 1)
    rest = sub(rest, slash + 1)
    slash = find(rest, "/", 1, true)
    if not slash then
        return nil, "error format: no secret conf id"
    end
    local id, key = sub(rest, 1, slash - 1), sub(rest, slash + 1)
    if key == "" then
        return nil, "error format: no secret key id"
    end
    return { manager = manager, id = id, key = key }
end

-- The manager's module. Its name comes from a conf: it is one that the gateway has, and no path.
local function module_of(manager)
    if not manager:find("^[%w_-]+$") then
        return nil, "unknown secret manager: " .. manager
    end
    local ok, module = pcall(require, "apisix.secret." .. manager)
    if not ok then
        return nil, "no secret manager: " .. manager
    end
    return module
end

-- uid -> the manager's conf as a table; those in use.
local confs = setmetatable({}, { __mode = "v" })

local function conf_of(manager, id)
    local uid = native.secret_uid(manager .. "/" .. id)
    if uid == 0 then
        return nil
    end
    local conf = confs[uid]
    if not conf then
        conf = native.secret(manager .. "/" .. id)
        confs[uid] = conf
    end
    return conf
end

local TOO_LATE = {}

local function alarm()
    sleep(DEADLINE_SECS)
    return TOO_LATE
end

-- What `f(...)` returns; nil and why not when it takes too long or raises. It has a thread of its own: each of its waits has a
-- bound, their number has not.
local function in_time(f, ...)
    local worker, clock = thread.spawn(f, ...), thread.spawn(alarm)
    local ok, value, err, is_final = thread.wait(worker, clock)
    thread.kill(worker)
    thread.kill(clock)
    if not ok then
        return nil, tostring(value)
    elseif value == TOO_LATE then
        return nil, "no answer within " .. DEADLINE_SECS .. " seconds"
    end
    return value, err, is_final
end

-- Nil, the reason, and whether asking again is of no use.
local function ask_manager(uri)
    log.info("fetching data from secret uri: ", uri)
    local parts, err = parse(uri)
    if not parts then
        return nil, err, true
    end
    local conf = conf_of(parts.manager, parts.id)
    if not conf then
        return nil, "no secret conf, secret_uri: " .. uri, true
    end
    local module
    module, err = module_of(parts.manager)
    if not module then
        return nil, err, true
    end
    local value, is_final
    value, err, is_final = in_time(module.get, conf, parts.key)
    if value == null then
        return nil, err
    end
    return value, err, is_final
end

-- As `fetch_by_uri`; true as third value when asking again is of no use.
local function fetch_now(uri)
    if type(uri) ~= "string" then
        return nil, "error secret_uri type: " .. type(uri), true
    end
    if starts_with(uri, env.PREFIX) then
        log.info("fetching data from env uri: ", uri)
        return env.fetch_by_uri(uri)
    end
    if not starts_with(uri, PREFIX) then
        return nil, "error secret_uri prefix: " .. uri, true
    end
    return ask_manager(uri)
end

--- The value that `$secret://manager/id/key` or `$env://NAME` stands for: nil when there is none; nil and the reason.
function _M.fetch_by_uri(uri)
    local value, err = fetch_now(uri)
    return value, err
end

local cache

local function settings()
    local apisix = config_local.local_conf().apisix
    local lru = apisix and apisix.lru and apisix.lru.secret or {}
    return tonumber(lru.stale_ttl) or STALE_SECS, {
        ttl = lru.ttl or 300, count = lru.count or 512, neg_ttl = lru.neg_ttl or 60, neg_count = lru.neg_count or 512,
        invalid_stale = true, serial_creating = true,
    }
end

-- A manager that is changed or deleted takes what it said along.
local function version_of(uri)
    local path = uri:match("^([^/]+/[^/]+)/", #PREFIX + 1)
    return path and native.secret_uid(path) or 0
end

-- uri -> { value, version, since }, for `stale_secs` seconds from the time that the manager told it.
local last_good, stale_secs

local function make_caches()
    if cache then
        return
    end
    local opts, err
    stale_secs, opts = settings()
    last_good, err = lru_new(opts.count)
    if not last_good then
        error("failed to create the cache of secrets: " .. err, 0)
    end
    cache = lrucache.new(opts)
end

local function last_good_of(uri, version)
    local last = last_good:get(uri)
    return last and last.version == version and last or nil
end

-- Asks the manager, and remembers the last time that it told a value.
local function refresh(uri, version)
    local value, err, is_final = fetch_now(uri)
    if value ~= nil then
        last_good:set(uri, { value = value, version = version, since = now() }, stale_secs)
    elseif is_final or not err then
        last_good:delete(uri)
    else
        local last = last_good_of(uri, version)
        if last then
            log.warn("failed to refresh secret ", uri, ", its value of ", floor(now() - last.since), " seconds ago goes on: ",
                _M.reason(err))
        end
    end
    return value, err
end

-- Raised, it is not remembered as the manager's.
local function refuse()
    error("a manager of secrets cannot be asked in this phase", 0)
end

-- What the cache has or the manager says, which is only asked where that can be waited for.
local function cached(uri, version)
    if not CANNOT_WAIT[get_phase()] then
        return cache(uri, version, refresh, uri, version)
    end
    local ok, value, err = pcall(cache, uri, version, refuse)
    if ok then
        return value, err
    end
    return nil, value
end

local function fetch_kept(uri)
    make_caches()
    if not starts_with(uri, PREFIX) then
        return cache(uri, 0, _M.fetch_by_uri, uri)
    end
    local version = version_of(uri)
    local value, err = cached(uri, version)
    if value ~= nil then
        return value
    end
    local last = last_good_of(uri, version)
    if last then
        return last.value
    end
    return nil, err
end

local function fetch(uri, use_cache)
    return (use_cache and fetch_kept or _M.fetch_by_uri)(uri)
end

--- As `fetch_by_uri`; what was asked for before is not asked for again for `apisix.lru.secret.ttl` seconds, and a manager that fails
-- does not take its last value along. In phases that cannot wait: what is known already.
function _M.fetch_known(uri)
    return fetch(uri, true)
end

--- An error of `fetch_by_uri` as a log may have it: those of APISIX end in the value that could not be read.
function _M.reason(err)
    return (gsub(err or "there is no such value", ", %l+: .*$", "", 1))
end

local function resolve(refs, use_cache)
    for key, value in pairs(refs) do
        if type(value) == "table" then
            resolve(value, use_cache)
        elseif _M.is_reference(value) then
            local found, err = fetch(value, use_cache)
            if found ~= nil then
                refs[key] = found
            else
                log.error("failed to resolve secret reference: ", value, ", field: ", tostring(key),
                    ", err: ", _M.reason(err))
            end
        end
    end
    return refs
end

--- Replaces the references among the texts of `conf`, tables inside included. One that cannot be resolved stays, with a line
-- of error.log.
function _M.fetch_in_place(conf)
    return resolve(conf, true)
end

--- A copy of the table `refs` with its references replaced; nil for what is no table. `use_cache`: what is known is not
-- asked for again. One that cannot be resolved stays, with a line of error.log.
function _M.fetch_secrets(refs, use_cache)
    if type(refs) ~= "table" then
        return nil
    end
    log.info("retrieve secrets refs")
    return resolve(deepcopy(refs), use_cache)
end

--- Whether there is a reference among the texts of `conf`, tables inside included.
function _M.has_secret_ref(conf)
    for _, value in pairs(conf) do
        if type(value) == "table" and _M.has_secret_ref(value) or _M.is_reference(value) then
            return true
        end
    end
    return false
end

local function collect(conf, out)
    for _, value in pairs(conf) do
        if type(value) == "table" then
            collect(value, out)
        elseif _M.is_reference(value) then
            out[#out + 1] = value
        end
    end
    return out
end

--- A function that gives `conf` with its references replaced; nil for a conf without any. It gives the same table until
-- one of the values changes, so that what a plugin keeps by its conf stays found.
function _M.bind(conf)
    local uris = collect(conf, {})
    if #uris == 0 then
        return nil
    end
    local values, resolved = {}, nil
    return function()
        local same = resolved ~= nil
        for i = 1, #uris do
            local value = fetch(uris[i], true)
            if value ~= values[i] then
                values[i], same = value, false
            end
        end
        if not same then
            resolved = resolve(deepcopy(conf), true)
        end
        return resolved
    end
end

--- Makes ready what the first look-up would.
function _M.init_worker()
    make_caches()
end

return _M
