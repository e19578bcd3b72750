--- `core.response`: the answer.
local ngx = ngx
local error = error
local pairs = pairs
local rawget = rawget
local select = select
local tonumber = tonumber
local tostring = tostring
local type = type
local concat = table.concat

local json = require("apisix.core.json")
local ngx_print = ngx.print
local ngx_exit = ngx.exit
local ngx_header = ngx.header
local native = require("moongate.native").apisix
local add_one = require("ngx.resp").add_header

-- What one response may hold back for a filter that needs the whole body: over it the rest is dropped, as the caller said.
local DEFAULT_MAX_HELD_BYTES = 64 * 1024 * 1024

local _M = {}

local function encoded(value)
    if type(value) ~= "table" then
        return value
    end
    local text, err = json.encode(value, true)
    if not text then
        error("failed to encode data: " .. err, -2)
    end
    return text .. "\n"
end

-- The first argument is the status when it is a number, else it belongs to the body.
local function prepare(first, ...)
    local code
    local parts, n = nil, 0
    if type(first) == "number" then
        code = first
    elseif first ~= nil then
        parts, n = { encoded(first) }, 1
    end
    for i = 1, select("#", ...) do
        local value = (select(i, ...))
        if value ~= nil then
            parts = parts or {}
            n = n + 1
            parts[n] = type(value) == "table" and encoded(value) or tostring(value)
        end
    end
    if n > 0 and not native.content_type_set() then
        ngx_header["Content-Type"] = "text/plain; charset=utf-8"
    end
    return code, n > 0 and concat(parts, "", 1, n) or nil
end

--- Says who made the response: `apisix`, `nginx` or `upstream`; for `get_response_source` and metrics.
function _M.set_response_source(ctx, source)
    ctx._resp_source = source
end

local function made_here()
    local ctx = ngx.ctx.api_ctx
    if ctx and not rawget(ctx, "_resp_source") then
        ctx._resp_source = "apisix"
    end
end

--- Answers with `code` and a body of the arguments (tables as JSON), and ends the request. Without a number first: adds
-- to the body only. A body without a `Content-Type` is `text/plain; charset=utf-8`. 444 closes the connection; a status below 200 is
-- none: 500, and a line of error.log. What a plugin's phase returns as `code, body` is answered likewise.
function _M.exit(code, ...)
    local status, body = prepare(code, ...)
    if status then
        made_here()
        ngx.status = status
    end
    if body then
        ngx_print(body)
    end
    if status then
        return ngx_exit(status)
    end
end

--- Adds to the body; the head is sent with the first bytes.
function _M.say(...)
    local _, body = prepare(nil, ...)
    if body then
        ngx_print(body)
    end
end

local function each_header(append, ...)
    local n = select("#", ...)
    if n == 1 then
        local headers = (select(1, ...))
        if type(headers) ~= "table" then
            error("should be a table if only one argument", 3)
        end
        for name, value in pairs(headers) do
            append(name, value)
        end
        return
    end
    for i = 1, n, 2 do
        append((select(i, ...)), (select(i + 1, ...)))
    end
end

local function set_one(name, value)
    ngx_header[name] = value
end

--- `set_header(name, value, …)` or `set_header({ name = value })`: replaces; nil removes.
function _M.set_header(...)
    if ngx.headers_sent then
        error("headers have already been sent", 2)
    end
    each_header(set_one, ...)
end

--- Like `set_header`, beside those of the same name.
function _M.add_header(...)
    if ngx.headers_sent then
        error("headers have already been sent", 2)
    end
    each_header(add_one, ...)
end

--- One response header's value.
function _M.get_header(name)
    return ngx_header[name]
end

--- Call it when a filter changes the body: removes the headers that describe the old one.
function _M.clear_header_as_body_modified()
    ngx_header["Content-Length"] = nil
    ngx_header["Content-Encoding"] = nil
    ngx_header["Last-Modified"] = nil
    ngx_header["ETag"] = nil
end

--- The last of an upstream variable's values (`$upstream_status`, `$upstream_response_time`: of each try one, with commas
-- and colons between them), as a text; nil for nil and for an empty text.
function _M.get_last_upstream_token(text)
    return text and text:match("([^%s,:]+)[%s,:]*$")
end

--- The upstream's last status as a number, or nil when no upstream answered.
function _M.get_upstream_status(ctx)
    local status = ctx.var.upstream_status
    if not status then
        return nil
    end
    return tonumber(_M.get_last_upstream_token(tostring(status)))
end

--- Who made the response: `apisix`, `nginx` or `upstream`.
function _M.get_response_source(ctx)
    if not ctx then
        return "apisix"
    end
    return ctx._resp_source or native.response_source()
end

--- For a body filter that needs the whole body: gathers chunks in `ctx` and gives the body at the end, nil before.
-- `hold_the_copy` leaves the chunks in the response as they are. Past `max_bytes` the rest is not kept.
function _M.hold_body_chunk(ctx, hold_the_copy, max_bytes, keep_key)
    local chunk, eof = ngx.arg[1], ngx.arg[2]
    local key = keep_key or ctx._plugin_name or "body"
    local held = ctx._held_body
    if not held then
        held = {}
        ctx._held_body = held
    end
    local body = held[key]
    if not body then
        body = { n = 0, bytes = 0 }
        held[key] = body
    end
    local limit = max_bytes or DEFAULT_MAX_HELD_BYTES
    if type(chunk) == "string" and chunk ~= "" and body.bytes < limit then
        if body.bytes + #chunk > limit then
            chunk = chunk:sub(1, limit - body.bytes)
            body.truncated = true
        end
        body.n = body.n + 1
        body[body.n] = chunk
        body.bytes = body.bytes + #chunk
    end
    if eof then
        held[key] = nil
        local whole = concat(body, "", 1, body.n)
        if body.truncated then
            ctx._held_body_truncated = true
        end
        return whole
    end
    if not hold_the_copy then
        ngx.arg[1] = nil
    end
    return nil
end

return _M
