--- ngx.socket: the faces of cosockets (src/lua/ngx/socket_tcp.rs, socket_udp.rs).

local native = require("moongate.native")
local tcp, udp = native.tcp, native.udp

local error, getmetatable, setmetatable, tonumber, type = error, getmetatable, setmetatable, tonumber, type

local Tcp = {}
local tcp_mt = { __index = Tcp }
local Udp = {}
local udp_mt = { __index = Udp }

local _M = {}

--- tcpsock = ngx.socket.tcp()
function _M.tcp()
    return setmetatable({ socket = tcp.new() }, tcp_mt)
end

--- udpsock = ngx.socket.udp()
function _M.udp()
    return setmetatable({ socket = udp.new() }, udp_mt)
end

--- tcpsock, err = ngx.socket.connect(host, port, options?)
function _M.connect(...)
    local sock = _M.tcp()
    local ok, err = sock:connect(...)
    if not ok then return nil, err end
    return sock
end

_M.stream = _M.tcp

--- 1, or nil and the error: connect(host, port, options?) or connect("unix:/path", options?). Of the options `pool`
-- counts; the size of a pool is what `setkeepalive` says.
function Tcp:connect(host, port, options)
    if type(host) ~= "string" then error("bad argument #1 to 'connect' (string expected)", 2) end
    if type(port) == "table" then
        port, options = nil, port
    elseif port ~= nil then
        local n = tonumber(port)
        if not n then error("bad argument #2 to 'connect' (number expected)", 2) end
        port = n
    end
    if options ~= nil and type(options) ~= "table" then
        error("bad argument #3 to 'connect' (table expected)", 2)
    end
    local pool = options and options.pool
    if pool ~= nil and type(pool) ~= "string" and type(pool) ~= "number" then
        error("bad argument #3 to 'connect' (bad \"pool\" option type: " .. type(pool) .. ")", 2)
    end
    return tcp.connect(self.socket, host, port, pool)
end

--- true, or nil and the error: sslhandshake(reused_session?, server_name?, ssl_verify?). Sessions are kept by the TLS
-- library itself, so the session that is given back is just true.
function Tcp:sslhandshake(_, server_name, ssl_verify)
    return tcp.handshake(self.socket, server_name, ssl_verify)
end

--- Accepts only nil: client certificates are set on upstreams.
function Tcp:setclientcert(cert, key)
    if cert == nil and key == nil then return true end
    return nil, "not supported"
end

function Tcp:send(data)
    return tcp.send(self.socket, data)
end

function Tcp:receive(pattern)
    return tcp.receive(self.socket, pattern)
end

function Tcp:receiveany(max)
    local n = tonumber(max)
    if not n then error("bad argument #1 to 'receiveany' (number expected)", 2) end
    return tcp.receive_any(self.socket, n)
end

--- iterator = receiveuntil(mark, { inclusive = bool }?): data up to the mark; iterator(size) in pieces, nil after
-- the last.
function Tcp:receiveuntil(mark, options)
    if type(mark) ~= "string" and type(mark) ~= "number" then
        error("bad argument #1 to 'receiveuntil' (string expected)", 2)
    end
    mark = mark .. ""
    if mark == "" then return nil, "pattern is empty" end
    local inclusive = options and options.inclusive or false
    local socket, done = self.socket, false
    return function(size)
        if done then
            done = false
            return nil, nil, nil
        end
        if not size then return tcp.receive_until(socket, mark, inclusive) end
        local data, err, partial = tcp.receive_until(socket, mark, inclusive, size)
        if not data then return nil, err, partial end
        if #data < size then
            -- The mark comes next.
            done = true
            tcp.receive(socket, #mark)
            if inclusive then data = data .. mark end
        end
        return data
    end
end

function Tcp:settimeout(ms)
    return tcp.timeouts(self.socket, ms or 0, ms or 0, ms or 0)
end

function Tcp:settimeouts(connect, send, read)
    return tcp.timeouts(self.socket, connect, send, read)
end

--- Accepted: the options that matter (no delay) are set.
function Tcp:setoption()
    return 1
end

function Tcp:setkeepalive(timeout, size)
    return tcp.keep(self.socket, timeout, size)
end

function Tcp:getreusedtimes()
    return tcp.reused(self.socket)
end

function Tcp:close()
    return tcp.close(self.socket)
end

--- 1, or nil and the error: setpeername(host, port) or setpeername("unix:/path")
function Udp:setpeername(host, port)
    return udp.set_peer(self.socket, host, port and tonumber(port))
end

function Udp:send(data)
    if type(data) == "table" then
        local parts = {}
        for i, part in ipairs(data) do parts[i] = part end
        data = table.concat(parts)
    end
    return udp.send(self.socket, data)
end

function Udp:receive(size)
    return udp.receive(self.socket, size)
end

function Udp:settimeout(ms)
    return udp.timeout(self.socket, ms or 0)
end

function Udp:close()
    return udp.close(self.socket)
end

_M.is_tcp = function(object) return getmetatable(object) == tcp_mt end

return _M
