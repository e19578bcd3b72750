--- An example of a plugin, which plugin-develop.md of APISIX refers to: says in error.log when it runs, and sends requests to
-- `ip` and `port` where they are given.
local core = require("apisix.core")
local plugin = require("apisix.plugin")
local upstream = require("apisix.upstream")

local name = "example-plugin"
local schemas = core.schema.of_plugin(name)

local _M = {
    version = 0.1,
    priority = 0,
    name = name,
    schema = schemas.schema,
    metadata_schema = schemas.metadata_schema,
}

function _M.check_schema(conf, kind)
    if kind == core.schema.TYPE_METADATA then
        return core.schema.check(_M.metadata_schema, conf)
    end
    return core.schema.check(_M.schema, conf)
end

function _M.init()
    local attr = plugin.plugin_attr(name)
    if attr then
        core.log.info(name, " get plugin attr val: ", attr.val)
    end
end

local function say(phase, conf)
    core.log.warn("plugin ", phase, " phase, conf: ", core.json.delay_encode(conf))
end

function _M.rewrite(conf)
    say("rewrite", conf)
end

-- conf -> the upstream that it stands for; goes with the conf.
local upstreams = setmetatable({}, { __mode = "k" })

local function upstream_of(conf)
    local made = upstreams[conf]
    if not made then
        made = { type = "roundrobin", nodes = { { host = conf.ip, port = conf.port, weight = 1 } } }
        upstreams[conf] = made
    end
    return made
end

function _M.access(conf, ctx)
    say("access", conf)
    if not conf.ip then
        return
    end
    local made = upstream_of(conf)
    local ok, err = upstream.set(ctx, made.type .. "#route_" .. ctx.route_id, ctx.conf_version, made)
    if not ok then
        return 500, err
    end
end

function _M.header_filter(conf)
    say("header_filter", conf)
end

local function say_eof(phase, conf)
    core.log.warn("plugin ", phase, " phase, eof: ", ngx.arg[2], ", conf: ", core.json.delay_encode(conf))
end

function _M.body_filter(conf)
    say_eof("body_filter", conf)
end

function _M.delayed_body_filter(conf)
    say_eof("delayed_body_filter", conf)
end

function _M.log(conf)
    say("log", conf)
end

local function hello()
    if ngx.req.get_uri_args().json then
        return 200, { msg = "world" }
    end
    return 200, "world\n"
end

function _M.control_api()
    return { { methods = { "GET" }, uris = { "/v1/plugin/example-plugin/hello" }, handler = hello } }
end

return _M
