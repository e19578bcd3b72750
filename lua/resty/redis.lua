--- A redis client over ngx.socket.tcp, with the public interface of lua-resty-redis (its README, v0.33; RESP2).
--
-- A reply is bounded in bytes, in the length of its lines and in how deep it nests. After anything that leaves the
-- connection out of step (a timeout, a reply that is none) it is closed: it cannot come back from a pool.

local min, floor = math.min, math.floor
local pairs, rawget, rawset, select, setmetatable, tonumber, tostring, type =
    pairs, rawget, rawset, select, setmetatable, tonumber, tostring, type
local concat, byte, sub, find = table.concat, string.byte, string.sub, string.find
local new_tab = require("table.new")
local null = ngx.null
local tcp = ngx.socket.tcp

-- Bytes of a line: redis's own bound for one (PROTO_INLINE_MAX_SIZE).
local MAX_LINE = 65536
-- Bytes of a reply, or of all replies of a pipeline: a quarter of what a VM may have.
local MAX_REPLY = 128 * 1024 * 1024
-- What an element costs beside its bytes.
local ELEMENT = 32
-- Arrays in arrays.
local MAX_DEPTH = 32
-- Methods kept for names that are not in `common`: names may come from a request.
local MAX_METHODS = 256
-- Places of a table that are made before there are elements to fill them.
local MAX_PREALLOC = 1024

local _M = { _VERSION = "0.33" }
local mt = { __index = _M }

--- A client without a connection: red, or nil and why not.
function _M.new()
    local sock, err = tcp()
    if not sock then return nil, err end
    -- Every field is there from the start: what is missing would be taken for a command.
    return setmetatable({
        _sock = sock, _line = false, _reqs = false, _names = false, _left = 0, _prefix = false, _channels = 0,
        _shards = 0, _in_transaction = false,
    }, mt)
end

--- Milliseconds for connecting, each send and each read.
function _M.set_timeout(self, timeout)
    local sock = rawget(self, "_sock")
    if not sock then return nil, "not initialized" end
    return sock:settimeout(timeout)
end

--- Milliseconds for connecting, for each send, for each read.
function _M.set_timeouts(self, connect_timeout, send_timeout, read_timeout)
    local sock = rawget(self, "_sock")
    if not sock then return nil, "not initialized" end
    return sock:settimeouts(connect_timeout, send_timeout, read_timeout)
end

local function subscribed(self)
    return self._channels > 0 or self._shards > 0
end

local function reset(self)
    self._channels, self._shards, self._in_transaction, self._prefix = 0, 0, false, false
end

-- Replies -----------------------------------------------------------------------------------------------------------

-- A line without its end; nil, what went wrong, and what had come of it.
local function read_line(reader)
    local line, err, partial = reader(MAX_LINE)
    if not line then
        if err then return nil, err, partial end
        return ""
    end
    -- At the end of the line this says so, without waiting.
    local more, more_err = reader(1)
    if more_err then return nil, more_err, line end
    if more then return nil, "line too long", line end
    return line
end

-- The number behind a reply's first byte; nil when there is none.
local function number_of(line)
    if not find(line, "^[+-]?%d+$", 2) then return nil end
    return tonumber((sub(line, 2)))
end

local read

local function read_bulk(self, line)
    local size = number_of(line)
    if not size then return nil, "bad bulk reply length" end
    if size < 0 then return null end
    self._left = self._left - size
    if self._left < 0 then return nil, "reply too large" end
    local sock = self._sock
    local data, err = sock:receive(size)
    if not data then return nil, err end
    local tail
    tail, err = sock:receive(2)
    if not tail then return nil, err end
    if tail ~= "\r\n" then return nil, "bulk reply without its end" end
    return data
end

local function read_array(self, line, depth)
    local count = number_of(line)
    if not count then return nil, "bad multi-bulk reply length" end
    if count < 0 then return null end
    if depth == MAX_DEPTH then return nil, "reply nested too deeply" end
    if count * ELEMENT > self._left then return nil, "reply too large" end
    local values = new_tab(min(count, MAX_PREALLOC), 0)
    for i = 1, count do
        local value, err = read(self, depth + 1)
        if value == nil then return nil, err end
        if value == false then value = { false, err } end
        values[i] = value
    end
    return values
