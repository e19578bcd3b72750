--- `apisix.utils.log-util`: what a logger plugin's entry holds.
local core = require("apisix.core")
local content_decode = require("apisix.utils.content-decode")
local plugin = require("apisix.plugin")
local expr = require("resty.expr.v1")
local ngx = ngx
local resolve_var = core.utils.resolve_var
local ipairs, pairs, setmetatable, tonumber, tostring, type = ipairs, pairs, setmetatable, tonumber, tostring, type
local sub, byte = string.sub, string.byte

local _M = {}

-- Objects in a log_format are followed so deep, the format itself being the first; what lies deeper is left out.
local MAX_FORMAT_DEPTH = 5
local DEFAULT_MAX_BODY_BYTES = 512 * 1024
local DEFAULT_MAX_PENDING = 8192
local DOLLAR = byte("$")

-- expression tables -> compiled; they go with their conf.
local compiled = setmetatable({}, { __mode = "k" })

local function holds(rules, ctx)
    local made = compiled[rules]
    if not made then
        local err
        made, err = expr.new(rules)
        if not made then
            core.log.error("generate log expr err: ", err)
            return false
        end
        compiled[rules] = made
    end
    return made:eval(ctx.var)
end

--- Checks the expressions of a logger's conf: true, or false and the reason.
function _M.check_log_schema(conf)
    for _, field in ipairs({ "include_req_body_expr", "include_resp_body_expr" }) do
        if conf[field] then
            local ok, err = expr.new(conf[field])
            if not ok then
                return false, "failed to validate the '" .. field .. "' expression: " .. tostring(err)
            end
        end
    end
    return true
end

--- How many entries may wait for a logger before new ones are dropped.
function _M.max_pending_entries(name)
    local metadata = plugin.plugin_metadata(name)
    return metadata and metadata.value and metadata.value.max_pending_entries or DEFAULT_MAX_PENDING
end

-- Objects that were told of as too deep; they go with their format.
local told = setmetatable({}, { __mode = "k" })

local function too_deep(object)
    if not told[object] then
        told[object] = true
        core.log.warn("log_format nesting exceeds max depth ", MAX_FORMAT_DEPTH, ", truncating")
    end
    return {}
end

local function fill(format, ctx, depth)
    local out = {}
    for key, value in pairs(format) do
        if type(value) == "table" then
            out[key] = depth < MAX_FORMAT_DEPTH and fill(value, ctx, depth + 1) or too_deep(value)
        elseif value == "$status" then
            -- A number in every logger's documentation.
            out[key] = tonumber(ctx.var.status)
        elseif type(value) == "string" and byte(value) == DOLLAR and not value:find("[^%w_$]") then
            out[key] = ctx.var[sub(value, 2)]
        elseif type(value) == "string" then
            out[key] = resolve_var(value, ctx.var)
        else
            out[key] = value
        end
    end
    return out
end

local function latencies(ctx)
    local total = (tonumber(ctx.var.request_time) or 0) * 1000
    local upstream = tonumber((tostring(ctx.var.upstream_response_time or "")):match("([%d.]+)%s*$"))
    upstream = upstream and upstream * 1000
    local own = upstream and math.max(total - upstream, 0) or total
    return total, upstream, own
end

local function full_entry(conf, ctx)
    local var = ctx.var
    local total, upstream, own = latencies(ctx)
    local consumer = ctx.consumer_name and { username = ctx.consumer_name, group_id = ctx.consumer_group_id }
    return {
        request = {
            url = var.scheme .. "://" .. (var.host or "") .. ":" .. (var.server_port or "") .. (var.request_uri or ""),
            uri = var.request_uri,
            method = ngx.req.get_method(),
            headers = ngx.req.get_headers(0),
            querystring = ngx.req.get_uri_args(0),
            size = tonumber(var.request_length),
            body = _M.request_body(conf, ctx),
        },
        response = {
            status = ngx.status,
            headers = ngx.resp.get_headers(0),
            size = tonumber(var.bytes_sent),
            body = conf.include_resp_body and ctx.resp_body or nil,
        },
        server = { hostname = core.utils.gethostname(), version = core.version.VERSION },
        upstream = var.upstream_addr,
        service_id = ctx.service_id or "",
        route_id = ctx.route_id,
        consumer = consumer,
        client_ip = core.request.get_remote_client_ip(ctx),
        start_time = ngx.req.start_time() * 1000,
        latency = total,
        upstream_latency = upstream,
        apisix_latency = own,
    }
end

--- Everything of the request and its response, as a table. The first argument is `ngx`, as APISIX has it; `ctx` is the
-- request's by default. Phases: log.
function _M.get_full_log(_, conf, ctx)
    return full_entry(conf, ctx or ngx.ctx.api_ctx)
end

--- Has `f(ngx, conf)` stand in for `get_full_log` in every logger of this VM: for tests of loggers.
function _M.inject_get_full_log(f)
    _M.get_full_log = f
end

