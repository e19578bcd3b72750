--- The plugins' `ctx`: one table per request, filled on demand, used again after the request.

local native = require("moongate.native").plugin
local slot = require("moongate.native").fast.slot
local request = require("moongate.request")
local new_tab, clear_tab = require("table.new"), require("table.clear")
local ngx = ngx
local byte, find = string.byte, string.find
local pcall, rawget, rawset, require, setmetatable, tostring, type =
    pcall, rawget, rawset, require, setmetatable, tostring, type

local _M = {}

-- Contexts that wait for a request: as many as requests are usually in flight on one worker.
local MAX_POOLED = 512

-- Defaults of config.yaml: what is read of a body for `graphql_x` and for `post_arg.x`.
local DEFAULT_GRAPHQL_BYTES, DEFAULT_POST_MIB = 1048576, 64
local P, G = byte("p"), byte("g")

local ctxs, clear_request = request.ctxs, request.clear
local pool, pooled = {}, 0

-- ctx.var -------------------------------------------------------------------------------------------------------

local getters, uncached = {}, {}

-- `post_arg_x`, `post_arg.x` and `graphql_x` are in the body, which the first who asks for one of them waits for.
local function is_of_body(name)
    local first = byte(name, 1)
    return first == P and find(name, "^post_arg[_.]") or first == G and find(name, "^graphql_")
end

local function max_body_bytes(name)
    local conf = require("apisix.core.config_local").local_conf()
    if byte(name, 1) == G then return conf.graphql and conf.graphql.max_size or DEFAULT_GRAPHQL_BYTES end
    local mib = conf.apisix and conf.apisix.max_post_args_readable_size or DEFAULT_POST_MIB
    return mib > 0 and mib * 1024 * 1024 or math.huge
end

--- Learns what a variable about the body says. Where nothing can wait, the body that was read by then counts.
function _M.learn(name)
    local most = max_body_bytes(name)
    if not native.learn(name, most) and pcall(ngx.req.read_body) then native.learn(name, most) end
end

-- A variable that is a list (`graphql_root_fields`, a path with `[*]`) has commas between its items.
local function as_list(text)
    local out = {}
    for item in text:gmatch("[^,]+") do out[#out + 1] = item end
    return out
end

local function body_var(name)
    _M.learn(name)
    local value = ngx.var[name]
    if value and (name == "graphql_root_fields" or find(name, "[*]", 1, true)) then return as_list(value) end
    return value
end

local var_mt = {}

function var_mt.__index(var, name)
    local getter = getters[name]
    if getter then
        local value = getter(rawget(var, "_ctx") or request.ctx())
        if value ~= nil and not uncached[name] then rawset(var, name, value) end
        return value
    end
    if is_of_body(name) then return body_var(name) end
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

--- A new face over the variables of whatever request runs. Registered variables are asked for `owner`, or its `ctx`.
function _M.var(owner)
    return setmetatable({ _ctx = owner }, var_mt)
end

--- Adds a variable: `getter(ctx)` gives its value.
function _M.register_var(name, getter, opts)
    getters[name] = getter
    native.register_var(name)
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
            key = require("moongate.keys") .. "/" .. kind .. "s/" .. id, value = value,
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

--- What of the request's GraphQL is known: `{ operation, name, root_fields }`, nil where there is none.
function lazy._graphql()
    local operation = ngx.var.graphql_operation
    if not operation then return nil end
    return { operation = operation, name = ngx.var.graphql_name, root_fields = as_list(ngx.var.graphql_root_fields or "") }
end

--- The arguments of a form body that was read.
function lazy.req_post_args()
    local kind = ngx.var.content_type
    if not kind or not find(kind, "application/x-www-form-urlencoded", 1, true) then return nil end
    local read, args = pcall(ngx.req.get_post_args, 0)
    return read and args or nil
end

function lazy.curr_req_matched()
    return native.captures()
end

-- Whose plugins run, by slot. Not in the context itself, which would log them all with it.
local scopes = {}

local ctx_mt = {}

function ctx_mt.__index(ctx, name)
    if name == "plugins" then
        local scope = scopes[slot()]
        return scope and scope.plugins
    end
    local make = lazy[name]
    if make then
        local value = make()
        rawset(ctx, name, value)
        return value
    end
end

--- The request of slot `at` runs the plugins of another plan from here on.
function _M.rescope(at, scope)
    scopes[at] = scope
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
    scopes[at] = scope
    ctxs[at] = ctx
    return ctx
end

--- The request of slot `at` has ended.
function _M.clear(at)
    local ctx = ctxs[at]
    clear_request(at)
    if not ctx then return end
    ctxs[at], scopes[at] = nil, nil
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
