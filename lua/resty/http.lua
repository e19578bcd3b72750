--- lua-resty-http: an HTTP/1.1 client on cosockets.

local tcp = ngx.socket.tcp
local concat, insert = table.concat, table.insert
local find, gsub, lower, match, sub = string.find, string.gsub, string.lower, string.match, string.sub
local encode_args = ngx.encode_args

-- Headers that one response may have: a peer must not fill the memory with them.
local MAX_HEADERS = 1000
local CHUNK = 64 * 1024

local _M = { _VERSION = "0.17.2" }
_M._USER_AGENT = "lua-resty-http/" .. _M._VERSION .. " (Lua) ngx_lua/10028"
local mt = { __index = _M }

function _M.new(_)
    local sock, err = tcp()
    if not sock then return nil, err end
    return setmetatable({ sock = sock, keepalive = true }, mt)
end

function _M.debug() end

function _M:set_timeout(ms) return self.sock:settimeout(ms) end

function _M:set_timeouts(connect, send, read) return self.sock:settimeouts(connect, send, read) end

function _M:set_proxy_options(options) self.proxy = options end

--- scheme, host, port, path, query = {…} of a uri; nil and the error.
function _M.parse_uri(_, uri, query_in_path)
    if query_in_path == nil then query_in_path = true end
    local scheme, authority, rest = match(uri, "^(https?)://([^/%?#]+)(.*)$")
    if not scheme then
        authority, rest = match(uri, "^//([^/%?#]+)(.*)$")
        if not authority then return nil, "bad uri: " .. tostring(uri) end
        scheme = "http"
    end
    authority = match(authority, "@([^@]*)$") or authority
    local host, port = match(authority, "^(%[[^%]]*%]):?(%d*)$")
    if not host then host, port = match(authority, "^([^:]+):?(%d*)$") end
    if not host then return nil, "bad uri: " .. uri end
    port = tonumber(port) or (scheme == "https" and 443 or 80)
    rest = gsub(rest, "#.*$", "")
    local path, query = match(rest, "^([^%?]*)%??(.*)$")
    if path == "" then path = "/" end
    if query_in_path and query ~= "" then path, query = path .. "?" .. query, "" end
    return { scheme, host, port, path, query }
end

local function default_port(scheme)
    return scheme == "https" and 443 or 80
end

--- ok, err = httpc:connect({ scheme, host, port, pool, ssl_verify, ssl_server_name, proxy_opts }) or connect(host, port).
function _M:connect(options, port, more)
    if type(options) ~= "table" then
        options = { host = options, port = type(port) == "number" and port or nil, pool = more and more.pool }
        self.plain = true
        local ok, err
        if match(options.host, "^unix:") then
            ok, err = self.sock:connect(options.host, more)
        else
            ok, err = self.sock:connect(options.host, options.port or 80, more)
        end
        if not ok then return nil, err end
        self.host, self.port, self.keepalive = options.host, options.port, true
        return 1
    end
    local scheme = options.scheme and lower(options.scheme) or nil
    local host = options.host
    if not host then return nil, "host is required" end
    local is_unix = find(host, "^unix:") ~= nil
    port = options.port or (not is_unix and default_port(scheme)) or nil
    local verify = scheme == "https" and options.ssl_verify ~= false
    local name = options.ssl_server_name or host
    local pool = options.pool
    if not pool then
        -- What differs in trust must not share a connection.
        pool = concat({ scheme or "", host, tostring(port), tostring(verify), scheme == "https" and name or "" }, ":")
    end
    local ok, err
    if is_unix then
        ok, err = self.sock:connect(host, { pool = pool })
    else
        ok, err = self.sock:connect(host, port, { pool = pool })
    end
    if not ok then return nil, err end
    if scheme == "https" then
        ok, err = self.sock:sslhandshake(nil, name, verify)
        if not ok then
            self:close()
            return nil, err
        end
    end
    self.host, self.port, self.ssl, self.keepalive = host, port, scheme == "https", true
    return true
end

function _M:ssl_handshake(...)
    self.ssl = true
    return self.sock:sslhandshake(...)
end

function _M:close()
    return self.sock:close()
end

function _M:get_reused_times()
    return self.sock:getreusedtimes()
end

--- Gives the connection back, unless the response said otherwise: 1; 2 and a text when it was closed instead.
function _M:set_keepalive(...)
    if self.keepalive then return self.sock:setkeepalive(...) end
    local ok, err = self.sock:close()
    if not ok then return nil, err end
    return 2, "connection must be closed"
end

-- Names keep the peer's case; any case finds them.
local function new_headers()
    local index = {}
    return setmetatable({}, {
        __index = function(self, name)
            if type(name) ~= "string" then return nil end
            local kept = index[lower((gsub(name, "_", "-")))]
            return kept and rawget(self, kept)
        end,
        __newindex = function(self, name, value)
            local key = lower(name)
            local kept = index[key]
            if kept then
                rawset(self, kept, value)
            else
                index[key] = name
                rawset(self, name, value)
            end
        end,
    })
