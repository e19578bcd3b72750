--- ngx.socket.*: objects over native.tcp and native.udp (src/lua/ngx/socket_tcp.rs, socket_udp.rs).

local ffi = require("ffi")
local native = require("moongate.native")

local error, ipairs, setmetatable = error, ipairs, setmetatable
local tcp = native.tcp
local new, handshake, start_until, read_until = tcp.new, tcp.sslhandshake, tcp.receiveuntil, tcp.read_until

local _M = {}

local methods = {
    bind = tcp.bind,
    connect = tcp.connect,
    send = tcp.send,
    receive = tcp.receive,
    receiveany = tcp.receiveany,
    close = tcp.close,
    settimeout = tcp.settimeout,
    settimeouts = tcp.settimeouts,
    setoption = tcp.setoption,
    setkeepalive = tcp.setkeepalive,
    getreusedtimes = tcp.getreusedtimes,
    getfd = tcp.getfd,
}
local mt = { __index = methods }

-- Sessions are resumed by the host on its own: what scripts get only stands for one.
local session = ffi.new("char[1]")

--- sock:sslhandshake(reused_session?, server_name?, ssl_verify?, send_status_req?)
function methods.sslhandshake(...)
    local self, reused, name, verify = ...
    if self == nil then
        error("ngx.socket sslhandshake: expecting 1 ~ 5 arguments (including the object), but seen 0", 2)
    end
    local ok, err = handshake(self, nil, name, verify)
    if not ok then return nil, err end
    if reused == false then return true end
    return session
end

--- sock:receiveuntil(pattern, options?): an iterator.
function methods.receiveuntil(...)
    local state, err = start_until(...)
    if not state then return nil, err end
    local self = ...
    return function(size)
        return read_until(self, state, size)
    end
end

--- sock:settrustedstore(store): the authorities that the next handshake trusts, if it verifies at all: what ngx.ssl.parse_pem_cert
-- gives, or `ctx` of resty.openssl.x509.store; nil: those of the configuration.
methods.settrustedstore = tcp.settrustedstore

--- sock:getsslsession(): stands for the session, as what sslhandshake gives. @return session; nil, err
function methods:getsslsession()
    local ok, err = tcp.has_tls(self)
    if not ok then return nil, err end
    return session
end

-- Pointers to what OpenSSL has and the TLS library here has not.
for _, name in ipairs({ "getsslpointer", "getsslctx" }) do
    methods[name] = function(self)
        local ok, err = tcp.has_tls(self)
        if not ok then return nil, err end
        return nil, "not supported: the TLS library is not OpenSSL"
    end
end

--- sock:setclientcert(cert, key): what ngx.ssl has parsed, for the handshakes from now on; nil, nil: none.
methods.setclientcert = tcp.setclientcert

local request_mt = { __index = {
    receive = tcp.receive, receiveany = tcp.receiveany, receiveuntil = methods.receiveuntil,
    settimeout = tcp.settimeout, settimeouts = tcp.settimeouts,
} }

local raw_mt = { __index = {
    send = tcp.send, receive = tcp.receive, receiveany = tcp.receiveany, receiveuntil = methods.receiveuntil,
    settimeout = tcp.settimeout, settimeouts = tcp.settimeouts,
} }

--- ngx.req.socket(raw?): reads the request's body; raw: the client's connection itself, which is the script's from then on.
function _M.of_request(raw)
    local socket, err
    if raw then
        socket, err = tcp.of_client()
    else
        socket, err = tcp.of_request()
    end
    if not socket then return nil, err end
    return setmetatable({ socket }, raw and raw_mt or request_mt)
end

--- ngx.socket.tcp()
function _M.tcp()
    return setmetatable({ new() }, mt)
end

_M.stream = _M.tcp

local udp = native.udp
local new_udp = udp.new
local udp_mt = { __index = {
    bind = udp.bind,
    setpeername = udp.setpeername,
    send = udp.send,
    receive = udp.receive,
    settimeout = udp.settimeout,
    close = udp.close,
} }

--- ngx.socket.udp()
function _M.udp()
    return setmetatable({ new_udp() }, udp_mt)
end

--- ngx.socket.connect(host, port, options?)
function _M.connect(...)
    local sock = _M.tcp()
    local ok, err = sock:connect(...)
    if not ok then return nil, err end
    return sock
end

return _M
