--- Answers with a redirect.
local core = require("apisix.core")
local plugin = require("apisix.plugin")
local ngx = ngx
local re_match, re_sub = ngx.re.match, ngx.re.sub
local resolve_var = core.utils.resolve_var
local find = string.find
local ipairs, math_random, tonumber, type = ipairs, math.random, tonumber, type

local name = "redirect"

local _M = {
    version = 0.1,
    priority = 900,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    if conf.regex_uri then
        local _, _, re_err = re_sub("/fake_uri", conf.regex_uri[1], conf.regex_uri[2], "jo")
        if re_err then
            return false, "invalid regex_uri(" .. conf.regex_uri[1] .. ", " .. conf.regex_uri[2] .. "): " .. re_err
        end
    end
    if conf.http_to_https and conf.append_query_string then
        return false, "only one of `http_to_https` and `append_query_string` can be configured."
    end
    return true
end

local function listen_ports(ssl)
    local ports = {}
    for _, listen in ipairs(ssl and ssl.enable and type(ssl.listen) == "table" and ssl.listen or {}) do
        ports[#ports + 1] = type(listen) == "table" and listen.port or tonumber(listen)
    end
    return ports
end

local function https_port()
    local attr = plugin.plugin_attr(name)
    if attr and attr.https_port then
        return attr.https_port
    end
    local local_conf = core.config_local.local_conf()
    local ports = listen_ports(local_conf.apisix and local_conf.apisix.ssl)
    return #ports > 0 and ports[math_random(#ports)] or 443
end

local function to_https(ctx)
    local port = https_port()
    local authority = ctx.var.host .. (port == 443 and "" or ":" .. port)
    local method = ctx.var.request_method
    -- 308 keeps the method, which a browser would turn into GET on 301.
    local code = (method == "GET" or method == "HEAD") and 301 or 308
    return "https://" .. authority .. ctx.var.request_uri, code
end

local function target_of(conf, ctx)
    if conf.http_to_https then
        if (ctx.var.http_x_forwarded_proto or ctx.var.scheme) == "http" then
            return to_https(ctx)
        end
        return nil
    end
    if conf.uri then
        return resolve_var(conf.uri, ctx.var), conf.ret_code
    end
    -- `http_to_https: false` alone redirects nobody.
    if not conf.regex_uri then
        return nil
    end
    local uri = ctx.var.uri
    if not re_match(uri, conf.regex_uri[1], "jo") then
        return nil
    end
    local target, _, err = re_sub(uri, conf.regex_uri[1], conf.regex_uri[2], "jo")
    return target, conf.ret_code, err
end

function _M.rewrite(conf, ctx)
    local target, code, err = target_of(conf, ctx)
    if err then
        core.log.error("failed to substitute the uri ", ctx.var.uri, ": ", err)
        return 500, { error_msg = "failed to substitute the uri" }
    end
    if not target then
        return
    end
    if conf.encode_uri then
        target = core.utils.uri_safe_encode(target)
    end
    local args = ctx.var.args
    if conf.append_query_string and args and args ~= "" then
        target = target .. (find(target, "?", 1, true) and "&" or "?") .. args
    end
    core.response.set_header("Location", target)
    return code
end

return _M
