--- What both ends of a WebSocket do: the methods that resty.websocket.server and resty.websocket.client share.
--
-- An object has: sock, max_recv_len, max_send_len, send_masked, recv_masked (whether frames must be), closed (a close frame
-- was sent), fatal (the stream is out of step).

local protocol = require("resty.websocket.protocol")

local floor = math.floor
local tonumber, type = tonumber, type
local char = string.char
local recv_frame, send_frame = protocol.recv_frame, protocol.send_frame

-- The status codes that RFC 6455, 7.4.2 leaves to anyone end below this.
local MAX_CODE = 0x7fff

local _M = {}

--- The bounds that `opts` sets, into an object; `default` is for payloads when it says nothing.
function _M.set_bounds(self, opts, default)
    local len = tonumber(opts.max_payload_len) or default
    self.max_recv_len = tonumber(opts.max_recv_len) or len
    self.max_send_len = tonumber(opts.max_send_len) or len
end

local methods = {}

--- Milliseconds for each wait.
function methods.set_timeout(self, timeout)
    local sock = self.sock
    if not sock then return nil, nil, "not initialized yet" end
    return sock:settimeout(timeout)
end

--- A frame: its payload, its type, "again" when more of the message follows; the message, "close" and the status code of
-- a close frame; nil, nil and what went wrong. After a timeout between frames one may ask again.
function methods.recv_frame(self)
    if self.fatal then return nil, nil, "fatal error already happened" end
    local sock = self.sock
    if not sock then return nil, nil, "not initialized yet" end
    local data, typ, err, idle = recv_frame(sock, self.max_recv_len, self.recv_masked)
    if not data and not idle then self.fatal = true end
    return data, typ, err
end

local function send(self, fin, opcode, payload)
    if self.fatal then return nil, "fatal error already happened" end
    if self.closed then return nil, "already closed" end
    local sock = self.sock
    if not sock then return nil, "not initialized yet" end
    local bytes, err, broken = send_frame(sock, fin, opcode, payload, self.max_send_len, self.send_masked)
    if not bytes then
        if broken then self.fatal = true end
        return nil, err
    end
    return bytes
end

--- send_frame(fin, opcode, payload): the bytes sent, or nil and what went wrong; so with the methods below.
methods.send_frame = send

--- send_text(text)
function methods.send_text(self, data)
    return send(self, true, 1, data)
end

--- send_binary(data)
function methods.send_binary(self, data)
    return send(self, true, 2, data)
end

--- send_ping(msg?)
function methods.send_ping(self, data)
    return send(self, true, 9, data)
end

--- send_pong(msg?)
function methods.send_pong(self, data)
    return send(self, true, 10, data)
end

--- send_close(code?, msg?)
function methods.send_close(self, code, msg)
    local payload
    if code then
        if type(code) ~= "number" or code < 0 or code > MAX_CODE or code % 1 ~= 0 then
            return nil, "bad status code"
        end
        payload = char(floor(code / 0x100), code % 0x100) .. (msg or "")
    end
    local bytes, err = send(self, true, 8, payload)
    if bytes then self.closed = true end
    return bytes, err
end

_M.methods = methods

return _M