--- The request's body for the log when the conf asks for it; what was not read by then is not there.
function _M.request_body(conf, ctx)
    if not conf.include_req_body then
        return nil
    end
    if conf.include_req_body_expr and not holds(conf.include_req_body_expr, ctx) then
        return nil
    end
    local body = ctx._logged_request_body
    local limit = conf.max_req_body_bytes or DEFAULT_MAX_BODY_BYTES
    return body and sub(body, 1, limit)
end

--- `idle_in` of a plugin that logs: without bodies there is nothing to do before the log phase.
function _M.idle_in(conf, phase)
    return phase == "access" and not conf.include_req_body or phase == "body_filter" and not conf.include_resp_body
end

--- Access phase: reads the request's body when it is to be logged.
function _M.collect_request_body(conf, ctx)
    if not conf.include_req_body or ctx._logged_request_body then
        return
    end
    if conf.include_req_body_expr and not holds(conf.include_req_body_expr, ctx) then
        return
    end
    local body, err = core.request.get_body(nil, ctx)
    if err then
        core.log.error("fail to get request body: ", err)
    end
    ctx._logged_request_body = body
end

--- APISIX's name for `collect_request_body`.
function _M.check_and_read_req_body(conf, ctx)
    return _M.collect_request_body(conf, ctx)
end

-- A body in an encoding that is known, as the client reads it, or what of it came before it was cut; as it is, where nothing decodes.
local function decoded(body)
    local encoding = ngx.header["Content-Encoding"]
    local decode = type(encoding) == "string" and content_decode.dispatch_decoder(encoding)
    if not decode then
        return body
    end
    local text, err, part = decode(body)
    if text then
        return text
    elseif part ~= "" then
        return part
    end
    core.log.warn("failed to decode a response's body for the log: ", err)
    return body
end

--- body_filter phase: gathers the response's body, up to the conf's bound, when it is to be logged; gzip and deflate are undone.
-- It is `ctx.resp_body` then, and the variable `resp_body`.
function _M.collect_body(conf, ctx)
    if not conf.include_resp_body then
        return
    end
    if conf.include_resp_body_expr and not holds(conf.include_resp_body_expr, ctx) then
        return
    end
    local limit = conf.max_resp_body_bytes or DEFAULT_MAX_BODY_BYTES
    local body = core.response.hold_body_chunk(ctx, true, limit, conf)
    if body then
        ctx.resp_body = sub(decoded(body), 1, limit)
    end
end

-- A format of the conf, or else of the plugin's metadata; nil when it is empty or there is none.
local function format_of(name, conf, field)
    if conf[field] and next(conf[field]) then
        return conf[field]
    end
    local metadata = plugin.plugin_metadata(name)
    local format = metadata and metadata.value and metadata.value[field]
    return format and next(format) and format or nil
end

--- `format` with its variables filled in (`"$remote_addr"`, tables inside included), as a new table. Phases: those of the variables.
function _M.get_custom_format_log(ctx, format)
    return fill(format, ctx, 1)
end

--- Has `f(ctx, format)` stand in for `get_custom_format_log` in every logger of this VM: for tests of loggers.
function _M.inject_get_custom_format_log(f)
    _M.get_custom_format_log = f
end

--- Milliseconds of the request as a whole, of the upstream (nil without one), and of the gateway. Phases: log.
function _M.latency_details_in_ms(ctx)
    return latencies(ctx)
end

--- The request as it came, as a text: request line, headers, and with `conf.include_req_body` its body. Phases: log.
function _M.get_req_original(ctx, conf)
    local lines = { ctx.var.request }
    for name, value in pairs(ngx.req.get_headers(0)) do
        for _, one in ipairs(type(value) == "table" and value or { value }) do
            lines[#lines + 1] = name .. ": " .. tostring(one)
        end
    end
    return table.concat(lines, "\r\n") .. "\r\n\r\n" .. (_M.request_body(conf, ctx) or "")
end

local function formatted(format, ctx)
    local entry = _M.get_custom_format_log(ctx, format)
    entry.route_id = ctx.route_id
    entry.service_id = ctx.service_id
    return entry
end

--- The entry for this request. After `log_format` when the conf or the plugin's metadata has one: then it has the format's fields,
-- `route_id` and `service_id`, and the response's body only where it names it (`$resp_body`). Else everything, and over it what
-- `log_format_extra` has.
function _M.get_log_entry(name, conf, ctx)
    local format = format_of(name, conf, "log_format")
    if format then
        return formatted(format, ctx)
    end
    local entry = _M.get_full_log(ngx, conf, ctx)
    local extra = format_of(name, conf, "log_format_extra")
    for key, value in pairs(extra and fill(extra, ctx, 1) or {}) do
        entry[key] = value
    end
    return entry
end

--- The request's start in seconds, as a text of RFC 3339.
function _M.get_rfc3339_zulu_timestamp(timestamp)
    local now = timestamp or ngx.now()
    return os.date("!%Y-%m-%dT%H:%M:%S", math.floor(now)) .. ("%.3fZ"):format(now % 1):sub(2)
end

return _M
