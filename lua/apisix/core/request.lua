--- `core.request`: the request's head and body.
--
-- Every function takes the plugin context first and works without it, too. Those that read the body wait for it.
local log = require("apisix.core.log")
local ngx = ngx
local req = ngx.req
local pcall = pcall
local tonumber = tonumber
local tostring = tostring
local type = type
local ipairs = ipairs


local find = string.find
local sub = string.sub

local get_headers = req.get_headers
local set_header = req.set_header
local clear_header = req.clear_header
local get_uri_args = req.get_uri_args
local escape_uri = ngx.escape_uri
local native = require("moongate.native").req
local header_value, add_header = native.header, native.add_header

local _M = {}

local function context(ctx)
    return ctx or ngx.ctx.api_ctx
end

-- A raised error carries where it was raised; the reason alone goes on.
local function reason(err)
    return tostring(err)
end

--- Every request header: a table by lower-case name; a repeated one is an array. No bound on their number.
function _M.headers(ctx)
    ctx = context(ctx)
    if not ctx then
        return get_headers(0)
    end
    local headers = ctx.headers
    if not headers then
        headers = get_headers(0)
        ctx.headers = headers
    end
    return headers
end

--- One header; of a repeated one the first.
function _M.header(ctx, name)
    ctx = context(ctx)
    local headers = ctx and ctx.headers
    if not headers then
        return header_value(name)
    end
    local value = headers[name]
    if type(value) == "table" then
        return value[1]
    end
    return value
end

-- The cached table must show the change, and the variables that come from the head, too.
local function forget(ctx)
    if ctx then
        ctx.headers = nil
    end
end

--- `set_header(ctx, name, value)`; nil removes it, an array sets several of that name.
function _M.set_header(ctx, name, value)
    if type(ctx) == "string" then
        ctx, name, value = nil, ctx, name
    end
    ctx = context(ctx)
    forget(ctx)
    if value == nil then
        clear_header(name)
    else
        set_header(name, value)
    end
end

--- Adds a header beside those of the same name.
function _M.add_header(ctx, name, value)
    if type(ctx) == "string" then
        ctx, name, value = nil, ctx, name
    end
    ctx = context(ctx)
    forget(ctx)
    add_header(name, value)
end

--- The client's address, after real-ip.
function _M.get_ip(ctx)
    return context(ctx).var.realip_remote_addr or context(ctx).var.remote_addr or ""
end

--- The address that the request is taken to come from.
function _M.get_remote_client_ip(ctx)
    return context(ctx).var.remote_addr or ""
end

--- The port of that address as a number; nil when it is not known: where the real address was told without one.
function _M.get_remote_client_port(ctx)
    local port = tonumber(context(ctx).var.remote_port)
    return port
end

--- `http` or `https`.
function _M.get_scheme(ctx)
    return context(ctx).var.scheme or ""
end

--- The host that is asked for, in lower case and without a port.
function _M.get_host(ctx)
    return context(ctx).var.host or ""
end

--- The port that the request came in on.
function _M.get_port(ctx)
    local port = tonumber(context(ctx).var.server_port)
    return port
end

--- The path, decoded and without the query.
function _M.get_path(ctx)
    return context(ctx).var.uri or ""
end

--- The version of HTTP as a number: 1, 1.1, 2.
function _M.get_http_version()
    return req.http_version()
end

--- The request's method as a text.
function _M.get_method()
    return req.get_method()
end

--- The query's arguments: a table by name; a repeated one is an array. No bound on their number.
function _M.get_uri_args(ctx)
    ctx = context(ctx)
    if not ctx then
        return get_uri_args(0)
    end
    local args = ctx.req_uri_args
    if not args then
        args = get_uri_args(0)
        ctx.req_uri_args = args
    end
    return args
end

--- Replaces the query; `args` is a table or a text.
function _M.set_uri_args(ctx, args)
    ctx = context(ctx)
    if ctx then
        ctx.req_uri_args = nil
    end
    req.set_uri_args(args)
end

--- The arguments of a form body; of one that is too long for memory and lies in a file none, the reason and a line of error.log.
-- Waits for the body.
function _M.get_post_args(ctx)
    ctx = context(ctx)
    if ctx and ctx.req_post_args then
        return ctx.req_post_args
    end
    req.read_body()
    local args, err = req.get_post_args(0)
    if not args then
        log.error("the post form is too large: ", err)
        return {}, err
    end
    if ctx then
        ctx.req_post_args = args
    end
    return args
end