end

-- One reply: a value; false and the text of an error reply; nil, what went wrong, and what had come of the first line.
function read(self, depth)
    local line, err, partial = read_line(self._line)
    if not line then return nil, err, partial end
    self._left = self._left - #line - ELEMENT
    if self._left < 0 then return nil, "reply too large" end
    local kind = byte(line)
    if kind == 36 then return read_bulk(self, line) end -- $
    if kind == 43 then return sub(line, 2) end -- +
    if kind == 58 then -- :
        local number = number_of(line)
        if not number then return nil, "bad integer reply" end
        return number
    end
    if kind == 42 then return read_array(self, line, depth) end -- *
    if kind == 45 then return false, sub(line, 2) end -- -
    if not kind then return nil, "empty reply" end
    return nil, 'unknown prefix: "' .. sub(line, 1, 1) .. '"'
end

-- What a reply says of the state of the connection. `name` is the command's, nil where nothing was asked.
local function note(self, name, reply)
    if type(reply) == "table" then
        local what, count = reply[1], reply[3]
        if type(count) == "number" then
            if what == "subscribe" or what == "unsubscribe" or what == "psubscribe" or what == "punsubscribe" then
                self._channels = count
            elseif what == "ssubscribe" or what == "sunsubscribe" then
                self._shards = count
            end
        end
    end
    if name == "multi" then
        if reply then self._in_transaction = true end
    elseif name == "exec" or name == "discard" then
        self._in_transaction = false
    elseif name == "reset" and reply then
        reset(self)
    end
end

-- A reply at the top, the connection closed if it is of no more use. While subscribed, nothing to read within the
-- timeout is no failure.
local function read_top(self, name)
    local reply, err, partial = read(self, 0)
    if reply == nil then
        if not (err == "timeout" and partial == "" and subscribed(self)) then self._sock:close() end
        return nil, err
    end
    -- Only these commands and their messages change anything: the others are spared the look.
    if name ~= "" then note(self, name, reply) end
    if err then return reply, err end
    return reply
end

-- Commands ----------------------------------------------------------------------------------------------------------

local function bulk(value)
    if type(value) ~= "string" then value = tostring(value) end
    return "$" .. #value .. "\r\n" .. value .. "\r\n"
end

local function encode(self, head, args, n)
    local prefix = self._prefix
    if prefix then
        self._prefix = false
        head = bulk(prefix .. "." .. head)
    else
        head = bulk(head)
    end
    if n == 0 then return "*1\r\n" .. head end
    if n == 1 then return "*2\r\n" .. head .. bulk(args[1]) end
    local parts = new_tab(n + 2, 0)
    parts[1], parts[2] = "*" .. (n + 1) .. "\r\n", head
    for i = 1, n do parts[i + 2] = bulk(args[i]) end
    return concat(parts)
end

-- Commands after which `note` looks at the reply.
local noted = {}
for _, name in pairs({
    "subscribe", "psubscribe", "ssubscribe", "unsubscribe", "punsubscribe", "sunsubscribe", "multi", "exec",
    "discard", "reset",
}) do
    noted[name] = true
end

local function run(self, name, args, n)
    local sock = self._sock
    if not sock then return nil, "not initialized" end
    local request = encode(self, name, args, n)
    local lower = name:lower()
    local what = noted[lower] and lower or subscribed(self) and lower or ""
    local reqs = self._reqs
    if reqs then
        local i = #reqs + 1
        reqs[i], self._names[i] = request, what
        return
    end
    if not self._line then return nil, "closed" end
    local bytes, err = sock:send(request)
    if not bytes then return nil, err end
    self._left = MAX_REPLY
    return read_top(self, what)
end

local function method(name)
    return function(self, ...)
        return run(self, name, { ... }, select("#", ...))
    end
end

