--- Answers with a given body, or puts text around the upstream's.
local core = require("apisix.core")
local ngx = ngx
local pairs = pairs

local name = "echo"

local _M = {
    version = 0.1,
    priority = 412,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

function _M.idle_in(conf, phase)
    return phase == "body_filter" and not (conf.before_body or conf.body or conf.after_body)
end

function _M.header_filter(conf)
    if conf.before_body or conf.body or conf.after_body then
        core.response.clear_header_as_body_modified()
    end
    for field, value in pairs(conf.headers or {}) do
        core.response.set_header(field, value)
    end
end

-- The text that replaces the upstream's body goes out once, with the first chunk.
local function body_of(conf, ctx, chunk)
    if not conf.body then
        return chunk
    end
    return ctx.echo_started and "" or conf.body
end

function _M.body_filter(conf, ctx)
    local chunk, eof = ngx.arg[1] or "", ngx.arg[2]
    local out = body_of(conf, ctx, chunk)
    if conf.before_body and not ctx.echo_started then
        out = conf.before_body .. out
    end
    ctx.echo_started = true
    if conf.after_body and eof then
        out = out .. conf.after_body
    end
    ngx.arg[1] = out
end

return _M
