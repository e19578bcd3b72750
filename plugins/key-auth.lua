--- Identifies the consumer by an API key in a header or the query.
local core = require("apisix.core")
local auth = require("apisix.utils.auth")
local consumer_mod = require("apisix.consumer")

local name = "key-auth"
local schemas = core.schema.of_plugin(name)
local get_header = core.request.header
local set_response_header = core.response.set_header

local _M = {
    version = 0.1,
    priority = 2500,
    type = "auth",
    name = name,
    schema = schemas.schema,
    consumer_schema = schemas.consumer_schema,
}

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_CONSUMER then
        return core.schema.check(_M.consumer_schema, conf)
    end
    return core.schema.check(_M.schema, conf)
end

-- The key and whether it came in a header.
local function read_key(conf, ctx)
    local key = get_header(ctx, conf.header)
    if key then
        return key, true
    end
    local value = ctx.var["arg_" .. conf.query]
    if not value then
        return nil
    end
    local args = core.request.get_uri_args(ctx)
    key = args[conf.query]
    return type(key) == "table" and key[1] or key, false
end

local function hide(conf, ctx, in_header)
    if in_header then
        core.request.set_header(ctx, conf.header, nil)
        return
    end
    local args = core.request.get_uri_args(ctx)
    args[conf.query] = nil
    core.request.set_uri_args(ctx, args)
end

local function identify(conf, ctx)
    local key, in_header = read_key(conf, ctx)
    if not key then
        return nil, nil, "Missing API key in request"
    end
    local consumer, consumer_conf = consumer_mod.find_consumer(name, "key", key)
    if not consumer then
        core.log.warn("invalid api key: consumer not found")
        return nil, nil, "Invalid API key in request"
    end
    if conf.hide_credentials then
        hide(conf, ctx, in_header)
    end
    return consumer, consumer_conf
end

function _M.rewrite(conf, ctx)
    local consumer, consumer_conf, err = identify(conf, ctx)
    if not consumer then
        if not conf.anonymous_consumer then
            set_response_header("WWW-Authenticate", 'apikey realm="' .. conf.realm .. '"')
            return 401, { message = err }
        end
        consumer, consumer_conf, err = consumer_mod.get_anonymous_consumer(conf.anonymous_consumer)
        if not consumer then
            set_response_header("WWW-Authenticate", 'apikey realm="' .. conf.realm .. '"')
            return auth.refuse_anonymous(err)
        end
    end
    consumer_mod.attach_consumer(ctx, consumer, consumer_conf)
end

return _M
