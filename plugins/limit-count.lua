--- Limits requests per key and time window.
local core = require("apisix.core")
local limiter = require("apisix.plugins.limit-count.init")

local _M = {
    version = 0.5,
    priority = 1002,
    name = "limit-count",
    schema = limiter.schema,
    metadata_schema = limiter.metadata_schema,
}

function _M.check_schema(conf, schema_type)
    return limiter.check_schema(conf, schema_type)
end

function _M.access(conf, ctx)
    return limiter.rate_limit(conf, ctx, _M.name, 1)
end

-- A group is of whole plugins, by their conf.
local function check_action(conf)
    if conf.group then
        return false, "group is not supported"
    end
    return limiter.check_schema(conf)
end

--- For the workflow plugin: runs this plugin as an action.
function _M.workflow_handler()
    return {
        check_schema = check_action,
        handler = function(conf, ctx)
            return limiter.rate_limit(conf, ctx, _M.name, 1)
        end,
    }
end

core.ctx.register_var("rate_limiting_info", function(ctx)
    local info = limiter.info(ctx)
    return info and core.json.stably_encode(info)
end, { no_cacheable = true })

return _M
