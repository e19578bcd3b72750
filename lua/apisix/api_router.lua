--- The endpoints that plugins offer (`_M.api()`), served where the public-api plugin exposes them.
local plugin = require("apisix.plugin")
local ipairs, type = ipairs, type

local _M = {}

-- plugins generation -> uri -> list of { methods, handler }. One generation is alive in a VM.
local endpoints, built_of

local function collect()
    local out = {}
    for _, loaded in ipairs(plugin.plugins()) do
        for _, api in ipairs(type(loaded.api) == "function" and loaded.api() or {}) do
            local methods = {}
            for _, method in ipairs(api.methods or {}) do
                methods[method] = true
            end
            for _, uri in ipairs(api.uris or { api.uri }) do
                out[uri] = out[uri] or {}
                table.insert(out[uri], { methods = methods, handler = api.handler })
            end
        end
    end
    return out
end

--- Runs the endpoint at `uri`: its status and body, or nil when there is none for this method.
function _M.match(uri, ctx)
    local generation = plugin.plugins()
    if built_of ~= generation then
        endpoints, built_of = collect(), generation
    end
    local method = ctx.var.request_method
    for _, endpoint in ipairs(endpoints[uri] or {}) do
        if not next(endpoint.methods) or endpoint.methods[method] then
            return endpoint.handler(ctx)
        end
    end
    return nil
end

return _M
