--- An HTTP/1 client over ngx.socket.tcp, with the public interface of lua-resty-http.
--
-- Strict about framing: a response whose length can be read in two ways is refused, and a connection is kept only after
-- a response that was read to its end. Bodies and heads are bounded.

local http_headers = require("resty.http_headers")

local error, ipairs, pairs, rawget, rawset, setmetatable, tonumber, tostring, type =
    error, ipairs, pairs, rawget, rawset, setmetatable, tonumber, tostring, type
local concat, min = table.concat, math.min
local ngx = ngx
local tcp = ngx.socket.tcp

-- Bytes of a body that `read_body` gathers: a server that never stops must not take the worker's memory.
local MAX_BODY = 64 * 1024 * 1024
-- Bytes and lines of a head or of trailers.
local MAX_HEAD, MAX_FIELDS = 256 * 1024, 1000
-- What a body reader asks for at once when the caller does not say.
local CHUNK = 65536
-- Interim responses before the final one.
local MAX_INTERIM = 16

local _M = { _VERSION = "0.17.2", _USER_AGENT = "lua-resty-http/0.17.2 (moongate)" }
local mt = { __index = _M }

local default_ports = { http = 80, https = 443 }

--- A client without a connection.
function _M.new()
    local sock, err = tcp()
    if not sock then return nil, err end
    return setmetatable({ sock = sock, keepalive = true }, mt)
end

--- Milliseconds for connecting, sending and each read.
function _M.set_timeout(self, timeout)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:settimeout(timeout)
end

function _M.set_timeouts(self, connect_timeout, send_timeout, read_timeout)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:settimeouts(connect_timeout, send_timeout, read_timeout)
end

function _M.get_reused_times(self)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:getreusedtimes()
end

function _M.close(self)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    self.pending = nil
    return sock:close()
end

--- Keeps the connection, or closes it where it cannot be used again: then 2 and the reason.
function _M.set_keepalive(self, ...)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    if self.keepalive and not self.pending then
        return sock:setkeepalive(...)
    end
    self.pending = nil
    local ok, err = sock:close()
    if not ok then return nil, err end
    return 2, "connection must be closed"
end

--- { http_proxy, https_proxy, http_proxy_authorization, https_proxy_authorization, no_proxy } for later connects.
function _M.set_proxy_options(self, opts)
    local copy = {}
    for key, value in pairs(opts or {}) do copy[key] = value end
    self.proxy_opts = copy
end

--- scheme, host, port, path and query of a URI as an array; by default the path holds the query.
function _M.parse_uri(_, uri, query_in_path)
    if query_in_path == nil then query_in_path = true end
    if type(uri) ~= "string" then return nil, "bad uri: " .. tostring(uri) end
    local scheme, rest = uri:match("^(https?)://(.+)$")
    if not scheme then
        rest = uri:match("^//(.+)$")
        if not rest then return nil, "bad uri: " .. uri end
        scheme = ngx.var and ngx.var.scheme or "http"
    end
    local authority, tail = rest:match("^([^/?#]*)([^#]*)")
    local host, port = authority:match("^(%[[%x:.]+%]):?(%d*)$")
    if not host then host, port = authority:match("^([^%[%]:@%s]+):?(%d*)$") end
    if not host then return nil, "bad uri: " .. uri end
    port = port ~= "" and tonumber(port) or default_ports[scheme]
    local path, query = tail:match("^([^?]*)%??(.*)$")
    if path == "" then path = "/" end
    if query_in_path and query ~= "" then path = path .. "?" .. query end
    return { scheme, host, port, path, query }
end

-- Connecting --------------------------------------------------------------------------------------------------------

