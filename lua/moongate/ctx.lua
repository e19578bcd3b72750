--- The plugins' `ctx`: one table per request, filled on demand, used again after the request.

local native = require("moongate.native").plugin
local request = require("moongate.request")
local new_tab, clear_tab = require("table.new"), require("table.clear")
local ngx = ngx
local rawset, setmetatable, tostring, type = rawset, setmetatable, tostring, type

local _M = {}

-- Contexts that wait for a request: as many as requests are usually in flight on one worker.
local MAX_POOLED = 512

local ctxs, clear_request = request.ctxs, request.clear
local pool, pooled = {}, 0

-- ctx.var -------------------------------------------------------------------------------------------------------

local getters, uncached = {}, {}

local var_mt = {}

function var_mt.__index(var, name)
    local getter = getters[name]
    if getter then
        local value = getter(request.ctx())
        if value ~= nil and not uncached[name] then rawset(var, name, value) end
        return value
    end
    local value = ngx.var[name]
    return value
end

function var_mt.__newindex(var, name, value)
    local kind = type(value)
    if kind == "string" or kind == "number" or kind == "boolean" then
        ngx.var[name] = tostring(value)
    elseif value == nil then
        ngx.var[name] = nil
    else
        -- No variable holds a table: it stays with the face.
        rawset(var, name, value)
    end
end

--- A new face over the variables of whatever request runs.
function _M.var()
    return setmetatable({}, var_mt)
end

--- Adds a variable: `getter(ctx)` gives its value.
function _M.register_var(name, getter, opts)
    getters[name] = getter
    uncached[name] = opts and opts.no_cacheable or nil
end

-- ctx -----------------------------------------------------------------------------------------------------------

-- Resources as tables, by uid; they go when no request uses them.
local resources = setmetatable({}, { __mode = "v" })

--- The matched `route`, `service` or `upstream` as `{ key, value, modifiedIndex, createdIndex }`, or nil.
local function resource(kind)
    local uid = native.matched_uid(kind)
    if uid == 0 then return nil end
    local known = resources[uid]
    if not known then
        local value, id, modified, created = native.matched(kind)
        if value.id == nil then value.id = id end
        known = {
            key = "/apisix/" .. kind .. "s/" .. id, value = value,
            modifiedIndex = modified, createdIndex = created, orig_modifiedIndex = modified,
            has_domain = false, update_count = 0, clean_handlers = {},
        }
        resources[uid] = known
    end
    return known
end

local lazy = {}

function lazy.matched_route() return resource("route") end
function lazy.service() return resource("service") end

function lazy.matched_upstream()
    local up = resource("upstream")
    if up then return up.value end
    local route, service = resource("route"), resource("service")
    return route and route.value.upstream or service and service.value.upstream
end

function lazy.route_id()
    local route = resource("route")
    return route and route.value.id
end

function lazy.route_name()
    local route = resource("route")
    return route and route.value.name
end

function lazy.service_id()
    local service = resource("service")
    return service and service.value.id
end

function lazy.service_name()
    local service = resource("service")
    return service and service.value.name
end

function lazy.curr_req_matched()
    return native.captures()
end

local ctx_mt = {}

function ctx_mt.__index(ctx, name)
    local make = lazy[name]
    if make then
        local value = make()
        rawset(ctx, name, value)
        return value
    end
end

--- The context of slot `at`, made ready for a plan's owner.
function _M.begin(at, scope)
    local ctx
    if pooled > 0 then
        ctx = pool[pooled]
        pool[pooled] = nil
        pooled = pooled - 1
    else
        ctx = setmetatable(new_tab(0, 24), ctx_mt)
        ctx.var = _M.var()
    end
    ctx.conf_type, ctx.conf_id, ctx.conf_version = scope.conf_type, scope.conf_id, scope.conf_version
    ctx.plugins = scope.plugins
    ctxs[at] = ctx
    return ctx
end

--- The request of slot `at` has ended.
function _M.clear(at)
    local ctx = ctxs[at]
    clear_request(at)
    if not ctx then return end
    ctxs[at] = nil
    if pooled < MAX_POOLED then
        local var = ctx.var
        clear_tab(ctx)
        if type(var) == "table" then clear_tab(var) else var = _M.var() end
        rawset(ctx, "var", var)
        pooled = pooled + 1
        pool[pooled] = ctx
    end
end

return _M
