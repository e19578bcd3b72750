--- Completes the global `ngx` with what is better said in Lua: facades over FFI that the JIT compiles.

local ffi = require("ffi")

ffi.cdef([[
typedef struct { const char *ptr; size_t len; } moongate_str;
typedef struct {
    int kind;
    uint32_t flags;
    double number;
    moongate_str text;
    int forcible, stale;
    const char *error;
} moongate_val;
]])

local native = require("moongate.native")
local request = require("moongate.request")
local fast = native.fast
local ngx = ngx

-- As in OpenResty, where `require("ngx")` gives the table. Functions have one of their own in their sandbox.
if native.purpose ~= "functions" then package.loaded.ngx = ngx end

local error, getmetatable, ipairs, pairs, rawget, rawset, select, setmetatable, tonumber, tostring, type =
    error, getmetatable, ipairs, pairs, rawget, rawset, select, setmetatable, tonumber, tostring, type
local concat, floor = table.concat, math.floor
local ffi_string = ffi.string
local clear_table = require("table.clear")

-- One buffer for all answers: each is copied before the next call.
local out = ffi.new("moongate_str")

-- Names that scripts ask for. A script has few; a bound for one that makes them up.
local MAX_NAMES = 1024

-- A table that asks `make` once for each name. What is known compiles to one look into the table. The first look is not to be
-- compiled: a trace that was recorded with it would leave by a side exit ever after.
local function remembered(make)
    local n = 0
    local function first(self, name)
        local value = make(name)
        if n >= MAX_NAMES then
            clear_table(self)
            n = 0
        end
        n = n + 1
        rawset(self, name, value)
        return value
    end
    jit.off(first)
    return setmetatable({}, { __index = first })
end

ngx.null = native.null or require("cjson").null
ngx.OK, ngx.ERROR, ngx.AGAIN, ngx.DONE, ngx.DECLINED = 0, -1, -2, -4, -5

for name, status in pairs({
    HTTP_CONTINUE = 100, HTTP_SWITCHING_PROTOCOLS = 101, HTTP_OK = 200, HTTP_CREATED = 201, HTTP_ACCEPTED = 202,
    HTTP_NO_CONTENT = 204, HTTP_PARTIAL_CONTENT = 206, HTTP_SPECIAL_RESPONSE = 300, HTTP_MOVED_PERMANENTLY = 301,
    HTTP_MOVED_TEMPORARILY = 302, HTTP_SEE_OTHER = 303, HTTP_NOT_MODIFIED = 304, HTTP_TEMPORARY_REDIRECT = 307,
    HTTP_PERMANENT_REDIRECT = 308, HTTP_BAD_REQUEST = 400, HTTP_UNAUTHORIZED = 401, HTTP_PAYMENT_REQUIRED = 402,
    HTTP_FORBIDDEN = 403, HTTP_NOT_FOUND = 404, HTTP_NOT_ALLOWED = 405, HTTP_NOT_ACCEPTABLE = 406,
    HTTP_REQUEST_TIMEOUT = 408, HTTP_CONFLICT = 409, HTTP_GONE = 410, HTTP_UPGRADE_REQUIRED = 426,
    HTTP_TOO_MANY_REQUESTS = 429, HTTP_CLOSE = 444, HTTP_ILLEGAL = 451, HTTP_INTERNAL_SERVER_ERROR = 500,
    HTTP_NOT_IMPLEMENTED = 501, HTTP_METHOD_NOT_IMPLEMENTED = 501, HTTP_BAD_GATEWAY = 502,
    HTTP_SERVICE_UNAVAILABLE = 503, HTTP_GATEWAY_TIMEOUT = 504, HTTP_VERSION_NOT_SUPPORTED = 505,
    HTTP_INSUFFICIENT_STORAGE = 507,
}) do
    ngx[name] = status
end