--- hmset(key, field, value, …) or hmset(key, { field = value, … }).
function _M.hmset(self, key, ...)
    local n = select("#", ...)
    local fields = ...
    if n ~= 1 or type(fields) ~= "table" then return run(self, "hmset", { key, ... }, n + 1) end
    local args, count = { key }, 1
    for field, value in pairs(fields) do
        args[count + 1], args[count + 2] = field, value
        count = count + 2
    end
    return run(self, "hmset", args, count)
end

--- hmget(key, field, …) or hmget(key, { field, … }): values in the order of the fields.
function _M.hmget(self, key, ...)
    local n = select("#", ...)
    local fields = ...
    if n ~= 1 or type(fields) ~= "table" then return run(self, "hmget", { key, ... }, n + 1) end
    local args, count = { key }, #fields
    for i = 1, count do args[i + 1] = fields[i] end
    return run(self, "hmget", args, count + 1)
end

--- { k1, v1, k2, v2 } as { k1 = v1, k2 = v2 }.
function _M.array_to_hash(_, array)
    local n = #array
    local hash = new_tab(0, floor(n / 2))
    for i = 1, n, 2 do hash[array[i]] = array[i + 1] end
    return hash
end

--- The next message of what is subscribed to. nil, "timeout" leaves the connection as it is when nothing had come.
function _M.read_reply(self)
    if not self._sock then return nil, "not initialized" end
    if not subscribed(self) then return nil, "not subscribed" end
    self._left = MAX_REPLY
    return read_top(self)
end

--- Makes methods of these names: a hash of them. Any name works without it.
function _M.add_commands(...)
    local added = {}
    for i = 1, select("#", ...) do
        local name = select(i, ...)
        _M[name] = method(name)
        added[name] = _M[name]
    end
    return added
end

--- register_module_prefix("bf"): red:bf():add(…) is the command bf.add.
function _M.register_module_prefix(prefix)
    _M[prefix] = function(self)
        self._prefix = prefix
        return self
    end
end

_M.add_commands("get", "set", "setex", "psetex", "setnx", "mget", "mset", "del", "unlink", "exists", "incr", "incrby",
    "decr", "decrby", "append", "strlen", "expire", "pexpire", "ttl", "pttl", "hget", "hset", "hgetall", "hdel",
    "hexists", "hincrby", "hlen", "lindex", "llen", "lpop", "lpush", "lrange", "ltrim", "rpop", "rpush", "blpop",
    "brpop", "sadd", "sismember", "smembers", "srem", "scard", "zadd", "zcard", "zincrby", "zrange", "zrangebyscore",
    "zrem", "zremrangebyscore", "zscore", "eval", "evalsha", "script", "multi", "exec", "discard", "watch", "unwatch",
    "auth", "select", "ping", "publish", "subscribe", "unsubscribe", "psubscribe", "punsubscribe", "scan", "keys",
    "type", "info", "config", "client", "flushall", "flushdb", "xadd", "xread")

local methods = 0

-- Any other name is a command, too.
setmetatable(_M, {
    __index = function(class, name)
        if type(name) ~= "string" or byte(name) == 95 then return nil end -- _
        local made = method(name)
        if methods < MAX_METHODS then
            methods = methods + 1
            rawset(class, name, made)
        end
        return made
    end,
})

-- Connections -------------------------------------------------------------------------------------------------------

-- Connections that have said who they are, or whose peer was looked at, are only for those who ask for the same.
local function pool_name(host, port, opts)
    local name = port and host .. ":" .. port or host
    local password = opts.password
    if opts.username and opts.username ~= "" and password and password ~= "" then
        name = name .. "/" .. opts.username
    end
    if opts.db then name = name .. "/" .. tostring(opts.db) end
    if opts.ssl then
        name = name .. "/ssl:" .. tostring(opts.ssl_verify or false) .. ":" .. tostring(opts.server_name or "")
    end
    return name
end

local function greet(self, opts)
    local password, db = opts.password, opts.db
    if password and password ~= "" then
        local ok, err
        if opts.username and opts.username ~= "" then
            ok, err = self:auth(opts.username, password)
        else
            ok, err = self:auth(password)
        end
        if not ok then return nil, "failed to authenticate: " .. tostring(err) end
    end
    if db then
        local ok, err = self:select(db)
        if not ok then return nil, "failed to select database " .. tostring(db) .. ": " .. tostring(err) end
    end
    return true
