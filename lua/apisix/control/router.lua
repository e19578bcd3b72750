--- `apisix.control.router`: the endpoints that plugins and registries add to the control API (`_M.control_api()`, control-api.md).
local api_router = require("apisix.api_router")
local config_local = require("apisix.core.config_local")
local json = require("apisix.core.json")
local tostring, type = tostring, type

local _M = {}

local function names_parameters()
    local control = config_local.local_conf().apisix.control
    return type(control) == "table" and control.router == "radixtree_uri_with_parameter"
end

--- Runs the endpoint of a plugin or of a registry at `uri`, such as `/v1/plugin/example-plugin/hello`, for the request that runs:
--- true and what it returns (a status and a body), or false when there is none. All phases.
function _M.match(uri)
    local handler, matched = api_router.find("control_api", uri, ngx.req.get_method(), names_parameters())
    if not handler then return require("apisix.discovery.init").control(uri, ngx.req.get_method()) end
    local ctx = ngx.ctx.api_ctx
    if ctx then ctx.curr_req_matched = matched end
    return true, handler(ctx)
end

--- Answers the request of the control API that runs, whose tables have the slot `at`: status and body, or nothing where no plugin
--- has an endpoint for it. A table becomes JSON.
function _M.serve(at)
    require("moongate.ctx").begin(at, {})
    local found, code, body = _M.match(ngx.var.uri)
    if not found then return nil end
    if type(code) ~= "number" and body == nil then code, body = nil, code end
    if type(body) == "table" then
        body = json.encode(body)
        ngx.header["Content-Type"] = "application/json"
    elseif not ngx.header["Content-Type"] then
        ngx.header["Content-Type"] = "text/plain"
    end
    if not code then code = ngx.status ~= 0 and ngx.status or 200 end
    return code, body ~= nil and tostring(body) or nil
end

return _M