local methods = {
    GET = 2, HEAD = 4, POST = 8, PUT = 16, DELETE = 32, MKCOL = 64, COPY = 128, MOVE = 256, OPTIONS = 512,
    PROPFIND = 1024, PROPPATCH = 2048, LOCK = 4096, UNLOCK = 8192, PATCH = 16384, TRACE = 32768,
}
local method_names = {}
for name, id in pairs(methods) do
    ngx["HTTP_" .. name], method_names[id] = id, name
end

local levels = { STDERR = 0, EMERG = 1, ALERT = 2, CRIT = 3, ERR = 4, WARN = 5, NOTICE = 6, INFO = 7, DEBUG = 8 }
for name, level in pairs(levels) do
    ngx[name] = level
end

-- Logging -----------------------------------------------------------------------------------------------------------

local log_level, write_line = fast.log_level, native.log.write

local function log_text(...)
    local n = select("#", ...)
    local parts = {}
    for i = 1, n do
        local value = select(i, ...)
        if value == ngx.null then
            parts[i] = "null"
        elseif type(value) == "table" then
            local mt = getmetatable(value)
            if not (mt and mt.__tostring) then
                error("bad argument #" .. i .. " to 'log' (expected table to have __tostring metamethod)", 3)
            end
            parts[i] = tostring(value)
        else
            parts[i] = tostring(value)
        end
    end
    return concat(parts, "", 1, n)
end

--- ngx.log(level, ...): a line of error.log with the caller's position. The tail call leaves the caller on top.
function ngx.log(level, ...)
    if type(level) ~= "number" then
        error("bad argument #1 to 'log' (number expected, got " .. (level == nil and "no value" or type(level)) .. ")", 2)
    end
    if level < 0 or level > 8 then error("bad argument #1 to 'log' (bad log level: " .. level .. ")", 2) end
    if level > log_level() then return end
    return write_line(level, log_text(...))
end

--- print(...): a line of level notice.
function _G.print(...)
    if levels.NOTICE > log_level() then return end
    return write_line(levels.NOTICE, log_text(...))
end

-- Time --------------------------------------------------------------------------------------------------------------

local now = fast.now

--- ngx.now(): seconds with milliseconds.
function ngx.now()
    local t = now()
    return t
end

--- ngx.time(): whole seconds.
function ngx.time()
    local t = floor(now())
    return t
end

--- ngx.update_time(): the clock is read each time; nothing to do.
function ngx.update_time() end

-- Variables ---------------------------------------------------------------------------------------------------------

local var_get, var_at, var_id, var_set = fast.var_get, fast.var_at, fast.var_id, fast.var_set