end

local function prepare(self, sock, opts)
    if opts.tcp_keepalive then
        local ok, err = sock:setoption("keepalive", true)
        if not ok then return nil, "failed to enable tcp keepalive: " .. tostring(err) end
    end
    if opts.ssl then
        local ok, err = sock:sslhandshake(false, opts.server_name, opts.ssl_verify)
        if not ok then return nil, "failed to do ssl handshake: " .. tostring(err) end
    end
    local times, err = sock:getreusedtimes()
    if not times then return nil, err end
    if times > 0 then return true end
    return greet(self, opts)
end

--- connect(host, port, opts?) or connect("unix:/path", opts?): 1, or nil and why not.
--
-- opts: ssl, ssl_verify, server_name; pool, pool_size, backlog; password, username, db for new connections;
-- tcp_keepalive.
function _M.connect(self, host, port, opts)
    local sock = rawget(self, "_sock")
    if not sock then return nil, "not initialized" end
    if type(host) ~= "string" then return nil, "a host is needed to connect" end
    local is_unix = sub(host, 1, 5) == "unix:"
    if is_unix and type(port) == "table" then port, opts = nil, port end
    if is_unix then port = nil end
    if type(opts) ~= "table" then opts = {} end
    reset(self)
    self._reqs, self._names, self._line = false, false, false

    local tcp_opts = {
        pool = opts.pool or pool_name(host, port, opts), pool_size = opts.pool_size, backlog = opts.backlog,
    }
    local ok, err
    if is_unix then
        ok, err = sock:connect(host, tcp_opts)
    else
        ok, err = sock:connect(host, port, tcp_opts)
    end
    if not ok then return nil, err end
    self._line, err = sock:receiveuntil("\r\n")
    if not self._line then return nil, err end
    ok, err = prepare(self, sock, opts)
    if not ok then
        sock:close()
        return nil, err
    end
    return 1
end

--- Puts the connection into its pool for so many milliseconds: 1, or nil and why not.
function _M.set_keepalive(self, ...)
    local sock = rawget(self, "_sock")
    if not sock then return nil, "not initialized" end
    if subscribed(self) then return nil, "subscribed state" end
    if self._in_transaction then return nil, "in transaction" end
    return sock:setkeepalive(...)
end

--- How often the connection came from its pool; 0 for a new one.
function _M.get_reused_times(self)
    local sock = rawget(self, "_sock")
    if not sock then return nil, "not initialized" end
    return sock:getreusedtimes()
end

--- Closes the connection: 1, or nil and why not.
function _M.close(self)
    local sock = rawget(self, "_sock")
    if not sock then return nil, "not initialized" end
    reset(self)
    return sock:close()
end

-- Pipelines ---------------------------------------------------------------------------------------------------------

--- Commands are kept from now on; `n` says about how many there will be. What was kept before is dropped.
function _M.init_pipeline(self, n)
    n = min(tonumber(n) or 4, MAX_PREALLOC)
    self._reqs, self._names = new_tab(n, 0), new_tab(n, 0)
end

--- Drops what was kept.
function _M.cancel_pipeline(self)
    self._reqs, self._names = false, false
end

--- Sends what was kept in one go: an array of replies, error replies as { false, err }; or nil and what went wrong.
function _M.commit_pipeline(self)
    local reqs, names = self._reqs, self._names
    if not reqs then return nil, "no pipeline" end
    self._reqs, self._names = false, false
    local sock = self._sock
    if not sock then return nil, "not initialized" end
    local n = #reqs
    if n == 0 then return {} end
    if not self._line then return nil, "closed" end
    local bytes, err = sock:send(concat(reqs))
    if not bytes then return nil, err end
    self._left = MAX_REPLY
    local replies = new_tab(n, 0)
    for i = 1, n do
        local reply, reply_err = read_top(self, names[i])
        if reply == nil then
            -- The replies that are still to come are nobody's.
            sock:close()
            return nil, reply_err
        end
        if reply == false then reply = { false, reply_err } end
        replies[i] = reply
    end
    return replies
end

return _M
