--- Identifies the consumer by user and password (RFC 7617).
local core = require("apisix.core")
local auth = require("apisix.utils.auth")
local consumer_mod = require("apisix.consumer")
local ngx_decode = ngx.decode_base64
local find, sub, lower = string.find, string.sub, string.lower

local name = "basic-auth"
local schemas = core.schema.of_plugin(name)

local _M = {
    version = 0.1,
    priority = 2520,
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

-- User and password, or nil, nil and the reason.
local function parse(header)
    local space = find(header, " ", 1, true)
    if not space or lower(sub(header, 1, space - 1)) ~= "basic" then
        return nil, nil, "Invalid authorization header format"
    end
    local decoded = ngx_decode((sub(header, space + 1):gsub("%s+", "")))
    if not decoded then
        return nil, nil, "Failed to decode authentication header: " .. sub(header, space + 1)
    end
    local colon = find(decoded, ":", 1, true)
    if not colon then
        return nil, nil, "Split authorization err: invalid decoded data: " .. decoded
    end
    return (sub(decoded, 1, colon - 1):gsub("%s+", "")), (sub(decoded, colon + 1):gsub("%s+", ""))
end

local function identify(ctx)
    local header = core.request.header(ctx, "Authorization")
    if not header then
        return nil, nil, "Missing authorization in request"
    end
    local username, password, err = parse(header)
    if not username then
        core.log.warn(err)
        return nil, nil, "Invalid authorization in request"
    end
    local consumer, consumer_conf = consumer_mod.find_consumer(name, "username", username)
    if not consumer then
        return nil, nil, "Invalid user authorization"
    end
    core.log.info("find consumer ", username)
    if not core.utils.equal_in_constant_time(consumer.auth_conf.password, password) then
        return nil, nil, "Invalid user authorization"
    end
    return consumer, consumer_conf
end

function _M.rewrite(conf, ctx)
    local consumer, consumer_conf, err = identify(ctx)
    if not consumer and conf.anonymous_consumer then
        consumer, consumer_conf, err = consumer_mod.get_anonymous_consumer(conf.anonymous_consumer)
        if not consumer then
            core.response.set_header("WWW-Authenticate", 'Basic realm="' .. conf.realm .. '"')
            return auth.refuse_anonymous(err)
        end
    end
    if not consumer then
        core.response.set_header("WWW-Authenticate", 'Basic realm="' .. conf.realm .. '"')
        return 401, { message = err }
    end
    if conf.hide_credentials then
        core.request.set_header(ctx, "Authorization", nil)
    end
    consumer_mod.attach_consumer(ctx, consumer, consumer_conf)
end

return _M