-- The numbers of the gateway's variables by name; false for a name that has none.
local var_ids = remembered(function(name)
    local id = var_id(name, #name)
    return id >= 0 and id
end)

-- Why a variable was not set.
local function not_set(rc, name)
    if rc == 0 then return 'variable "' .. name .. '" not changeable' end
    if rc == -3 then return 'variable "' .. name .. '" cannot be assigned a value' end
    return 'variable "' .. name .. '" not found for writing; maybe it is a built-in variable that is not changeable ' ..
        'or you forgot to use "set $' .. name .. ' \'\';" in the config file to define it first'
end

ngx.var = setmetatable({}, {
    __index = function(_, name)
        if type(name) ~= "string" then
            -- ngx.var[1]: a capture of the location's pattern.
            if type(name) ~= "number" then error("bad variable name", 2) end
            name = tostring(name)
        end
        local id = var_ids[name]
        local rc
        if id then
            rc = var_at(id, out)
        else
            rc = var_get(name, #name, out)
        end
        if rc == 1 then
            local value = ffi_string(out.ptr, out.len)
            return value
        end
        if rc < 0 then error("API disabled in the current context", 2) end
        return nil
    end,
    __newindex = function(_, name, value)
        if type(name) ~= "string" then error("bad variable name", 2) end
        local rc
        if value == nil then
            rc = var_set(name, #name, nil, 0)
        else
            if type(value) ~= "string" then value = tostring(value) end
            rc = var_set(name, #name, value, #value)
        end
        if rc == 1 then return end
        if rc == -1 then error("API disabled in the current context", 2) end
        error(not_set(rc, name), 2)
    end,
})

-- Headers -----------------------------------------------------------------------------------------------------------

local req_header, resp_header = fast.req_header, fast.resp_header
local req_header_set, resp_header_set = fast.req_header_set, fast.resp_header_set
local req_header_set_number, resp_header_set_number = fast.req_header_set_number, fast.resp_header_set_number
local SET, ADD, REMOVE, SOUND = 0, 1, 2, 4

-- Fields that hold one value: of a table the last one counts.
local single = {
    ["content-type"] = true, ["content-length"] = true, ["content-encoding"] = true, ["content-range"] = true,
    ["accept-ranges"] = true, ["location"] = true, ["refresh"] = true, ["last-modified"] = true, ["date"] = true,
    ["server"] = true, ["etag"] = true, ["expires"] = true, ["www-authenticate"] = true,
}

native.resp.single = single

local function text_name(name)
    return type(name) == "string" and name or tostring(name)
end

-- Underscores stand for dashes in the names of response fields alone.
local dashed = remembered(function(name)
    local text = name:gsub("_", "-")
    return text
end)

local function text_of(value)
    local kind = type(value)
    if kind == "string" then return value end
    local mt = kind == "table" and getmetatable(value)
    if kind ~= "number" and kind ~= "boolean" and not (mt and mt.__tostring) then
        error("invalid header value: " .. kind, 4)
    end
    local text = tostring(value)
    return text
end

-- Whether a field's name needs no escapes.
local is_sound = remembered(function(name)
    return not name:find("[^\33-\57\59-\126]")
end)

-- No tail calls of what is no Lua function, here and elsewhere: a function that ends so begins no trace.
local function set_values(set, set_number, name, value)
    local kind = type(value)
    local rc = 1
    if kind == "nil" or kind == "table" and #value == 0 then
        rc = set(name, #name, "", 0, REMOVE)
        return rc
    end
    local how = is_sound[name] and SET + SOUND or SET
    if kind == "number" then
        rc = set_number(name, #name, value, how)
        return rc
    end
    if kind ~= "table" then
        local text = text_of(value)
        rc = set(name, #name, text, #text, how)
        return rc
    end
    local n = #value
    local first = 1
    if set == resp_header_set and single[name:lower()] then first = n end
    for i = first, n do
        local text = text_of(value[i])
        rc = set(name, #name, text, #text, i == first and SET or ADD)
    end
    return rc
end

-- Where there is no request to ask or answer: timers, the start of a worker, handshakes.
local function disabled()
    error("API disabled in the current context", 3)
end

local function read_header(get, name)
    local rc = get(name, #name, 0, out)
    if rc == 0 then return nil end
    if rc < 0 then error("API disabled in the current context", 3) end
    local value = ffi_string(out.ptr, out.len)
    if rc == 1 then return value end
    local all = { value }
    local n = 1
    repeat
        rc = get(name, #name, n, out)
        n = n + 1
        all[n] = ffi_string(out.ptr, out.len)
    until rc ~= 2
    return all
end

local keeps_underscores = native.resp.keeps_underscores

-- The name that a response field gets.
local function response_name(name)
    name = text_name(name)
    local text = dashed[name]
    if text ~= name and keeps_underscores() then return name end
    return text
end

local function set_response_header(name, value)
    name = response_name(name)
    -- The name's length first: nearly all are others.
    if #name == 14 and value ~= nil and type(value) ~= "table" and not tonumber(value)
        and name:lower() == "content-length" then
        error("invalid value for Content-Length: " .. tostring(value), 3)
    end
    local rc = set_values(resp_header_set, resp_header_set_number, name, value)
    if rc < 0 then
        ngx.log(ngx.ERR, "attempt to set ngx.header.HEADER after sending out response headers")
    elseif rc == 0 then
        disabled()
    end
end

ngx.header = setmetatable({}, {
    __index = function(_, name)
        if type(name) ~= "string" then name = tostring(name) end
        local value = read_header(resp_header, name)
        return value
    end,
    __newindex = function(_, name, value)
        set_response_header(name, value)
    end,
})

-- How names stand in a table of headers.
local field_names = remembered(function(name)
    local text = name:lower():gsub("_", "-")
    return text
end)

-- A table of headers answers for any case, and underscores for dashes.
local headers_mt = {
    __index = function(self, name)
        if type(name) ~= "string" then return nil end
        local key = field_names[name]
        if key == name then return nil end
        local value = rawget(self, key)
        return value
    end,
}

local function headers_of(read)
    return function(max, raw)
        local headers, err = read(max, raw)
        if not raw then setmetatable(headers, headers_mt) end
        return headers, err
    end
end

local function add_values(set, name, value)
    local rc = 1
    if type(value) ~= "table" then
        local text = text_of(value)
        rc = set(name, #name, text, #text, ADD)
        return rc
    end
    for i = 1, #value do
        local text = text_of(value[i])
        rc = set(name, #name, text, #text, ADD)
    end
    return rc
end

ngx.resp = ngx.resp or {}
--- ngx.resp.get_headers(max?, raw?)
ngx.resp.get_headers = headers_of(native.resp.headers)

--- Adds a response header beside those of that name. For apisix.core.
function native.resp.add_header(name, value)
    if add_values(resp_header_set, dashed[text_name(name)], value) == 0 then disabled() end
end

local req = ngx.req
--- ngx.req.get_headers(max?, raw?)
req.get_headers = headers_of(native.req.headers)

--- ngx.req.set_header(name, value): nil removes, a table sets several.
function req.set_header(name, value)
    if name == nil then error("bad 'name' argument: string expected, got nil", 2) end
    if set_values(req_header_set, req_header_set_number, text_name(name), value) == 0 then disabled() end
end

--- ngx.req.clear_header(name)
function req.clear_header(name)
    name = text_name(name)
    if req_header_set(name, #name, "", 0, REMOVE) == 0 then disabled() end
end

--- Adds a request header beside those of that name. For apisix.core.
function native.req.add_header(name, value)
    if add_values(req_header_set, text_name(name), value) == 0 then disabled() end
end

--- One request header by name; of several the first. For apisix.core.
function native.req.header(name)
    if req_header(name, #name, 0, out) <= 0 then return nil end
    local value = ffi_string(out.ptr, out.len)
    return value
end

-- Request -----------------------------------------------------------------------------------------------------------

local method, get_uri_args = fast.method, req.get_uri_args

--- ngx.req.get_uri_args(max?, tab?): tab is filled in place of a new table.
function req.get_uri_args(max, tab)
    if tab == nil then return get_uri_args(max) end
    if type(tab) ~= "table" then error("bad argument #2 to 'get_uri_args' (table expected, got " .. type(tab) .. ")", 2) end
    local args, err = get_uri_args(max)
    clear_table(tab)
    for name, value in pairs(args) do tab[name] = value end
    return tab, err
end

--- ngx.req.get_method()
function req.get_method()
    if method(out) == 0 then disabled() end
    local name = ffi_string(out.ptr, out.len)
    return name
end

--- ngx.req.set_method(ngx.HTTP_POST): a number of the constants.
function req.set_method(id)
    if type(id) ~= "number" then error("bad method number", 2) end
    local name = method_names[id]
    if not name then error("unsupported HTTP method: " .. tostring(id), 2) end
    return native.req.set_method(name)
end

local building = setmetatable({}, { __mode = "k" })

--- ngx.req.init_body(buffer_size?), append_body(chunk), finish_body(): a new body in pieces. One that is longer than
--- buffer_size (client_body_buffer_size by default) goes to a file.
function req.init_body(size)
    if size ~= nil and type(size) ~= "number" then
        error("bad argument #1 to 'init_body' (number expected, got " .. type(size) .. ")", 2)
    end
    local why = native.req.unreadable()
    if why then error(why, 2) end
    building[request.ngx_ctx()] = { size = size }
end

function req.append_body(chunk)
    local parts = building[request.ngx_ctx()]
    if not parts then error("request body not initialized", 2) end
    parts[#parts + 1] = chunk
end

function req.finish_body()
    local key = request.ngx_ctx()
    local parts = building[key]
    if not parts then error("request body not initialized", 2) end
    building[key] = nil
    return native.req.replace_body(concat(parts), parts.size)
end

-- Status, ctx, arg --------------------------------------------------------------------------------------------------

local status, status_set, headers_sent = fast.status, fast.status_set, fast.headers_sent
local phase = fast.phase
local ngx_ctx, set_ngx_ctx = request.ngx_ctx, request.set_ngx_ctx

setmetatable(ngx, {
    __index = function(_, name)
        if name == "ctx" then
            local ctx = ngx_ctx()
            return ctx
        elseif name == "status" then
            local code = status()
            if code < 0 then disabled() end
            return code
        elseif name == "headers_sent" then
            local sent = headers_sent()
            if sent < 0 then disabled() end
            return sent ~= 0
        elseif name == "is_subrequest" then
            local sub = native.location.is_subrequest()
            return sub
        end
        return nil
    end,
    __newindex = function(self, name, value)
        if name == "ctx" then
            if type(value) ~= "table" then error("ctx should be a table while getting a " .. type(value), 2) end
            set_ngx_ctx(value)
        elseif name == "status" then
            local code = tonumber(value)
            if not code then error("number expected, got " .. type(value), 2) end
            local rc = status_set(code)
            if rc < 0 then
                ngx.log(ngx.ERR, "attempt to set ngx.status after sending out response headers")
            elseif rc == 0 then
                disabled()
            end
        elseif name == "headers_sent" then
            error("attempt to write to ngx.headers_sent", 2)
        else
            rawset(self, name, value)
        end
    end,
})

local chunk, chunk_set, chunk_eof = fast.chunk, fast.chunk_set, fast.chunk_eof

local function flat(value)
    if type(value) ~= "table" then return tostring(value) end
    local parts = {}
    for i = 1, #value do parts[i] = flat(value[i]) end
    return concat(parts)
end

-- The number of the phase of `set_by_lua`: see phase_names.
local SET_PHASE = 12

ngx.arg = setmetatable({}, {
    __index = function(_, n)
        if phase() == SET_PHASE then
            local arg = native.resp.set_arg(n)
            return arg
        end
        local eof = chunk(out)
        if eof < 0 then error("API disabled in the current context", 2) end
        if n == 1 then
            local data = ffi_string(out.ptr, out.len)
            return data
        end
        if n == 2 then return eof ~= 0 end
        return nil
    end,
    __newindex = function(_, n, value)
        if chunk(out) < 0 then error("API disabled in the current context", 2) end
        if n == 1 then
            local data = value == nil and "" or type(value) == "string" and value or flat(value)
            chunk_set(data, #data)
        elseif n == 2 then
            chunk_eof(value and 1 or 0)
        else
            error("bad arg index: " .. tostring(n), 2)
        end
    end,
})

-- By the numbers of the phases (src/exchange), in OpenResty's words: APISIX runs plugins' rewrite in access_by_lua.
local phase_names = {
    [0] = "init_worker", "ssl_cert", "access", "access", "access", "balancer", "content", "header_filter",
    "body_filter", "body_filter", "log", "timer", "set", "server_rewrite", "rewrite", "precontent",
    "ssl_client_hello", "ssl_session_fetch", "ssl_session_store", "init", "exit_worker",
}

--- ngx.get_phase()
function ngx.get_phase()
    local number = phase()
    if number == 0 then
        -- init_by_lua of a VM for one request, or init_worker_by_lua.
        local stage = native.stage or "init_worker"
        return stage
    end
    local name = phase_names[number]
    return name
end

local location = require("moongate.location")
location.setup(method_names)
ngx.exec = location.exec
ngx.location = { capture = location.capture, capture_multi = location.capture_multi }

-- The process -------------------------------------------------------------------------------------------------------

ngx.config = {
    subsystem = "http",
    debug = false,
    is_console = false,
    nginx_version = 1027001,
    ngx_lua_version = 10028,
    prefix = function()
        local prefix = native.prefix
        if prefix:sub(-1) ~= "/" then prefix = prefix .. "/" end
        return prefix
    end,
    nginx_configure = function() return "" end,
}

ngx.worker = ngx.worker or {}
local worker = ngx.worker

--- ngx.worker.id(): from 0; nil in a VM that only checks.
function worker.id()
    if native.purpose == "check" then return nil end
    return native.worker
end

local escape_uri = ngx.escape_uri

--- ngx.escape_uri(text, kind?): kind 0 for a whole URI, 2 (default) for a component of one.
function ngx.escape_uri(text, kind)
    if kind ~= nil then
        if type(kind) ~= "number" then error('"type" is not a number', 0) end
        if kind < 0 or kind > 6 then error('"type" ' .. kind .. " out of range", 0) end
    end
    return escape_uri(text, kind)
end

_G.ndk = require("moongate.set_misc")

-- The rest ----------------------------------------------------------------------------------------------------------

ngx.shared = require("moongate.shdict")
ngx.socket = require("moongate.socket")
req.socket, ngx.socket.of_request = ngx.socket.of_request, nil

local re = require("moongate.re")
ngx.re = { match = re.match, find = re.find, gmatch = re.gmatch, sub = re.sub, gsub = re.gsub }

-- lua-resty-core is built in: requiring a part of it answers what is there.
for _, name in ipairs({
    "base", "base64", "coroutine", "ctx", "exit", "hash", "misc", "ndk", "phase", "regex", "request", "response",
    "shdict", "socket", "uri", "utils", "var", "worker",
}) do
    package.preload["resty.core." .. name] = function() return { version = "0.1.28" } end
end
package.preload["resty.core.time"] = function()
    return {
        version = "0.1.28",
        --- Milliseconds since the machine was started.
        monotonic_msec = function()
            local ms = fast.monotonic()
            return ms
        end,
        --- The same in seconds.
        monotonic_time = function()
            local ms = fast.monotonic()
            return ms / 1000
        end,
    }
end
package.preload["resty.core"] = function() return { version = "0.1.28" } end
package.preload["resty.core.base"] = function()
    local base = {
        version = "0.1.28", new_tab = require("table.new"), clear_tab = require("table.clear"), FFI_OK = 0, FFI_ERROR = -1,
        FFI_AGAIN = -2, FFI_BUSY = -3, FFI_DONE = -4, FFI_DECLINED = -5, FFI_ABORT = -6, FFI_NO_REQ_CTX = -100,
        FFI_BAD_CONTEXT = -101, allows_subsystem = function() end,
        ref_in_table = function(t, value)
            if value == nil then return -1 end
            t[#t + 1] = value
            return #t
        end,
    }
    -- Memory of C is nothing for uploaded functions.
    if native.purpose == "functions" then return base end
    local size = 4096
    local buffer, size_ptr, err_ptr
    function base.set_string_buf_size(n) size, buffer = n, nil end
    function base.get_string_buf_size() return size end
    function base.get_string_buf(n, always_new)
        if n > size or always_new then return ffi.new("unsigned char[?]", n) end
        buffer = buffer or ffi.new("unsigned char[?]", size)
        return buffer
    end
    function base.get_size_ptr()
        size_ptr = size_ptr or ffi.new("size_t[1]")
        return size_ptr
    end
    function base.get_errmsg_ptr()
        err_ptr = err_ptr or ffi.new("char *[1]")
        return err_ptr
    end
    return base
end
package.preload["resty.core.utils"] = function()
    return {
        version = "0.1.28",
        str_replace_char = function(s, find, replace)
            return (s:gsub("%" .. find, (replace:gsub("%%", "%%%%"))))
        end,
    }
end
