--- The client's end of a WebSocket over ngx.socket.tcp: the public interface of lua-resty-websocket (its README, v0.14);
-- RFC 6455, 4.1.

local endpoint = require("resty.websocket.endpoint")
local crypto = require("moongate.native").crypto

local ipairs, pairs, setmetatable, tonumber, tostring, type = ipairs, pairs, setmetatable, tonumber, tostring, type
local concat, find, match, sub = table.concat, string.find, string.match, string.sub
local ngx = ngx
local tcp = ngx.socket.tcp

-- Bytes of a payload when the caller does not say.
local MAX_PAYLOAD = 65536
-- RFC 6455, 1.3.
local GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
-- Bytes of the answer's head.
local MAX_HEAD = 65536

local _M = { _VERSION = "0.14" }
local mt = { __index = _M }
for name, method in pairs(endpoint.methods) do _M[name] = method end

--- new{ max_payload_len = 65536, max_recv_len, max_send_len, send_unmasked = false, timeout (ms) }: a client without a
-- connection, or nil and why not.
function _M.new(_, opts)
    opts = opts or {}
    local sock, err = tcp()
    if not sock then return nil, err end
    if opts.timeout then sock:settimeout(opts.timeout) end
    local self = { sock = sock, send_masked = not opts.send_unmasked, recv_masked = false }
    endpoint.set_bounds(self, opts, MAX_PAYLOAD)
    return setmetatable(self, mt)
end

-- secure, host, port, target of a URI; nil when it is none.
local function parse_uri(uri)
    if type(uri) ~= "string" or find(uri, "[%c%s]") then return nil end
    local scheme, authority, target = match(uri, "^(wss?)://([^/?#]+)([^#]*)$")
    if not scheme then return nil end
    local host, port = match(authority, "^(%[[%x:.]+%]):?(%d*)$")
    if not host then host, port = match(authority, "^([^%[%]:@]+):?(%d*)$") end
    if not host then return nil end
    if target == "" or sub(target, 1, 1) == "?" then target = "/" .. target end
    return scheme == "wss", host, tonumber(port) or (scheme == "wss" and 443 or 80), target
end

-- Adds a field to the handshake: true, or nil when it would be more than one line.
local function add_line(lines, line)
    if type(line) ~= "string" or find(line, "[\r\n%z]") then return nil end
    lines[#lines + 1] = line
    return true
end

local function handshake_lines(opts, host, target, key)
    local lines = {
        "GET " .. target .. " HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
    }
    local protocols = opts.protocols
    if type(protocols) == "table" then protocols = concat(protocols, ",") end
    local ok = add_line(lines, "Host: " .. tostring(opts.host or host))
        and add_line(lines, "Sec-WebSocket-Key: " .. tostring(key))
        and (not protocols or add_line(lines, "Sec-WebSocket-Protocol: " .. tostring(protocols)))
        and (not opts.origin or add_line(lines, "Origin: " .. tostring(opts.origin)))
    if not ok then return nil, "invalid connect option" end
    for _, line in ipairs(opts.headers or {}) do
        if not add_line(lines, line) then return nil, "invalid custom header" end
    end
    lines[#lines + 1] = "\r\n"
    return concat(lines, "\r\n")
end

-- Agrees on the protocol: true, nil, the answer's head; nil, why not, and the head if there was one.
local function handshake(self, opts, host, target)
    local key = opts.key or ngx.encode_base64(crypto.random(16))
    local request, err = handshake_lines(opts, host, target, key)
    if not request then return nil, err end
    local sock = self.sock
    local bytes
    bytes, err = sock:send(request)
    if not bytes then return nil, "failed to send the handshake request: " .. err end
    local reader
    reader, err = sock:receiveuntil("\r\n\r\n")
    if not reader then return nil, err end
    local head
    head, err = reader(MAX_HEAD)
    if not head then return nil, "failed to receive response header: " .. (err or "empty") end
    -- At the end of the head this says so, without waiting.
    local more, more_err = reader(1)
    if more or more_err then return nil, "failed to receive response header: " .. (more_err or "too long") end
    head = head .. "\r\n\r\n"
    if not find(head, "^HTTP/1%.1 101[ \r]") then
        return nil, "bad HTTP response status line: " .. match(head, "^[^\r\n]*"), head
    end
    local accept = match(head:lower(), "\r\nsec%-websocket%-accept:[ \t]*()")
    accept = accept and match(head, "^[^ \t\r\n]+", accept)
    if accept ~= ngx.encode_base64(ngx.sha1_bin(key .. GUID)) then
        return nil, "bad Sec-WebSocket-Accept response header", head
    end
    return true, nil, head
end

local function make_secure(sock, opts, host)
    if opts.client_cert then
        local ok, err = sock:setclientcert(opts.client_cert, opts.client_priv_key)
        if not ok then return nil, "ssl client cert failed: " .. tostring(err) end
    end
    local name = opts.server_name or opts.host or host
    name = match(name, "^%[(.*)%]") or match(name, "^([^:]+):%d+$") or name
    local ok, err = sock:sslhandshake(false, name, opts.ssl_verify and true or false)
    if not ok then return nil, "ssl handshake failed: " .. tostring(err) end
    return true
end

--- connect("ws://host:port/path" or "wss://…", { protocols, origin, pool, pool_size, backlog, ssl_verify, headers,
-- client_cert, client_priv_key, host, server_name, key }?): 1, nil and the head of the answer, "connection reused" for a
-- connection from the pool; nil, why not, and the head if there was one.
function _M.connect(self, uri, opts)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    opts = opts or {}
    local secure, host, port, target = parse_uri(uri)
    if secure == nil then return nil, "bad websocket uri" end
    if opts.client_cert and not opts.client_priv_key then
        return nil, "client_priv_key must be provided with client_cert"
    end
    self.closed, self.fatal = nil, nil

    local pool = opts.pool
    if not pool then
        pool = host .. ":" .. port
        if secure then pool = pool .. ":ssl:" .. tostring(opts.ssl_verify or false) end
    end
    local ok, err = sock:connect(host, port, { pool = pool, pool_size = opts.pool_size, backlog = opts.backlog })
    if not ok then return nil, "failed to connect: " .. tostring(err) end
    local times = sock:getreusedtimes()
    if times and times > 0 then return 1, nil, "connection reused" end

    if secure then
        ok, err = make_secure(sock, opts, host)
        if not ok then
            sock:close()
            return nil, err
        end
    end
    if port ~= (secure and 443 or 80) then host = host .. ":" .. port end
    local head
    ok, err, head = handshake(self, opts, host, target)
    if not ok then
        sock:close()
        return nil, err, head
    end
    return 1, nil, head
end

--- Puts the connection into its pool for so many milliseconds: 1, or nil and why not.
function _M.set_keepalive(self, ...)
    local sock = self.sock
    if not sock then return nil, "not initialized yet" end
    if self.fatal or self.closed then return nil, "closed" end
    return sock:setkeepalive(...)
end

--- Sends a close frame if none was sent, and closes the connection: 1, or nil and why not.
function _M.close(self)
    local sock = self.sock
    if not sock then return nil, "not initialized yet" end
    local failed
    if not self.closed and not self.fatal then
        local bytes, err = self:send_close()
        if not bytes then failed = "failed to send close frame: " .. err end
    end
    local ok, err = sock:close()
    if failed then return nil, failed end
    return ok, err
end

return _M
