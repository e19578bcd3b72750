--- A MySQL and MariaDB client over ngx.socket.tcp, with the public interface of lua-resty-mysql (its README, v0.27) and the
-- client/server protocol of MySQL's internals manual (text protocol).
--
-- Packets, columns and results are bounded. After anything that leaves the connection out of step it is closed. A
-- password goes out as it is only over TLS or a unix socket, or encrypted with the server's key where it asks so.

local bit = require("bit")
local crypto = require("moongate.native").crypto
local ed25519 = require("moongate.ed25519")
local rsa = require("resty.rsa")
local new_tab = require("table.new")

local bxor, floor, max, min = bit.bxor, math.floor, math.max, math.min
local pairs, setmetatable, tonumber, tostring, type = pairs, setmetatable, tonumber, tostring, type
local byte, char, concat, find, rep, sub = string.byte, string.char, table.concat, string.find, string.rep, string.sub
local null = ngx.null
local sha1 = ngx.sha1_bin
local tcp = ngx.socket.tcp

-- Bytes of an answer's packet when the caller does not say.
local MAX_PACKET = 1024 * 1024
-- A packet that is so long goes on in the next one.
local FULL_PACKET = 0xffffff
-- Columns of a table in MySQL.
local MAX_COLUMNS = 4096
-- Bytes of a result: a quarter of what a VM may have; and what a field costs beside its bytes.
local MAX_RESULT, FIELD = 128 * 1024 * 1024, 16
-- Rounds of an authentication.
local MAX_ROUNDS = 8
local MAX_PREALLOC = 1024

local _M = { _VERSION = "0.27" }
local mt = { __index = _M }

-- The default collation of each character set.
local charsets = {
    big5 = 1, dec8 = 3, cp850 = 4, hp8 = 6, koi8r = 7, latin1 = 8, latin2 = 9, swe7 = 10, ascii = 11, ujis = 12,
    sjis = 13, hebrew = 16, tis620 = 18, euckr = 19, koi8u = 22, gb2312 = 24, greek = 25, cp1250 = 26, gbk = 28,
    latin5 = 30, armscii8 = 32, utf8 = 33, ucs2 = 35, cp866 = 36, keybcs2 = 37, macce = 38, macroman = 39, cp852 = 40,
    latin7 = 41, utf8mb4 = 45, cp1251 = 51, utf16 = 54, utf16le = 56, cp1256 = 57, cp1257 = 59, utf32 = 60,
    binary = 63, geostd8 = 92, cp932 = 95, eucjpms = 97, gb18030 = 248,
}

-- Capability flags. Rows that an update has found count as affected, as lua-resty-mysql has it. LOCAL INFILE is never
-- offered: a server could ask for files.
local FOUND_ROWS, WITH_DB, SSL, PLUGIN_AUTH = 0x2, 0x8, 0x800, 0x80000
local CAPABILITIES = 0x1 + FOUND_ROWS + 0x4 -- long passwords, long flags
    + 0x100 + 0x200 + 0x400 + 0x2000 + 0x8000 -- ignore space, 4.1, interactive, transactions, secure connection
    + 0x10000 + 0x20000 -- multiple statements, multiple results

-- A status flag of OK and EOF.
local MORE_RESULTS = 8

local COM_QUIT, COM_QUERY = "\1", "\3"

--- A client without a connection: db, or nil and why not.
function _M.new()
    local sock, err = tcp()
    if not sock then return nil, err end
    return setmetatable({ sock = sock, state = "closed", packet_no = 0, left = 0 }, mt)
end

--- Milliseconds for connecting, each send and each read.
function _M.set_timeout(self, timeout)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:settimeout(timeout)
end

--- Milliseconds for connecting, for each send, for each read.
function _M.set_timeouts(self, connect_timeout, send_timeout, read_timeout)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:settimeouts(connect_timeout, send_timeout, read_timeout)
end

-- Numbers and texts -------------------------------------------------------------------------------------------------

-- Little-endian, 0 behind the end of the packet.
local function int2(data, at)
    local a, b = byte(data, at, at + 1)
    return (a or 0) + (b or 0) * 0x100
end

local function int3(data, at)
    local a, b, c = byte(data, at, at + 2)
    return (a or 0) + (b or 0) * 0x100 + (c or 0) * 0x10000
end

local function int4(data, at)
    return int3(data, at) + (byte(data, at + 3) or 0) * 0x1000000
end

local function to_int(value, bytes)
    local out = {}
    for i = 1, bytes do
        out[i] = char(value % 0x100)
        value = floor(value / 0x100)
    end
    return concat(out)
