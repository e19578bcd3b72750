--- Serves an endpoint that a plugin offers (`_M.api`) on this route.
local core = require("apisix.core")
local api_router = require("apisix.api_router")

local name = "public-api"

local _M = {
    version = 0.1,
    priority = 501,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

function _M.access(conf, ctx)
    local code, body = api_router.match(conf.uri or ctx.var.uri, ctx)
    if code or body then
        return code or 200, body
    end
    return 404
end

return _M
