--- The plugins' `ctx`: one table per request, filled on demand, used again after the request.

local native = require("moongate.native").plugin
local fast = require("moongate.native").fast
local slot, var_set = fast.slot, fast.var_set
local request = require("moongate.request")
local new_tab, clear_tab = require("table.new"), require("table.clear")
local ngx = ngx
local byte, find = string.byte, string.find
local error, ipairs, pairs, pcall, rawget, rawset, require, setmetatable, tostring, type =
    error, ipairs, pairs, pcall, rawget, rawset, require, setmetatable, tostring, type

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

-- The response's body as loggers have gathered it, once they have.
function getters.resp_body(ctx)
    local gathered = ctx and ctx.resp_body
    if gathered ~= nil then return gathered end
    return ngx.var.resp_body
end
uncached.resp_body = true

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
    local is_json, posted = native.posted(name)
    if is_json then return posted end
    local value = ngx.var[name]
    if value and (name == "graphql_root_fields" or find(name, "[*]", 1, true)) then return as_list(value) end
    return value
end

local var_mt = {}

function var_mt.__index(var, name)
    if type(name) ~= "string" then error("invalid argument, expect string value", 2) end
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

local texts = { string = true, number = true, boolean = true, ["nil"] = true }

-- 1: it is set; 0, -2, -3: the server does not let it be.
local function set_var(name, value)
    if value == nil then return var_set(name, #name, nil, 0) end
    local text = tostring(value)
    return var_set(name, #name, text, #text)
end

-- What no variable can hold (tables, and whatever the server does not let be written) stays with the face, for the request.
function var_mt.__newindex(var, name, value)
    if type(name) ~= "string" then error("invalid argument, expect string value", 2) end
    local set = texts[type(value)] and set_var(name, value) or 0
    if set == -1 then error("API disabled in the current context", 2) end
    if set == 1 then return end
    rawset(var, name, value)
    local written = rawget(var, "_written")
    if not written then
        written = {}
        rawset(var, "_written", written)
    end
    written[name] = value
end

--- What was written to a face and stays with it, by name; nil for nothing.
function _M.written(var)
    return rawget(var, "_written")
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
-- Those made last stay (`recent`), also when no request has them for a moment: making one costs a check by its schema.
local RECENT = 256
local recent, newest = {}, 0
local resources = setmetatable({}, { __mode = "v", recent = recent })

-- The matched `route` or `service` as `{ key, value, modifiedIndex, createdIndex }`, or nil. The value is as it is in force: with
-- the defaults of its schema, and nodes as an array of `{ host, port, weight, priority }`.
local function resource(kind)
    local uid = native.matched_uid(kind)
    if uid == 0 then return nil end
    local known = resources[uid]
    if not known then
        local value, id, modified, created, has_domain = native.matched(kind)
        if value.id == nil then value.id = id end
        known = {
            key = require("moongate.keys") .. "/" .. kind .. "s/" .. id, value = value,
            modifiedIndex = modified, createdIndex = created, orig_modifiedIndex = modified,
            has_domain = has_domain, update_count = 0, clean_handlers = {},
        }
        resources[uid] = known
        newest = newest % RECENT + 1
        recent[newest] = known
    end
    return known
end

-- Whose plugins run, by slot. Not in the context itself, which would log them all with it.
local scopes = {}

-- Items that stand for several objects: item -> { the items of those, … }.
local parts_of = setmetatable({}, { __mode = "k" })

local function lay(over, on)
    for name, field in pairs(over) do
        if name ~= "plugins" then on[name] = field end
    end
end

-- Puts the confs that the plugins of `running` get in place of what is stored.
local function as_they_run(plugins, running)
    for i = 1, #running, 2 do plugins[running[i].name] = running[i + 1] end
    return plugins
end

-- The route laid over its service; plugins one by one: the service's, plugin_config's, the route's, and as they run for the request
-- those of the plan, a consumer's among them.
local function merged_value(route, service, config, running)
    local value, plugins = {}, {}
    if service then
        lay(service.value, value)
        if route.value.upstream or route.value.upstream_id then value.upstream, value.upstream_id = nil, nil end
    end
    lay(route.value, value)
    for _, item in ipairs({ service or route, config or route, route }) do
        for name, conf in pairs(item.value.plugins or {}) do plugins[name] = conf end
    end
    value.plugins = as_they_run(plugins, running)
    return value
end

local function merged(route, scope)
    local service, config_id = resource("service"), route.value.plugin_config_id
    local config = config_id and require("apisix.http.items")("plugin_configs", config_id)
    local running = scope.plugins or {}
    if not service and not config and not find(scope.conf_type, "&consumer", 1, true) then
        if route.value.plugins then as_they_run(route.value.plugins, running) end
        return route
    end
    local version, parts = route.modifiedIndex, { route }
    if config then version, parts[2] = version .. "#" .. config.modifiedIndex, config end
    if service then version, parts[#parts + 1] = version .. "&" .. service.modifiedIndex, service end
    local own = not service or route.value.upstream or route.value.upstream_id
    local item = {
        key = route.key, value = merged_value(route, service, config, running), modifiedIndex = version,
        createdIndex = route.createdIndex, orig_modifiedIndex = route.modifiedIndex,
        has_domain = (own and route or service).has_domain, update_count = 0, clean_handlers = {},
    }
    parts_of[item] = parts
    return item
end

--- The items that stand for one object each of which `item` is made; nil where it is of one.
function _M.parts(item) return parts_of[item] end

local lazy = {}

-- Made once for a plan, which is for one version of each of them: requests share it.
function lazy.matched_route()
    local route, scope = resource("route"), scopes[slot()]
    -- Functions have one scope for all routes, and nothing that is merged.
    if not route or not scope or not scope.plugins then return route end
    if not scope.route then scope.route = merged(route, scope) end
    return scope.route
end

function lazy.service() return resource("service") end

-- The item of `/upstreams/{id}`, the same that `apisix.upstream.get_by_id` gives.
local function upstream_item(id)
    return require("apisix.http.items")("upstreams", id)
end

function lazy.matched_upstream(ctx)
    local chosen = rawget(ctx, "upstream_id")
    local found = chosen and upstream_item(chosen)
    if found then return found.value end
    local route, service = resource("route"), resource("service")
    local own = route and (route.value.upstream or route.value.upstream_id)
    local value = own and route.value or service and service.value
    if not value then return nil end
    -- An id wins over an upstream beside it.
    local item = value.upstream_id and upstream_item(value.upstream_id)
    return item and item.value or not value.upstream_id and value.upstream or nil
end

-- Upstreams with other nodes than those that are written, by uid; they go when no request uses them.
local apart = setmetatable({}, { __mode = "v" })

local function with_found_nodes(uid, conf)
    local known = apart[uid]
    if not known then
        known = {}
        for name, value in pairs(conf) do known[name] = value end
        known.nodes = native.upstream_nodes()
        apart[uid] = known
    end
    return known
end

-- What the request is sent to: its table, its name for `upstream_key`, its version. nil before it is settled, which is after access.
local function settled(ctx)
    local uid, kind, id, is_apart = native.upstream()
    if not uid then return nil end
    local conf, name, version
    if kind == "plugin" then
        conf, name, version = ctx.matched_upstream, "plugin_" .. uid, uid
    else
        local item = kind == "upstream" and upstream_item(id) or resource(kind)
        if not item then return nil end
        conf = kind == "upstream" and item.value or item.value.upstream
        name, version = kind .. "_" .. item.value.id, item.modifiedIndex
    end
    if type(conf) ~= "table" then return nil end
    if not is_apart then return conf, name, version end
    return with_found_nodes(uid, conf), name, version .. "#" .. uid
end

function lazy.upstream_conf(ctx)
    local conf = settled(ctx)
    -- What plugins write is another.
    rawset(ctx, "_upstream_conf", conf)
    return conf
end

function lazy.upstream_key(ctx)
    local conf, name = settled(ctx)
    local key = conf and (conf.type or "roundrobin") .. "#" .. name
    rawset(ctx, "_upstream_key", key)
    return key
end

function lazy.upstream_version(ctx)
    local _, _, version = settled(ctx)
    rawset(ctx, "_upstream_version", version)
    return version
end

function lazy.upstream_scheme(ctx)
    local conf = settled(ctx)
    return conf and (conf.scheme or "http")
end

function lazy.picked_server()
    local ip, port, name = native.picked()
    return ip and { host = ip, port = port, domain = name }
end

function lazy.balancer_ip()
    local ip = native.picked()
    return ip
end

function lazy.balancer_port()
    local _, port = native.picked()
    return port
end

function lazy.balancer_try_count()
    local _, _, _, tries = native.picked()
    return tries
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
    local read, args, err = pcall(ngx.req.get_post_args, 0)
    if read and not args then native.log_error("the post form is too large: " .. err) end
    return read and args or nil
end

function lazy.curr_req_matched()
    return native.captures()
end

local ctx_mt = {}

function ctx_mt.__index(ctx, name)
    if name == "plugins" then
        local scope = scopes[slot()]
        return scope and scope.plugins
    end
    local make = lazy[name]
    if make then
        local value = make(ctx)
        -- What GraphQL there is changes with the body.
        if name ~= "_graphql" then rawset(ctx, name, value) end
        return value
    end
end

--- The request of slot `at` runs the plugins of another plan from here on.
function _M.rescope(at, scope)
    scopes[at] = scope
    if ctxs[at] then rawset(ctxs[at], "matched_route", nil) end
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