end

-- A length-encoded number and where it ends; null; nil when the packet is too short.
local function lenenc(data, at)
    local first = byte(data, at)
    if not first then return nil end
    if first < 251 then return first, at + 1 end
    if first == 251 then return null, at + 1 end
    local n
    if first == 252 then
        first, n = int2(data, at + 1), 3
    elseif first == 253 then
        first, n = int3(data, at + 1), 4
    elseif first == 254 then
        -- Above 2^53 the lowest bits go.
        first, n = int4(data, at + 1) + int4(data, at + 5) * 0x100000000, 9
    else
        return nil
    end
    if at + n - 1 > #data then return nil end
    return first, at + n
end

-- A length-encoded text and where it ends; null; nil when the packet is too short.
local function text(data, at)
    local size, from = lenenc(data, at)
    if not size then return nil end
    if size == null then return null, from end
    local to = from + size
    if to - 1 > #data then return nil end
    return sub(data, from, to - 1), to
end

-- Up to a zero byte, and where it ends; nil without one.
local function zero_text(data, at)
    local to = find(data, "\0", at, true)
    if not to then return nil end
    return sub(data, at, to - 1), to + 1
end

local function bytes_xor(a, b)
    local out = new_tab(#a, 0)
    for i = 1, #a do out[i] = char(bxor(byte(a, i), byte(b, (i - 1) % #b + 1))) end
    return concat(out)
end

-- Packets -----------------------------------------------------------------------------------------------------------

local function send_packet(self, payload)
    local sock = self.sock
    local no, out, n, at = self.packet_no, {}, 0, 1
    repeat
        local size = min(#payload - at + 1, FULL_PACKET)
        out[n + 1] = to_int(size, 3) .. char(no)
        out[n + 2] = (at == 1 and size == #payload) and payload or sub(payload, at, at + size - 1)
        n, at, no = n + 2, at + size, (no + 1) % 0x100
    until size < FULL_PACKET
    self.packet_no = no
    return sock:send(out)
end

-- The payload of a packet of at least one byte; nil and what went wrong.
local function read_packet(self)
    local sock, limit = self.sock, self.max_packet_size
    local whole
    while true do
        local head, err = sock:receive(4)
        if not head then return nil, "failed to receive packet header: " .. err end
        local size, no = int3(head, 1), byte(head, 4)
        if no ~= self.packet_no then return nil, "packets out of order" end
        self.packet_no = (no + 1) % 0x100
        if size == 0 and not whole then return nil, "empty packet" end
        local total = size + (whole and #whole or 0)
        if total > limit then return nil, "packet size too big: " .. total end
        local data = ""
        if size > 0 then
            data, err = sock:receive(size)
            if not data then return nil, "failed to read packet content: " .. err end
        end
        if whole then data = whole .. data end
        if size < FULL_PACKET then return data end
        whole = data
    end
end

-- nil, text, number, SQL state of an error packet.
local function parse_error(data)
    local errno = int2(data, 2)
    if byte(data, 4) == 35 then return nil, sub(data, 10), errno, sub(data, 5, 9) end -- #
    return nil, sub(data, 4), errno
end

local function parse_ok(data)
    local affected, insert_id, at
    affected, at = lenenc(data, 2)
    if not affected then return nil end
    insert_id, at = lenenc(data, at)
    if not insert_id or at + 3 > #data then return nil end
    -- With its length before it, or bare.
    local message, to = text(data, at + 4)
    if to ~= #data + 1 or message == null then message = sub(data, at + 4) end
    return {
        affected_rows = affected, insert_id = insert_id, server_status = int2(data, at),
        warning_count = int2(data, at + 2), message = message ~= "" and message or nil,
    }
end

-- The connection cannot go on from here.
local function broken(self, err, errno, sqlstate)
    self.state = "closed"
    self.sock:close()
    return nil, err, errno, sqlstate
end

-- Authentication ----------------------------------------------------------------------------------------------------

local function sha256(s)
    return crypto.digest("sha256", s)
end

-- What proves the password to a plugin, by the name of the plugin.
local proofs = {}

function proofs.mysql_native_password(password, nonce)
    if password == "" then return "" end
    local once = sha1(password)
    return bytes_xor(once, sha1(sub(nonce, 1, 20) .. sha1(once)))
end

function proofs.caching_sha2_password(password, nonce)
    if password == "" then return "" end
    local once = sha256(password)
    return bytes_xor(once, sha256(sha256(once) .. sub(nonce, 1, 20)))
end

function proofs.sha256_password(password, _, secure)
    if password == "" then return "\0" end
    -- Where others can listen, it is asked for the key first.
    return secure and password .. "\0" or "\1"
end

function proofs.client_ed25519(password, nonce)
    if password == "" then return "" end
    return ed25519.sign(password, nonce)
end

-- Bytes of the nonce that a plugin switches to, without the zero that may follow.
local function nonce_size(plugin)
    return plugin == "client_ed25519" and 32 or 20
end

-- Answers the data that a plugin sends beside: true to go on; nil and why not.
local function more_data(self, data, auth)
    local plugin = auth.plugin
    if plugin == "caching_sha2_password" and #data == 2 then
        local what = byte(data, 2)
        if what == 3 then return true end
        if what ~= 4 then return nil, "unexpected data of caching_sha2_password" end
        return send_packet(self, auth.secure and auth.password .. "\0" or "\2")
    end
    if auth.secure or (plugin ~= "caching_sha2_password" and plugin ~= "sha256_password") then
        return nil, "unexpected data of " .. plugin
    end
    local key, err = rsa:new({ public_key = sub(data, 2), padding = rsa.PADDING.RSA_PKCS1_OAEP_PADDING })
    if not key then return nil, "failed to encrypt the password: " .. err end
    local sealed
    sealed, err = key:encrypt(bytes_xor(auth.password .. "\0", auth.nonce))
    if not sealed then return nil, "failed to encrypt the password: " .. err end
    return send_packet(self, sealed)
end

local function switch_plugin(self, data, auth)
    if #data == 1 then return nil, "old pre-4.1 authentication protocol not supported" end
    local plugin, at = zero_text(data, 2)
    if not plugin then return nil, "malformed authentication switch" end
    local proof = proofs[plugin]
    if not proof then return nil, "authentication plugin not supported: " .. sub(plugin, 1, 64) end
    local size = nonce_size(plugin)
    local nonce = sub(data, at, at + size - 1)
    if #nonce < size then return nil, "malformed authentication switch" end
    auth.plugin, auth.nonce = plugin, nonce
    return send_packet(self, proof(auth.password, nonce, auth.secure))
end

-- What the server says until it lets the client in.
local function be_let_in(self, auth)
    for _ = 1, MAX_ROUNDS do
        local data, err = read_packet(self)
        if not data then return nil, err end
        local kind = byte(data)
        local ok
        if kind == 0 then return true end
        if kind == 255 then return parse_error(data) end
        if kind == 254 then
            ok, err = switch_plugin(self, data, auth)
        elseif kind == 1 then
            ok, err = more_data(self, data, auth)
        else
            return nil, "bad packet type: " .. kind
        end
        if not ok then return nil, err end
    end
    return nil, "authentication does not end"
end

-- What the server's first packet says.
local function parse_greeting(data)
    local version, at = zero_text(data, 2)
    -- Thread, begin of the nonce, a zero, capabilities; all that follows is of 4.1.
    if not version or #data < at + 30 then return nil end
    local nonce = sub(data, at + 4, at + 11)
    local flags = int2(data, at + 13) + int2(data, at + 18) * 0x10000
    local more = max(13, (byte(data, at + 20) or 0) - 8)
    nonce = nonce .. sub(data, at + 31, at + 29 + more)
    local plugin = zero_text(data, at + 31 + more)
    if floor(flags / PLUGIN_AUTH) % 2 == 0 then plugin = nil end
    return { version = version, nonce = nonce, flags = flags, plugin = plugin }
end

local function handshake(self, opts)
    local data, err = read_packet(self)
    if not data then return nil, err end
    local kind = byte(data)
    if kind == 255 then return parse_error(data) end
    if kind ~= 10 then return nil, "unsupported protocol version: " .. kind end
    local greeting = parse_greeting(data)
    if not greeting then return nil, "malformed greeting" end
    self.version = greeting.version

    local user, database, password = opts.user or "", opts.database or "", opts.password or ""
    local flags = CAPABILITIES
    if database ~= "" then flags = flags + WITH_DB end
    if greeting.plugin then flags = flags + PLUGIN_AUTH end
    local charset = char(opts.charset and charsets[opts.charset] or 0)
    if opts.ssl then
        if floor(greeting.flags / SSL) % 2 == 0 then return nil, "ssl disabled on server" end
        flags = flags + SSL
        local bytes
        bytes, err = send_packet(self, to_int(flags, 4) .. to_int(self.max_packet_size, 4) .. charset .. rep("\0", 23))
        if not bytes then return nil, "failed to send ssl request: " .. err end
        local ok
        ok, err = self.sock:sslhandshake(false, opts.host, opts.ssl_verify)
        if not ok then return nil, "failed to do ssl handshake: " .. (err or "") end
    end

    local auth = {
        password = password, nonce = greeting.nonce, secure = opts.ssl or opts.path ~= nil,
        plugin = "mysql_native_password",
    }
    -- Another plugin is what the server switches to.
    if proofs[greeting.plugin] and nonce_size(greeting.plugin) == #auth.nonce then auth.plugin = greeting.plugin end
    local proof = proofs[auth.plugin](password, auth.nonce, auth.secure)
    if #proof > 250 then return nil, "password too long" end
    local parts = {
        to_int(flags, 4), to_int(self.max_packet_size, 4), charset, rep("\0", 23), user, "\0", char(#proof), proof,
    }
    if database ~= "" then parts[#parts + 1] = database .. "\0" end
    if greeting.plugin then parts[#parts + 1] = auth.plugin .. "\0" end
    local bytes
    bytes, err = send_packet(self, concat(parts))
    if not bytes then return nil, "failed to send client authentication packet: " .. err end
    return be_let_in(self, auth)
end

-- Connections -------------------------------------------------------------------------------------------------------

-- A connection is only for those who ask for the same.
local function pool_name(opts)
    local name = (opts.user or "") .. ":" .. (opts.database or "") .. ":"
    name = name .. (opts.path or opts.host .. ":" .. tostring(opts.port or 3306))
    if opts.charset then name = name .. ":" .. opts.charset end
    if opts.ssl then name = name .. ":ssl:" .. tostring(opts.ssl_verify or false) end
    return name
end

local function check_options(opts)
    if type(opts) ~= "table" then return nil, "options are needed to connect" end
    for _, name in pairs({ "host", "path", "user", "password", "database", "charset", "pool" }) do
        local value = opts[name]
        if value ~= nil and type(value) ~= "string" then return nil, "bad " .. name .. " option: string expected" end
        if value and find(value, "\0", 1, true) then return nil, "bad " .. name .. " option: a zero byte in it" end
    end
    if not opts.host and not opts.path then return nil, 'neither "host" nor "path" options are specified' end
    if opts.charset and not charsets[opts.charset] then
        return nil, "charset '" .. opts.charset .. "' is not supported"
    end
    return true
end

--- connect{ host, port, path, database, user, password, charset, max_packet_size, ssl, ssl_verify, pool, pool_size,
-- backlog, compact_arrays }: 1, or nil, why not, the server's error number and SQL state if it said so.
function _M.connect(self, opts)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    local ok, err = check_options(opts)
    if not ok then return nil, err end
    self.max_packet_size = min(tonumber(opts.max_packet_size) or MAX_PACKET, MAX_RESULT)
    self.compact = opts.compact_arrays and true or false
    self.state, self.packet_no, self.version = "closed", 0, nil

    local tcp_opts = { pool = opts.pool or pool_name(opts), pool_size = opts.pool_size, backlog = opts.backlog }
    if opts.path then
        ok, err = sock:connect("unix:" .. opts.path, tcp_opts)
    else
        ok, err = sock:connect(opts.host, opts.port or 3306, tcp_opts)
    end
    if not ok then return nil, "failed to connect: " .. tostring(err) end
    local reused = sock:getreusedtimes()
    if not reused or reused == 0 then
        local errno, sqlstate
        ok, err, errno, sqlstate = handshake(self, opts)
        if not ok then return broken(self, err, errno, sqlstate) end
    end
    self.state = "idle"
    return 1
end

--- Puts the connection into its pool for so many milliseconds: 1, or nil and why not.
function _M.set_keepalive(self, ...)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    if self.state == "closed" then return nil, "closed" end
    if self.state ~= "idle" then return nil, "cannot be reused in the current connection state: " .. self.state end
    self.state = "closed"
    return sock:setkeepalive(...)
end

--- How often the connection came from its pool; 0 for a new one.
function _M.get_reused_times(self)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:getreusedtimes()
end

--- Says goodbye and closes the connection: 1, or nil and why not.
function _M.close(self)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    if self.state == "idle" then
        self.packet_no = 0
        send_packet(self, COM_QUIT)
    end
    self.state = "closed"
    return sock:close()
end

--- The server's version, like "5.1.64"; nil before a connection and for one from the pool.
function _M.server_ver(self)
    return self.version
end

--- Whether rows are arrays rather than hashes.
function _M.set_compact_arrays(self, value)
    self.compact = value and true or false
end

-- Queries -----------------------------------------------------------------------------------------------------------

--- Sends a query; its results are for read_result. The bytes sent, or nil and why not.
function _M.send_query(self, query)
    if not self.sock then return nil, "not initialized" end
    if self.state == "closed" then return nil, "closed" end
    if self.state ~= "idle" then return nil, "cannot send query in the current context: " .. self.state end
    if type(query) == "table" then query = concat(query) end
    self.packet_no = 0
    local bytes, err = send_packet(self, COM_QUERY .. tostring(query))
    if not bytes then return broken(self, err) end
    self.state = "query sent"
    return bytes
end

-- Types that become Lua numbers. 64 bits do not fit into one: BIGINT stays a string, as in lua-resty-mysql.
local numeric = {}
for _, kind in pairs({ 0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x09, 0x0d, 0xf6 }) do numeric[kind] = true end

-- Name and type of a column; nil when the packet is none.
local function parse_column(data)
    local at, name = 1, nil
    -- Catalog, schema, table, original table, name, original name.
    for i = 1, 6 do
        local value
        value, at = text(data, at)
        if not value or value == null then return nil end
        if i == 5 then name = value end
    end
    -- A length, character set, display length.
    local kind = byte(data, at + 7)
    if not kind then return nil end
    return name, numeric[kind] or false
end

-- The row of a packet; nil when it is none.
local function parse_row(self, data, names, numbers, n)
    local compact, at = self.compact, 1
    local row = compact and new_tab(n, 0) or new_tab(0, n)
    for i = 1, n do
        local value
        value, at = text(data, at)
        if value == nil then return nil end
        if numbers[i] and value ~= null then value = tonumber(value) or value end
        if compact then row[i] = value else row[names[i]] = value end
    end
    return row
end

local function is_eof(data)
    return byte(data) == 254 and #data < 9
end

local function read_columns(self, n)
    local names, numbers = new_tab(n, 0), new_tab(n, 0)
    for i = 1, n do
        local data, err = read_packet(self)
        if not data then return nil, err end
        names[i], numbers[i] = parse_column(data)
        if not names[i] then return nil, "malformed column definition" end
    end
    local data, err = read_packet(self)
    if not data then return nil, err end
    if not is_eof(data) then return nil, "unexpected packet type " .. byte(data) .. " while eof packet is expected" end
    return names, numbers
end

-- Done with a result: "again" when another follows.
local function done(self, status)
    if floor(status / MORE_RESULTS) % 2 == 1 then return "again" end
    self.state = "idle"
end

local function read_rows(self, first, est_nrows)
    local n = lenenc(first, 1)
    if not n or n == null then return broken(self, "unexpected packet type " .. byte(first)) end
    if n > MAX_COLUMNS then return broken(self, "too many columns") end
    local names, numbers = read_columns(self, n)
    if not names then return broken(self, numbers) end
    local rows = new_tab(min(tonumber(est_nrows) or 4, MAX_PREALLOC), 0)
    local count, left, cost = 0, MAX_RESULT, n * FIELD + FIELD
    while true do
        local data, err = read_packet(self)
        if not data then return broken(self, err) end
        if is_eof(data) then return rows, done(self, int2(data, 4)) end
        if byte(data) == 255 then
            self.state = "idle"
            return parse_error(data)
        end
        left = left - #data - cost
        if left < 0 then return broken(self, "result too large") end
        local row = parse_row(self, data, names, numbers, n)
        if not row then return broken(self, "malformed row") end
        count = count + 1
        rows[count] = row
    end
end

--- Reads one result: rows, or { affected_rows, insert_id, server_status, warning_count, message }; with "again" when
-- another follows. nil, text, number and SQL state of an error. `est_nrows` says about how many rows there will be.
function _M.read_result(self, est_nrows)
    if not self.sock then return nil, "not initialized" end
    if self.state == "closed" then return nil, "closed" end
    if self.state ~= "query sent" then return nil, "cannot read result in the current context: " .. self.state end
    local data, err = read_packet(self)
    if not data then return broken(self, err) end
    local kind = byte(data)
    if kind == 255 then
        self.state = "idle"
        return parse_error(data)
    end
    if kind == 251 then return broken(self, "LOCAL INFILE is not supported") end
    if kind ~= 0 then return read_rows(self, data, est_nrows) end
    local result = parse_ok(data)
    if not result then return broken(self, "malformed ok packet") end
    return result, done(self, result.server_status)
end

--- send_query and the first read_result.
function _M.query(self, query, est_nrows)
    local bytes, err = self:send_query(query)
    if not bytes then return nil, "failed to send query: " .. err end
    return self:read_result(est_nrows)
end

return _M
