--- The server's end of a WebSocket, in the request that runs: the public interface of lua-resty-websocket (its README,
-- v0.14); RFC 6455, 4.2.
--
-- Needs ngx.send_headers and ngx.flush that send a 101 at once, and ngx.req.socket(true).

local endpoint = require("resty.websocket.endpoint")

local pairs, setmetatable, tostring, type = pairs, setmetatable, tostring, type
local concat = table.concat
local ngx = ngx
local req = ngx.req

-- Bytes of a payload when the caller does not say.
local MAX_PAYLOAD = 65535
-- RFC 6455, 1.3.
local GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

local _M = { _VERSION = "0.14" }
local mt = { __index = _M }
for name, method in pairs(endpoint.methods) do _M[name] = method end

-- The value of a field, of several all with commas between.
local function field(headers, name)
    local value = headers[name]
    if type(value) == "table" then value = concat(value, ",") end
    return value
end

local function has(value, token)
    for item in (value or ""):lower():gmatch("[^,]+") do
        if item:match("^%s*(.-)%s*$") == token then return true end
    end
    return false
end

-- What the answer to the handshake says: the accepted key and a subprotocol; nil and why not.
local function check_handshake()
    if req.http_version() ~= 1.1 then return nil, "bad http version" end
    if req.get_method() ~= "GET" then return nil, "bad request method" end
    local headers = req.get_headers()
    local upgrade = field(headers, "upgrade")
    if not has(upgrade, "websocket") then return nil, 'bad "upgrade" request header: ' .. tostring(upgrade) end
    if not has(field(headers, "connection"), "upgrade") then return nil, 'bad "connection" request header' end
    local key = field(headers, "sec-websocket-key")
    local nonce = key and ngx.decode_base64(key)
    if not nonce or #nonce ~= 16 then return nil, 'bad "sec-websocket-key" request header' end
    if field(headers, "sec-websocket-version") ~= "13" then
        return nil, 'bad "sec-websocket-version" request header'
    end
    local protocols = field(headers, "sec-websocket-protocol")
    -- One of those that the client offers: which one means nothing to us.
    return ngx.encode_base64(ngx.sha1_bin(key .. GUID)), protocols and protocols:match("^[%s,]*([^%s,]+)")
end

--- new{ max_payload_len = 65535, max_recv_len, max_send_len, send_masked = false, timeout (ms) }: answers the handshake of
-- the request that runs; an object, or nil and why not.
function _M.new(_, opts)
    opts = opts or {}
    if ngx.headers_sent then return nil, "response header already sent" end
    req.read_body()
    local accept, protocol = check_handshake()
    if not accept then return nil, protocol end

    local header = ngx.header
    header["Upgrade"], header["Connection"], header["Sec-WebSocket-Accept"] = "websocket", "upgrade", accept
    header["Sec-WebSocket-Protocol"], header["Content-Type"] = protocol, nil
    ngx.status = 101
    local ok, err = ngx.send_headers()
    if not ok then return nil, "failed to send response header: " .. (err or "unknown") end
    ok, err = ngx.flush(true)
    if not ok then return nil, "failed to flush response header: " .. (err or "unknown") end

    local sock
    sock, err = req.socket(true)
    if not sock then return nil, err end
    if opts.timeout then sock:settimeout(opts.timeout) end
    local self = { sock = sock, send_masked = opts.send_masked and true or false, recv_masked = true }
    endpoint.set_bounds(self, opts, MAX_PAYLOAD)
    return setmetatable(self, mt)
end

return _M