--- The whole body, or nil; nil and the reason when it is longer than `max_size` bytes. Waits for the body.
function _M.get_body(max_size, _)
    if max_size then
        local declared = tonumber(header_value("content-length"))
        if declared and declared > max_size then
            return nil, "request size " .. declared .. " is greater than the " .. "maximum size " .. max_size .. " allowed"
        end
    end
    local ok, err = pcall(req.read_body)
    if not ok then
        return nil, reason(err)
    end
    local body = req.get_body_data()
    if not body then
        local path = req.get_body_file()
        if not path then
            return nil
        end
        local file, open_err = io.open(path, "rb")
        if not file then
            return nil, open_err
        end
        body = file:read(max_size and max_size + 1 or "*a")
        file:close()
    end
    if max_size and body and #body > max_size then
        return nil, "request size " .. #body .. " is greater than the " .. "maximum size " .. max_size .. " allowed"
    end
    return body
end

--- The body as a table: its JSON. nil and a message `{ message = … }` that can be answered as it is.
function _M.get_json_request_body_table()
    local body, err = _M.get_body()
    if not body then
        return nil, { message = "could not get body: " .. (err or "request body is empty") }
    end
    local json, decode_err = require("apisix.core.json").decode(body)
    if not json then
        return nil, { message = "could not parse JSON request body: " .. decode_err }
    end
    return json
end

-- Parts of a multipart body that are looked at.
local MAX_PARTS = 1000

local function text_of(part)
    local head, text = part:match("^(.-)\r?\n\r?\n(.*)$")
    local name = head and (head:match('[; ][Nn]ame="([^"]*)"') or head:match("[; ][Nn]ame=([^;%s]+)"))
    return name, text
end

-- `multipart/form-data` (RFC 7578): the fields' texts by name, the first of each name; nil for what is no such body.
local function multipart(body, content_type)
    local boundary = content_type:match('boundary="([^"]+)"') or content_type:match("boundary=([^;%s]+)")
    if not boundary then
        return nil
    end
    local out, delimiter = {}, "--" .. boundary
    local _, from = find(body, delimiter, 1, true)
    for _ = 1, MAX_PARTS do
        if not from or sub(body, from + 1, from + 2) == "--" then
            break
        end
        local stop, last = find(body, delimiter, from + 1, true)
        local part = sub(body, from + 1, (stop or #body + 1) - 1):gsub("^\r?\n", ""):gsub("\r?\n$", "")
        local name, text = text_of(part)
        if name and out[name] == nil then
            out[name] = text
        end
        from = last
    end
    return out
end

local function multipart_table(ctx, content_type)
    local body, err = _M.get_body(nil, ctx)
    if not body then
        return nil, { message = "could not get body: " .. (err or "request body is empty") }
    end
    local fields = multipart(body, content_type)
    if not fields then
        return nil, { message = "could not parse multipart form data: there is no boundary" }
    end
    return fields
end

--- The body as a table, by its Content-Type: JSON, a form, or multipart/form-data (texts by name). nil and a message
-- `{ message = … }` that can be answered as it is. Waits for the body.
function _M.get_request_body_table(ctx, content_type)
    content_type = content_type or header_value("content-type") or ""
    if find(content_type, "application/json", 1, true) == 1 then
        return _M.get_json_request_body_table()
    end
    if find(content_type, "multipart/form-data", 1, true) == 1 then
        return multipart_table(ctx, content_type)
    end
    if find(content_type, "application/x-www-form-urlencoded", 1, true) == 1 then
        local args, err = _M.get_post_args(ctx)
        if err then
            return nil, { message = "could not parse form data: " .. err }
        end
        return args
    end
    return nil, { message = "unsupported content-type: " .. content_type }
end

--- Replaces the body: `set_body_data(ctx, text)`, or the text alone. Waits for the one that it replaces.
function _M.set_body_data(ctx, body)
    if type(ctx) == "string" then
        body = ctx
    end
    local kept = context(type(ctx) == "table" and ctx or nil)
    if kept then
        kept.req_post_args = nil
    end
    req.read_body()
    req.set_body_data(body)
end

--- Turns proxy request buffering on or off for this request: bodies are always streamed here, so it says so only.
function _M.set_proxy_request_buffering()
    return true
end

--- `multipart/form-data` becomes its media type only.
function _M.content_type_without_parameters(value)
    local semicolon = value and find(value, ";", 1, true)
    return semicolon and sub(value, 1, semicolon - 1) or value
end

--- The URI with an encoded query, for a redirect or an upstream.
function _M.build_uri(path, args)
    if type(args) ~= "table" then
        return path
    end
    local parts = {}
    for name, value in pairs(args) do
        for _, v in ipairs(type(value) == "table" and value or { value }) do
            parts[#parts + 1] = escape_uri(name) .. (v == true and "" or "=" .. escape_uri(tostring(v)))
        end
    end
    return #parts == 0 and path or path .. "?" .. table.concat(parts, "&")
end

return _M