end

local function safe(text)
    text = tostring(text)
    if find(text, "[\r\n%z]") then return nil, "header with a line break" end
    return text
end

local function has_body(method)
    return method == "POST" or method == "PUT" or method == "PATCH"
end

local function format_request(self, params)
    local query = params.query or ""
    if type(query) == "table" then query = encode_args(query) end
    if query ~= "" and sub(query, 1, 1) ~= "?" then query = "?" .. query end
    local method, path = params.method or "GET", params.path or "/"
    local version = params.version or 1.1
    if find(method .. path .. query, "[%c ]") then return nil, "invalid character in the request line" end
    local out = { method, " ", path, query, " HTTP/", version == 1.0 and "1.0" or "1.1", "\r\n" }
    local names = {}
    for name, value in pairs(params.headers or {}) do
        local key = safe(name)
        if not key then return nil, "invalid header name" end
        names[lower(key)] = true
        for _, one in ipairs(type(value) == "table" and value or { value }) do
            local text, err = safe(one)
            if not text then return nil, err end
            insert(out, key .. ": " .. text .. "\r\n")
        end
    end
    local body = params.body
    if not names.host then
        local host = self.host or "localhost"
        if find(host, "^unix:") then
            host = "localhost"
        elseif self.port and self.port ~= default_port(self.ssl and "https" or "http") then
            host = host .. ":" .. self.port
        end
        insert(out, "Host: " .. host .. "\r\n")
    end
    if not names["user-agent"] then insert(out, "User-Agent: " .. _M._USER_AGENT .. "\r\n") end
    if version == 1.0 and not names.connection then insert(out, "Connection: Keep-Alive\r\n") end
    local chunked = false
    if not names["content-length"] and not names["transfer-encoding"] then
        if type(body) == "string" then
            insert(out, "Content-Length: " .. #body .. "\r\n")
        elseif type(body) == "table" then
            body = concat(body)
            insert(out, "Content-Length: " .. #body .. "\r\n")
        elseif type(body) == "function" then
            insert(out, "Transfer-Encoding: chunked\r\n")
            chunked = true
        elseif has_body(method) then
            insert(out, "Content-Length: 0\r\n")
        end
    elseif type(body) == "table" then
        body = concat(body)
    end
    insert(out, "\r\n")
    return concat(out), body, chunked
end

function _M:send_request(params)
    local head, body, chunked = format_request(self, params)
    if not head then return nil, body end
    if type(body) == "string" then
        local ok, err = self.sock:send(head .. body)
        if not ok then return nil, err end
        return true
    end
    local ok, err = self.sock:send(head)
    if not ok then return nil, err end
    while type(body) == "function" do
        local chunk, chunk_err = body()
        if chunk_err then return nil, chunk_err end
        if not chunk then break end
        if chunk ~= "" then
            if chunked then chunk = ("%x\r\n"):format(#chunk) .. chunk .. "\r\n" end
            ok, err = self.sock:send(chunk)
            if not ok then return nil, err end
        end
    end
    if chunked then
        ok, err = self.sock:send("0\r\n\r\n")
        if not ok then return nil, err end
    end
    return true
end

local function receive_headers(sock)
    local headers = new_headers()
    for _ = 1, MAX_HEADERS do
        local line, err = sock:receive("*l")
        if not line then return nil, err end
        if line == "" then return headers end
        local name, value = match(line, "^([^:%s]+):%s*(.-)%s*$")
        if name then
            local known = headers[name]
            if known == nil then
                headers[name] = value
            elseif type(known) == "table" then
                known[#known + 1] = value
            else
                headers[name] = { known, value }
            end
        end
    end
    return nil, "too many headers"
end

local function receive_status(sock)
    local line, err = sock:receive("*l")
    if not line then return nil, nil, nil, err end
    local version, status, reason = match(line, "^HTTP/(%d%.%d) (%d%d%d) ?(.*)$")
    if not version then return nil, nil, nil, "couldn't parse HTTP version from response status line: " .. line end
    return tonumber(status), tonumber(version), reason
end

-- Readers: each call gives a chunk, nil at the end; nil and the error.

local function chunked_reader(sock)
    local left, over = 0, false
    return function(max)
        if over then return nil end
        if left == 0 then
            local line, err = sock:receive("*l")
            if not line then return nil, err end
            local size = match(line, "^%s*(%x+)")
            left = size and #size <= 8 and tonumber(size, 16)
            if not left then return nil, "unable to read chunksize" end
            if left == 0 then
                over = true
                for _ = 1, MAX_HEADERS do
                    line, err = sock:receive("*l")
                    if not line then return nil, err end
                    if line == "" then return nil end
                end
                return nil, "too many trailers"
            end
        end
        local n = left
        if max and max < n then n = max end
        local data, err = sock:receive(n)
        if not data then return nil, err end
        left = left - n
        if left == 0 then
            local _, end_err = sock:receive(2)
            if end_err then return nil, end_err end
        end
        return data
    end
end

local function length_reader(sock, length, default)
    local left = length
    return function(max)
        if left <= 0 then return nil end
        local n = max or default or left
        if n > left then n = left end
        local data, err, partial = sock:receive(n)
        if not data then return nil, err, partial end
        left = left - n
        return data
    end
end

local function close_reader(sock, default)
    local over = false
    return function(max)
        if over then return nil end
        local data, err = sock:receiveany(max or default or CHUNK)
        if data then return data end
        over = true
        if err == "closed" then return nil end
        return nil, err
    end
end

local function empty_reader() return nil end

local function read_all(res)
    local reader = res.body_reader
    local parts = {}
    while true do
        local chunk, err = reader()
        if err then return nil, err, concat(parts) end
        if not chunk then return concat(parts) end
        parts[#parts + 1] = chunk
    end
end

local function no_body(method, status)
    return method == "HEAD" or status == 204 or status == 304 or (status >= 100 and status < 200)
end

function _M:read_response(params)
    local sock = self.sock
    local status, version, reason, err
    local headers
    repeat
        status, version, reason, err = receive_status(sock)
        if not status then return nil, err end
        headers, err = receive_headers(sock)
        if not headers then return nil, err end
    until status >= 200 or status == 101
    local connection = lower(tostring(headers.Connection or ""))
    self.keepalive = not find(connection, "close", 1, true)
        and (version >= 1.1 or find(connection, "keep%-alive") ~= nil)
    local res = { status = status, reason = reason, headers = headers, has_body = false, body_reader = empty_reader,
                  read_body = read_all }
    if not no_body(params.method or "GET", status) then
        local encoding = headers["Transfer-Encoding"]
        local length = headers["Content-Length"]
        if type(length) == "table" then length = length[1] end
        res.has_body = true
        if encoding and find(lower(tostring(encoding)), "chunked", 1, true) then
            res.body_reader = chunked_reader(sock)
        elseif length then
            length = match(length, "^%d+$") and tonumber(length)
            if not length then return nil, "invalid Content-Length" end
            res.has_body = length > 0
            res.body_reader = length_reader(sock, length, params.chunk_size)
        else
            self.keepalive = false
            res.body_reader = close_reader(sock)
        end
    end
    function res.read_trailers() return headers end
    return res
end

--- res, err = httpc:request({ method, path, query, headers, body, version })
function _M:request(params)
    local ok, err = self:send_request(params)
    if not ok then return nil, err end
    return self:read_response(params)
end

--- responses, err = httpc:request_pipeline({ params, … })
function _M:request_pipeline(requests)
    for _, params in ipairs(requests) do
        local ok, err = self:send_request(params)
        if not ok then return nil, err end
    end
    local responses = {}
    for i, params in ipairs(requests) do
        local res, err = self:read_response(params)
        if not res then return nil, err end
        local body = read_all(res)
        res.body_reader = empty_reader
        res.read_body = function() return body end
        responses[i] = res
    end
    return responses
end

--- res, err = httpc:request_uri(uri, params?): connects, asks, reads the body, gives the connection back.
function _M:request_uri(uri, params)
    local given = params or {}
    local parsed, err = self:parse_uri(uri, false)
    if not parsed then return nil, err end
    local request = {}
    for name, value in pairs(given) do request[name] = value end
    request.scheme = request.scheme or parsed[1]
    request.host = request.host or parsed[2]
    request.port = request.port or parsed[3]
    request.path = request.path or parsed[4]
    if not request.query and parsed[5] ~= "" then request.query = parsed[5] end
    local ok
    ok, err = self:connect({
        scheme = request.scheme, host = request.host, port = request.port, pool = request.pool,
        ssl_verify = request.ssl_verify, ssl_server_name = request.ssl_server_name,
    })
    if not ok then return nil, err end
    local res
    res, err = self:request(request)
    if not res then
        self:close()
        return nil, err
    end
    local body
    body, err = read_all(res)
    if not body then
        self:close()
        return nil, err
    end
    res.body = body
    if request.keepalive == false then
        self:close()
    else
        self:set_keepalive(request.keepalive_timeout, request.keepalive_pool)
    end
    return res
end

--- A reader of the client's request body.
function _M.get_client_body_reader(_, _)
    ngx.req.read_body()
    local body = ngx.req.get_body_data()
    return function()
        local data = body
        body = nil
        return data
    end
end

return _M