local function proxy_for(opts, scheme, host)
    if not opts then return nil end
    local uri = opts[scheme .. "_proxy"]
    if not uri then return nil end
    local bare = opts.no_proxy
    if bare == "*" then return nil end
    for domain in tostring(bare or ""):gmatch("[^,%s]+") do
        domain = domain:gsub("^%.", "")
        if host == domain or host:sub(-#domain - 1) == "." .. domain then return nil end
    end
    return uri, opts[scheme .. "_proxy_authorization"]
end

local function bracketed(host)
    if host:find(":", 1, true) and host:sub(1, 1) ~= "[" and host:sub(1, 5) ~= "unix:" then
        return "[" .. host .. "]"
    end
    return host
end

local read_head

-- Asks the proxy for a tunnel.
local function tunnel(self, host, port, authorization)
    local target = bracketed(host) .. ":" .. port
    local lines = { "CONNECT " .. target .. " HTTP/1.1\r\nHost: " .. target .. "\r\n" }
    if authorization then
        if tostring(authorization):find("[\r\n%z]") then return nil, "invalid proxy authorization" end
        lines[2] = "Proxy-Authorization: " .. authorization .. "\r\n"
    end
    lines[#lines + 1] = "\r\n"
    local bytes, err = self.sock:send(lines)
    if not bytes then return nil, err end
    local head, head_err = read_head(self.sock)
    if not head then return nil, head_err end
    if head.status < 200 or head.status > 299 then
        return nil, "failed to establish a connection through a proxy: " .. head.status
    end
    return true
end

local function pool_name(options, scheme, host, port, verify, server_name, proxy, authorization)
    if options.pool then return options.pool end
    local name = host .. ":" .. tostring(port or "")
    if scheme == "https" then
        name = "https:" .. name .. ":" .. tostring(verify) .. ":" .. tostring(server_name)
    end
    if proxy then name = name .. ":" .. proxy .. ":" .. tostring(authorization) end
    return name
end

-- connect{ scheme, host, port, pool, pool_size, backlog, proxy_opts, ssl_verify, ssl_server_name, … }
local function connect_options(self, options)
    local sock = self.sock
    local host, port = options.host, options.port
    if type(host) ~= "string" then return nil, "a host is needed to connect" end
    local is_unix = host:sub(1, 5) == "unix:"
    local scheme = options.scheme or (not is_unix and not port and "http") or nil
    if scheme then scheme = scheme:lower() end
    if scheme and not default_ports[scheme] then return nil, "unknown scheme: " .. scheme end
    if not is_unix then port = tonumber(port) or default_ports[scheme or "http"] end

    local verify = options.ssl_verify ~= false
    local server_name = options.ssl_server_name
    if server_name == nil and scheme == "https" then server_name = (host:gsub("^%[(.*)%]$", "%1")) end
    local proxy, authorization
    if not is_unix then
        proxy, authorization = proxy_for(options.proxy_opts or self.proxy_opts, scheme or "http", host)
    end
    local to_host, to_port = host, port
    if proxy then
        local parts, err = self:parse_uri(proxy, false)
        if not parts then return nil, err end
        if parts[1] ~= "http" then return nil, "protocol " .. parts[1] .. " not supported for proxy connections" end
        to_host, to_port = parts[2], parts[3]
    end

    local tcp_opts = {
        pool = pool_name(options, scheme, host, port, verify, server_name, proxy, authorization),
        pool_size = options.pool_size,
        backlog = options.backlog,
    }
    local ok, err
    if is_unix then
        ok, err = sock:connect(to_host, tcp_opts)
    else
        ok, err = sock:connect(to_host, to_port, tcp_opts)
    end
    if not ok then return nil, err end

    self.keepalive, self.pending = true, nil
    self.host, self.port, self.ssl = host, port, scheme == "https"
    self.http_proxy = proxy and scheme ~= "https" and { authorization = authorization } or nil

    local session
    if scheme == "https" then
        if proxy and sock:getreusedtimes() == 0 then
            ok, err = tunnel(self, host, port, authorization)
            if not ok then
                sock:close()
                return nil, err
            end
        end
        if options.ssl_client_cert or options.ssl_client_priv_key then
            ok, err = sock:setclientcert(options.ssl_client_cert, options.ssl_client_priv_key)
            if not ok then
                sock:close()
                return nil, "could not set client certificate: " .. tostring(err)
            end
        end
        session, err = sock:sslhandshake(options.ssl_reused_session, server_name, verify, options.ssl_send_status_req)
        if not session then
            sock:close()
            return nil, err
        end
    end
    return true, nil, session
end

--- connect{ … }, or connect(host, port, options?), connect("unix:…", options?) for the bare connection.
function _M.connect(self, first, ...)
    if not self.sock then return nil, "not initialized" end
    if type(first) == "table" then return connect_options(self, first) end
    self.keepalive, self.pending, self.ssl, self.http_proxy = true, nil, false, nil
    self.host, self.port = first, (...)
    if type(self.port) == "table" then self.port = nil end
    return self.sock:connect(first, ...)
end

--- ssl_handshake(session?, server_name?, verify?, …) on a bare connection.
function _M.ssl_handshake(self, ...)
    if not self.sock then return nil, "not initialized" end
    self.ssl = true
    return self.sock:sslhandshake(...)
end

-- Requests ----------------------------------------------------------------------------------------------------------

local TOKEN = "^[%w!#$%%&'*+%-.^_`|~]+$"

-- What must not stand in a request line is escaped: nothing can end it early.
local function escaped(text)
    return (text:gsub("[^\33-\126]", function(c) return ("%%%02X"):format(c:byte()) end))
end

local function target_of(self, params)
    local path, query = params.path or "/", params.query
    if path:sub(1, 1) ~= "/" and path ~= "*" then path = "/" .. path end
    if type(query) == "table" then query = ngx.encode_args(query) end
    if query and query ~= "" then
        if query:sub(1, 1) ~= "?" then query = "?" .. query end
        path = path .. query
    end
    path = escaped(path)
    if self.http_proxy then
        local port = self.port ~= 80 and ":" .. self.port or ""
        path = "http://" .. bracketed(self.host) .. port .. path
    end
    return path
end

local function host_field(self)
    local host = self.host or ""
    if host:sub(1, 5) == "unix:" then return "localhost" end
    host = bracketed(host)
    if self.port and self.port ~= (self.ssl and 443 or 80) then host = host .. ":" .. self.port end
    return host
end

local function body_length(body)
    if type(body) ~= "table" then return #tostring(body) end
    local n = 0
    for _, part in ipairs(body) do n = n + (type(part) == "table" and body_length(part) or #tostring(part)) end
    return n
end

-- The headers as they go out, or nil and why not.
local function request_headers(self, params, method)
    local ok, headers = pcall(http_headers.new, params.headers)
    if not ok then return nil, "invalid headers" end
    local body = params.body
    if headers["Host"] == nil then headers["Host"] = host_field(self) end
    if headers["User-Agent"] == nil then headers["User-Agent"] = _M._USER_AGENT end
    if params.version == 1.0 and headers["Connection"] == nil then headers["Connection"] = "Keep-Alive" end
    if self.http_proxy and self.http_proxy.authorization and headers["Proxy-Authorization"] == nil then
        headers["Proxy-Authorization"] = self.http_proxy.authorization
    end
    if type(body) == "function" then
        local length, coding = headers["Content-Length"], headers["Transfer-Encoding"]
        if length and coding then return nil, "a request has either Content-Length or Transfer-Encoding" end
        if not length and not coding then
            return nil, "a body from an iterator needs Content-Length or Transfer-Encoding: chunked"
        end
        if length and not tostring(length):find("^%d+$") then return nil, "invalid Content-Length" end
    else
        -- The length is what the body has, whatever headers say that were taken from elsewhere.
        headers["Transfer-Encoding"] = nil
        if body ~= nil then
            headers["Content-Length"] = body_length(body)
        elseif method == "POST" or method == "PUT" or method == "PATCH" then
            headers["Content-Length"] = 0
        else
            headers["Content-Length"] = nil
        end
    end
    return headers
end

local function add_field(lines, name, value)
    value = tostring(value)
    if not name:find(TOKEN) then return nil, "invalid header name" end
    if value:find("[\r\n%z]") then return nil, "invalid value of header " .. name end
    lines[#lines + 1] = name .. ": " .. value .. "\r\n"
    return true
end

local function format_request(self, params, method, headers)
    if not method:find(TOKEN) then return nil, "invalid method" end
    local version = params.version or 1.1
    if version ~= 1.1 and version ~= 1.0 then return nil, "unsupported HTTP version" end
    local lines = { ("%s %s HTTP/%.1f\r\n"):format(method, target_of(self, params), version) }
    for name, value in pairs(headers) do
        name = tostring(name)
        if type(value) == "table" then
            for _, each in ipairs(value) do
                local ok, err = add_field(lines, name, each)
                if not ok then return nil, err end
            end
        elseif value ~= nil then
            local ok, err = add_field(lines, name, value)
            if not ok then return nil, err end
        end
    end
    lines[#lines + 1] = "\r\n"
    return lines
end

-- Sends what an iterator yields; with Content-Length exactly so much.
local function send_pieces(sock, body, length)
    local sent = 0
    while true do
        local piece, err = body()
        if piece == nil then
            if err ~= nil then return nil, err end
            break
        end
        if piece ~= "" then
            sent = sent + #piece
            if length and sent > length then return nil, "body is longer than Content-Length" end
            local bytes, send_err = sock:send(piece)
            if not bytes then return nil, send_err end
        end
    end
    if length and sent < length then return nil, "body is shorter than Content-Length" end
    return sent
end

local function send_body(sock, body, headers)
    if body == nil then return true end
    if type(body) == "function" then return send_pieces(sock, body, tonumber(headers["Content-Length"])) end
    if type(body) ~= "table" then body = tostring(body) end
    return sock:send(body)
end

-- Sends a request; what reading its response needs to know.
local function send_request(self, params)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    local method = params.method or "GET"
    local headers, err = request_headers(self, params, method)
    if not headers then return nil, err end
    local lines, format_err = format_request(self, params, method, headers)
    if not lines then return nil, format_err end
    -- Until the response is read to its end the connection is of no use to others.
    self.pending = true
    local expects = tostring(headers["Expect"] or ""):lower() == "100-continue" and params.body ~= nil
    local body = params.body
    if not expects and (type(body) == "string" or type(body) == "table") then
        lines[#lines + 1] = body
        body = nil
    end
    local bytes, send_err = sock:send(lines)
    if not bytes then return nil, send_err end
    local sent = { method = method, headers = headers }
    if expects then
        sent.continue = body
        return sent
    end
    local ok, body_err = send_body(sock, body, headers)
    if not ok then return nil, body_err end
    return sent
end

-- Responses ---------------------------------------------------------------------------------------------------------

local function add_header(headers, name, value)
    local before = headers[name]
    if before == nil then
        headers[name] = value
    elseif type(before) == "table" then
        before[#before + 1] = value
    else
        headers[name] = { before, value }
    end
end

-- Fields up to the empty line.
local function read_fields(sock)
    local headers, size, last = http_headers.new(), 0, nil
    for _ = 1, MAX_FIELDS + 1 do
        local line, err = sock:receive("*l")
        if not line then return nil, err end
        if line == "" then return headers end
        size = size + #line
        if size > MAX_HEAD then return nil, "response headers too large" end
        local name, value = line:match("^([^%s:]+):[ \t]*(.-)[ \t]*$")
        if name then
            if not name:find(TOKEN) then return nil, "invalid response header" end
            add_header(headers, name, value)
            last = name
        elseif last and line:find("^[ \t]") then
            return nil, "folded response header"
        else
            return nil, "invalid response header"
        end
    end
    return nil, "too many response headers"
end

function read_head(sock)
    local line, err = sock:receive("*l")
    if not line then return nil, err end
    local version, status, reason = line:match("^HTTP/(1%.[01]) (%d%d%d) ?(.*)$")
    if not version then return nil, "couldn't parse HTTP version from response status line: " .. line:sub(1, 128) end
    local headers, fields_err = read_fields(sock)
    if not headers then return nil, fields_err end
    return { status = tonumber(status), version = tonumber(version), reason = reason, headers = headers }
end

local function list_has(value, token)
    if type(value) == "table" then value = concat(value, ",") end
    for item in tostring(value or ""):lower():gmatch("[^,]+") do
        if item:match("^%s*(.-)%s*$") == token then return true end
    end
    return false
end

-- The length of a body: a number, "none", "chunked", "close", or nil and why it cannot be told.
local function framing(head, method)
    local status, headers = head.status, head.headers
    if method == "HEAD" or status == 204 or status == 304 or status < 200
        or (method == "CONNECT" and status < 300) then
        return "none"
    end
    local coding, length = headers["Transfer-Encoding"], headers["Content-Length"]
    if coding ~= nil then
        if length ~= nil then return nil, "response with Transfer-Encoding and Content-Length" end
        if type(coding) == "table" or coding:lower() ~= "chunked" then return nil, "unsupported transfer encoding" end
        if head.version < 1.1 then return nil, "chunked response of HTTP/1.0" end
        return "chunked"
    end
    if length ~= nil then
        if type(length) == "table" then
            for _, other in ipairs(length) do
                if other ~= length[1] then return nil, "response with several lengths" end
            end
            length = length[1]
        end
        if not length:find("^%d+$") or #length > 15 then return nil, "invalid Content-Length in response" end
        return tonumber(length)
    end
    return "close"
end

local function no_more() return nil end

-- Readers return a piece, nil at the end, nil and a reason on failure. `done` is called once, at the end.

local function length_reader(sock, length, done)
    local left = length
    return function(max)
        if left == 0 then return nil end
        local data, err, partial = sock:receive(min(tonumber(max) or CHUNK, left))
        if not data then
            left = 0
            return nil, err, partial
        end
        left = left - #data
        if left == 0 then done() end
        return data
    end
end

local function chunk_size(sock)
    local line, err = sock:receive("*l")
    if not line then return nil, err end
    local digits = line:match("^(%x+)[ \t]*$") or line:match("^(%x+)[ \t]*;")
    if not digits or #digits > 12 then return nil, "unable to read chunksize" end
    return tonumber(digits, 16)
end

local function chunked_reader(sock, response, done)
    local left, over = 0, false
    local function fail(err, partial)
        over = true
        return nil, err, partial
    end
    return function(max)
        if over then return nil end
        local err, partial, data
        if left == 0 then
            left, err = chunk_size(sock)
            if not left then return fail(err) end
            if left == 0 then
                over = true
                response.trailers, err = read_fields(sock)
                if not response.trailers then return nil, err end
                done()
                return nil
            end
        end
        data, err, partial = sock:receive(min(tonumber(max) or CHUNK, left))
        if not data then return fail(err, partial) end
        left = left - #data
        if left == 0 then
            local rest
            rest, err = sock:receive("*l")
            if rest ~= "" then return fail(err or "unexpected data after a chunk") end
        end
        return data
    end
end

local function close_reader(sock, done)
    local over = false
    return function(max)
        if over then return nil end
        local data, err = sock:receiveany(tonumber(max) or CHUNK)
        if data then return data end
        over = true
        if err ~= "closed" then return nil, err end
        done()
        return nil
    end
end

local function read_body(response)
    if not response.has_body then return nil, "no body to be read" end
    local reader = response.body_reader
    local parts, n, size = {}, 0, 0
    while true do
        local part, err, partial = reader()
        if not part then
            if err then return nil, err, concat(parts) .. (partial or "") end
            return concat(parts)
        end
        n, size = n + 1, size + #part
        if size > MAX_BODY then return nil, "response body too large" end
        parts[n] = part
    end
end

local function read_trailers(response)
    local trailers = response.trailers
    if not trailers then return nil, "no trailers" end
    local headers = response.headers
    for name, value in pairs(trailers) do
        if headers[name] == nil then headers[name] = value end
    end
    return headers
end

-- Interim responses are passed over; 101 is final.
local function read_final_head(self, sent)
    for _ = 1, MAX_INTERIM do
        local head, err = read_head(self.sock)
        if not head then return nil, err end
        if head.status == 100 and sent.continue ~= nil then
            local ok, body_err = send_body(self.sock, sent.continue, sent.headers)
            if not ok then return nil, body_err end
            sent.continue = nil
        end
        if head.status >= 200 or head.status == 101 then return head end
    end
    return nil, "too many interim responses"
end

local function keeps(head, sent)
    local connection = head.headers["Connection"]
    if list_has(connection, "close") or list_has(sent.headers["Connection"], "close") then return false end
    return head.version >= 1.1 or list_has(connection, "keep-alive")
end

local function read_response(self, sent)
    local head, err = read_final_head(self, sent)
    if not head then return nil, err end
    local length, framing_err = framing(head, sent.method)
    if not length then
        self.keepalive = false
        self.sock:close()
        return nil, framing_err
    end
    -- A body that was held back and never asked for, a change of protocol, an end that is the connection's: the last.
    self.keepalive = keeps(head, sent) and length ~= "close" and head.status ~= 101 and sent.continue == nil
    local function done() self.pending = nil end
    local response = {
        status = head.status, reason = head.reason, headers = head.headers, has_body = length ~= "none",
        read_body = read_body, read_trailers = read_trailers,
    }
    if length == "none" or length == 0 then
        response.body_reader = no_more
        if head.status ~= 101 then done() end
    elseif length == "chunked" then
        response.body_reader = chunked_reader(self.sock, response, done)
    elseif length == "close" then
        response.body_reader = close_reader(self.sock, done)
    else
        response.body_reader = length_reader(self.sock, length, done)
    end
    return response
end

--- request{ method, path, query, headers, body, version }: a response whose body is still to be read.
function _M.request(self, params)
    local sent, err = send_request(self, params or {})
    if not sent then return nil, err end
    return read_response(self, sent)
end

local lazy_mt = {
    __index = function(lazy, key)
        local read = rawget(lazy, "_read")
        if not read then return nil end
        rawset(lazy, "_read", nil)
        local response, err = read()
        if not response then response = { err = err } end
        for name, value in pairs(response) do rawset(lazy, name, value) end
        return rawget(lazy, key)
    end,
}

--- request_pipeline{ params, … }: sends all, then gives responses that are read in this order when they are looked at.
function _M.request_pipeline(self, requests)
    local responses = {}
    for i, params in ipairs(requests) do
        if params.headers and http_headers.new(params.headers)["Expect"] then
            return nil, "Cannot pipeline request specifying Expect: 100-continue"
        end
        local sent, err = send_request(self, params)
        if not sent then return nil, err end
        responses[i] = setmetatable({ _read = function() return read_response(self, sent) end }, lazy_mt)
    end
    return responses
end

--- request_uri(uri, params): connects, sends, reads the whole body, keeps or closes the connection.
function _M.request_uri(self, uri, params)
    local all = {}
    for key, value in pairs(params or {}) do all[key] = value end
    if self.proxy_opts and not all.proxy_opts then all.proxy_opts = self.proxy_opts end
    local parts, parse_err = self:parse_uri(uri, false)
    if not parts then return nil, parse_err end
    all.scheme, all.host, all.port = parts[1], parts[2], parts[3]
    if not all.path then all.path = parts[4] end
    if not all.query then all.query = parts[5] end

    local ok, err = self:connect(all)
    if not ok then return nil, err end
    local response
    response, err = self:request(all)
    if not response then
        self:close()
        return nil, err
    end
    local body
    body, err = "", nil
    if response.has_body then body, err = response:read_body() end
    if not body then
        self:close()
        return nil, err
    end
    response.body = body
    if all.keepalive == false then
        self:close()
    else
        -- A connection that cannot be kept is no failure of the request.
        local kept, keep_err = self:set_keepalive(all.keepalive_timeout, all.keepalive_pool)
        if not kept and keep_err ~= "closed" then ngx.log(ngx.DEBUG, "connection not kept: ", keep_err) end
    end
    return response
end

-- The request that runs ---------------------------------------------------------------------------------------------

--- An iterator over the body of the request that runs, in pieces of `chunksize`; nil without a body.
function _M.get_client_body_reader(_, chunksize)
    chunksize = tonumber(chunksize) or CHUNK
    ngx.req.read_body()
    local body = ngx.req.get_body_data()
    if not body or body == "" then return nil end
    local at = 1
    return function(max)
        if at > #body then return nil end
        local piece = body:sub(at, at + (tonumber(max) or chunksize) - 1)
        at = at + #piece
        return piece
    end
end

--- Sends the request that runs to where the client is connected.
function _M.proxy_request(self, chunksize)
    local uri = ngx.re.gsub(ngx.var.uri, "\\s", "%20", "jo") .. (ngx.var.is_args or "") .. (ngx.var.query_string or "")
    local reader = self:get_client_body_reader(chunksize)
    local parts = {}
    if reader then
        for piece in reader do parts[#parts + 1] = piece end
    end
    return self:request({
        method = ngx.req.get_method(), path = uri, headers = ngx.req.get_headers(),
        body = reader and concat(parts) or nil,
    })
end

-- Fields of one hop (RFC 9110, 7.6.1) and those that the answer's own framing sets.
local hop_by_hop = {
    ["connection"] = true, ["keep-alive"] = true, ["proxy-authenticate"] = true, ["proxy-authorization"] = true,
    ["te"] = true, ["trailers"] = true, ["transfer-encoding"] = true, ["upgrade"] = true, ["content-length"] = true,
}

--- Answers the request that runs with a response.
function _M.proxy_response(_, response, chunksize)
    if not response then error("a response is needed", 2) end
    ngx.status = response.status
    for name, value in pairs(response.headers) do
        if not hop_by_hop[name:lower()] then ngx.header[name] = value end
    end
    repeat
        local piece, err = response.body_reader(chunksize)
        if err then
            ngx.log(ngx.ERR, err)
            break
        end
        if piece then
            local ok, print_err = ngx.print(piece)
            if not ok then
                ngx.log(ngx.ERR, print_err)
                break
            end
        end
    until not piece
end

return _M
