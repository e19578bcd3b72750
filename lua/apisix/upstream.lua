--- `apisix.upstream`: which upstream the request goes to.
local native = require("moongate.native").apisix
local core = require("apisix.core")
local items = require("apisix.http.items")
local setmetatable, type = setmetatable, type

local _M = {}

--- Checks an upstream's table: true, or nil and the reason. All phases.
function _M.check_schema(conf)
    return native.check_upstream(core.json.encode(conf))
end

-- conf -> its handle in the gateway, and itself as the gateway has it: with defaults, its nodes an array. Both go with the conf.
local handles = setmetatable({}, { __mode = "k" })
local served = setmetatable({}, { __mode = "k" })

-- Upstreams that plugins name by a key and a version: their balancer's state outlives the request.
local named = core.lrucache.new({ ttl = 300, count = 256 })

local function make(conf)
    -- What `set` is told of the route that it is for is no part of an upstream.
    local plain = core.table.clone(conf)
    plain.parent, plain.original_nodes, plain.resource_key, plain.resource_version = nil, nil, nil, nil
    local text, encode_err = core.json.encode(plain)
    if not text then
        return nil, encode_err
    end
    local handle, err = native.make_upstream(text)
    return handle, err or text
end

local function handle_of(conf)
    local handle = handles[conf]
    if not handle then
        local text
        handle, text = make(conf)
        if not handle then
            return nil, text
        end
        handles[conf], served[conf] = handle, native.served_upstream(text)
    end
    return handle
end

-- What `ctx` tells of the upstream from here on; what is nil it finds out when it is asked.
local function take(ctx, handle, matched, conf, key, version)
    native.choose_upstream(handle)
    ctx.matched_upstream = matched
    ctx.upstream_conf, ctx.upstream_key, ctx.upstream_version, ctx.upstream_scheme = conf, key, version, nil
    -- What plugins write in its place is another.
    ctx._upstream_conf, ctx._upstream_key, ctx._upstream_version = conf, key, version
    return true
end

--- Sends this request to the upstream that the table `conf` describes. Status and body when it cannot be. `ctx.matched_upstream` is
-- that upstream with the defaults of its schema and its nodes as an array, then. Phases: rewrite, access, before_proxy.
function _M.choose(ctx, conf)
    local handle, err = handle_of(conf)
    if not handle then
        core.log.error("failed to use the upstream: ", err)
        return 500, { error_msg = "invalid upstream" }
    end
    take(ctx, handle, served[conf])
end

-- A single node needs no balancer: what a plugin makes of each request may be another under the same key. What nodes a registry
-- knows is remembered with the upstream.
local function is_one(conf)
    local nodes = conf.nodes
    if conf.discovery_type and conf.service_name then
        return false
    end
    return type(nodes) ~= "table" or core.table.nkeys(nodes) <= 1
end

--- Sends this request to the upstream that the table `conf` describes: true, or nil and the reason. Of several nodes the
-- balancer goes on where the last request with the same `key` and `version` has left it, with the nodes that it had then.
-- Phases: rewrite, access, before_proxy.
function _M.set(ctx, key, version, conf)
    local handle, err
    if key == nil or is_one(conf) then
        handle, err = handle_of(conf)
    else
        handle, err = named(key, version, make, conf)
    end
    if not handle then
        return nil, err
    end
    return take(ctx, handle, conf, conf, key, version)
end

--- Sends this request to the upstream of the route's item, or of `ctx.matched_upstream`. Nothing, or a status and the reason.
-- The gateway does so by itself; a plugin calls it to undo what another has chosen. Phases: rewrite, access, before_proxy.
function _M.set_by_route(route, ctx)
    local value = route and route.value or {}
    local conf = value.upstream_id and _M.get_by_id(value.upstream_id) or value.upstream or ctx.matched_upstream
    if not conf then
        return 503, "missing upstream configuration in Route or Service"
    end
    local code, body = _M.choose(ctx, conf)
    return code, body and body.error_msg
end

--- The upstream resource of that id as a table, or nil: with the defaults of its schema and its nodes as an array of
-- `{ host, port, weight, priority }`. The same table until the resource changes: it is for reading.
function _M.get_by_id(id)
    local item = items("upstreams", id)
    return item and item.value
end

_M.schema = core.schema.upstream

return _M
