--- A memcached client over ngx.socket.tcp, with the public interface of lua-resty-memcached (its README, v0.17) and the
-- text protocol of memcached's doc/protocol.txt.
--
-- What the server says is bounded in bytes and lines. After anything that leaves the connection out of step (a timeout,
-- an answer that is none) it is closed: it cannot come back from a pool.

local min = math.min
local ipairs, next, select, setmetatable, tonumber, tostring, type =
    ipairs, next, select, setmetatable, tonumber, tostring, type
local concat, find, match, sub = table.concat, string.find, string.match, string.sub
local new_tab = require("table.new")
local tcp = ngx.socket.tcp

-- Bytes of a line: the longest keys and numbers, and room for an error's text.
local MAX_LINE = 4096
-- Bytes of a key (KEY_MAX_LENGTH of memcached): a longer one is refused there, after which what follows it would be
-- read as commands.
local MAX_KEY = 250
-- Bytes of all values of an answer, or of the answers of a pipeline: a quarter of what a VM may have.
local MAX_ANSWER = 128 * 1024 * 1024
-- What a value or a line costs beside its bytes.
local ELEMENT = 64
-- Tables in a value that is a table.
local MAX_DEPTH = 32
local MAX_PREALLOC = 1024

local _M = { _VERSION = "0.17" }
local mt = { __index = _M }

--- new({ key_transform = { escape, unescape } }?): a client without a connection, or nil and why not.
--
-- Keys are escaped as parts of a URI unless the option says how.
function _M.new(_, opts)
    local sock, err = tcp()
    if not sock then return nil, err end
    local transform = opts and opts.key_transform
    local escape, unescape = ngx.escape_uri, ngx.unescape_uri
    if transform then
        escape, unescape = transform[1], transform[2]
        if type(escape) ~= "function" or type(unescape) ~= "function" then
            return nil, "key_transform needs two functions"
        end
    end
    return setmetatable({ sock = sock, escape_key = escape, unescape_key = unescape, left = 0 }, mt)
end

--- Milliseconds for connecting, each send and each read: 1, or nil and why not.
function _M.set_timeout(self, timeout)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    sock:settimeout(timeout)
    return 1
end

--- Milliseconds for connecting, for each send, for each read: 1, or nil and why not.
function _M.set_timeouts(self, connect_timeout, send_timeout, read_timeout)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    sock:settimeouts(connect_timeout, send_timeout, read_timeout)
    return 1
end

--- connect(host, port, opts?) or connect("unix:/path", opts?), opts as of ngx.socket.tcp: 1, or nil and why not.
function _M.connect(self, ...)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    self.reqs, self.line = nil, nil
    local ok, err = sock:connect(...)
    if not ok then return nil, err end
    self.line, err = sock:receiveuntil("\r\n")
    if not self.line then return nil, err end
    return 1
end

--- sslhandshake(reused_session?, server_name?, ssl_verify?, send_status_req?) on the connection.
function _M.sslhandshake(self, ...)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:sslhandshake(...)
end

--- Puts the connection into its pool for so many milliseconds: 1, or nil and why not.
function _M.set_keepalive(self, ...)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:setkeepalive(...)
end

--- How often the connection came from its pool; 0 for a new one.
function _M.get_reused_times(self)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:getreusedtimes()
end

--- Closes the connection: 1, or nil and why not.
function _M.close(self)
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    return sock:close()
end

-- What is sent ------------------------------------------------------------------------------------------------------

local function text_of(value, depth)
    if type(value) ~= "table" then return tostring(value) end
    if depth > MAX_DEPTH then return nil end
    local parts = {}
    for i, part in ipairs(value) do
        local text = text_of(part, depth + 1)
        if not text then return nil end
        parts[i] = text
    end
    return concat(parts)
end

-- A key as it goes out: nothing in it can end the command early.
local function key_of(self, key)
    local text = self.escape_key(tostring(key))
    if type(text) ~= "string" or text == "" or #text > MAX_KEY or find(text, "[%c%s]") then
        return nil, "invalid key"
    end
    return text
end

-- A number in a command.
local function whole(value, default)
    if value == nil then value = default end
    if type(value) == "number" and value % 1 == 0 then return ("%.0f"):format(value) end
    if type(value) == "string" and find(value, "^-?%d+$") then return value end
    return nil
end

-- What comes back ---------------------------------------------------------------------------------------------------

-- A line without its end; nil and what went wrong.
local function read_line(self)
    local reader = self.line
    local line, err = reader(MAX_LINE)
    if not line then
        if err then return nil, err end
        return ""
    end
    -- At the end of the line this says so, without waiting.
    local more, more_err = reader(1)
    if more_err then return nil, more_err end
    if more then return nil, "line too long" end
    self.left = self.left - #line - ELEMENT
    if self.left < 0 then return nil, "answer too large" end
    return line
end

-- Errors in the server's own words. ERROR alone means that it took the line for no command at all.
local function is_error(line)
    return find(line, "^CLIENT_ERROR") or find(line, "^SERVER_ERROR") or line == "ERROR"
end

local refusals = { NOT_STORED = true, EXISTS = true, NOT_FOUND = true }

-- Whether the server has understood the command and refused it.
local function is_refusal(line)
    return refusals[line] or line ~= "ERROR" and is_error(line)
end

-- Readers give whether the connection is still in step, then what the method returns.

local function expects(word)
    return function(self)
        local line, err = read_line(self)
        if not line then return false, nil, err end
        if line == word then return true, 1 end
        return is_refusal(line), nil, line
    end
end

local stored, deleted, ok_answer, touched = expects("STORED"), expects("DELETED"), expects("OK"), expects("TOUCHED")

local function number_answer(self)
    local line, err = read_line(self)
    if not line then return false, nil, err end
    -- Trailing spaces: what memcached pads a number with that has become shorter.
    local number = match(line, "^(%d+) *$")
    if number then return true, number end
    return is_refusal(line), nil, line
end

local function version_answer(self)
    local line, err = read_line(self)
    if not line then return false, nil, err end
    local version = match(line, "^VERSION (.+)$")
    if version then return true, version end
    return is_refusal(line), nil, line
end

local function lines_answer(self)
    local lines, n = {}, 0
    while true do
        local line, err = read_line(self)
        if not line then return false, nil, err end
        if line == "END" or line == "RESET" then return true, lines end
        if is_error(line) then return true, nil, line end
        n = n + 1
        lines[n] = line
    end
end

-- The value that a VALUE line announces: key, value, flags, unique; nil and what went wrong.
local function read_value(self, line)
    local key, flags, size, unique = match(line, "^VALUE (%S+) (%d+) (%d+) ?(%d*)$")
    if not key then return nil, "bad line: " .. sub(line, 1, 128) end
    size = tonumber(size)
    self.left = self.left - size
    if self.left < 0 then return nil, "answer too large" end
    local sock = self.sock
    local data, err = sock:receive(size)
    if not data then return nil, err end
    local tail
    tail, err = sock:receive(2)
    if not tail then return nil, err end
    if tail ~= "\r\n" then return nil, "value without its end" end
    return key, data, flags, unique ~= "" and unique or nil
end

-- One value and END: in step, value, flags, unique, err.
local function single_answer(self)
    local value, flags, unique
    while true do
        local line, err = read_line(self)
        if not line then return false, nil, nil, nil, err end
        if line == "END" then return true, value, flags, unique end
        if is_error(line) then return true, nil, nil, nil, line end
        if value then return false, nil, nil, nil, "more values than keys" end
        local key
        key, value, flags, unique = read_value(self, line)
        if not key then return false, nil, nil, nil, value end
    end
end

local function get_answer(self)
    local in_step, value, flags, _, err = single_answer(self)
    if err then return in_step, nil, nil, err end
    return in_step, value, flags
end

local function gets_answer(self)
    local in_step, value, flags, unique, err = single_answer(self)
    if err then return in_step, nil, nil, nil, err end
    return in_step, value, flags, unique
end

-- Values by key and END.
local function multi_answer(self)
    local results = {}
    while true do
        local line, err = read_line(self)
        if not line then return false, nil, err end
        if line == "END" then return true, results end
        if is_error(line) then return true, nil, line end
        local key, data, flags, unique = read_value(self, line)
        if not key then return false, nil, data end
        results[self.unescape_key(key)] = { data, flags, unique }
    end
end

local function nothing()
    return true, 1
end

-- Requests ----------------------------------------------------------------------------------------------------------

local function finish(self, in_step, ...)
    if not in_step then self.sock:close() end
    return ...
end

-- Sends a command and reads its answer, or keeps both for the pipeline. `nils` values come before an error.
local function run(self, request, answer, nils)
    local sock = self.sock
    local err
    if not sock then
        err = "not initialized"
    elseif self.reqs then
        local n = #self.reqs + 1
        self.reqs[n], self.answers[n] = request, answer
        return 1
    elseif not self.line then
        err = "closed"
    else
        local bytes, send_err = sock:send(request)
        if bytes then
            self.left = MAX_ANSWER
            return finish(self, answer(self))
        end
        err = send_err
    end
    if nils == 2 then return nil, nil, err end
    if nils == 3 then return nil, nil, nil, err end
    return nil, err
end

local function store(self, command, key, value, exptime, flags, unique)
    local name, err = key_of(self, key)
    if not name then return nil, err end
    if value == nil then return nil, "invalid value" end
    local text = text_of(value, 1)
    if not text then return nil, "value nested too deeply" end
    exptime, flags = whole(exptime, 0), whole(flags, 0)
    if not exptime then return nil, "invalid exptime" end
    if not flags then return nil, "invalid flags" end
    local head = command .. " " .. name .. " " .. flags .. " " .. exptime .. " " .. #text
    if unique then head = head .. " " .. unique end
    return run(self, head .. "\r\n" .. text .. "\r\n", stored)
end

--- set(key, value, exptime?, flags?): 1, or nil and why not. `value` may be nested arrays of strings; `exptime` is in
-- seconds, 0 for ever.
function _M.set(self, key, value, exptime, flags)
    return store(self, "set", key, value, exptime, flags)
end

--- As set, for a key that is not there: else nil, "NOT_STORED".
function _M.add(self, key, value, exptime, flags)
    return store(self, "add", key, value, exptime, flags)
end

--- As set, for a key that is there: else nil, "NOT_STORED".
function _M.replace(self, key, value, exptime, flags)
    return store(self, "replace", key, value, exptime, flags)
end

--- Adds behind the value that is there: else nil, "NOT_STORED".
function _M.append(self, key, value, exptime, flags)
    return store(self, "append", key, value, exptime, flags)
end

--- Adds before the value that is there: else nil, "NOT_STORED".
function _M.prepend(self, key, value, exptime, flags)
    return store(self, "prepend", key, value, exptime, flags)
end

--- cas(key, value, cas_unique, exptime?, flags?): as set, if nobody has changed the value since `gets` gave the
-- number: else nil, "EXISTS" or nil, "NOT_FOUND".
function _M.cas(self, key, value, cas_unique, exptime, flags)
    -- As text: the number has 64 bits.
    local unique = whole(cas_unique)
    if not unique then return nil, "invalid cas_unique" end
    return store(self, "cas", key, value, exptime, flags, unique)
end

local function retrieve(self, command, key, answer, nils)
    if type(key) == "table" then
        local n = #key
        if n == 0 then return {} end
        local parts = new_tab(min(n, MAX_PREALLOC) + 2, 0)
        parts[1] = command
        for i = 1, n do
            local name, err = key_of(self, key[i])
            if not name then return nil, err end
            parts[i + 1] = name
        end
        return run(self, concat(parts, " ") .. "\r\n", multi_answer)
    end
    local name, err = key_of(self, key)
    if not name then
        if nils == 2 then return nil, nil, err end
        return nil, nil, nil, err
    end
    return run(self, command .. " " .. name .. "\r\n", answer, nils)
end

--- get(key): value, flags (a string); three nils when there is none; nil, nil, err.
-- get(keys): { [key] = { value, flags } }, or nil and what went wrong.
function _M.get(self, key)
    return retrieve(self, "get", key, get_answer, 2)
end

--- gets(key): value, flags, cas_unique; nil, nil, nil, err. gets(keys): { [key] = { value, flags, cas_unique } }.
function _M.gets(self, key)
    return retrieve(self, "gets", key, gets_answer, 3)
end

--- delete(key): 1; nil, "NOT_FOUND" when there is none.
function _M.delete(self, key)
    local name, err = key_of(self, key)
    if not name then return nil, err end
    return run(self, "delete " .. name .. "\r\n", deleted)
end

local function count(self, command, key, delta)
    local name, err = key_of(self, key)
    if not name then return nil, err end
    local number = whole(delta)
    if not number then return nil, "invalid delta" end
    return run(self, command .. " " .. name .. " " .. number .. "\r\n", number_answer)
end

--- incr(key, delta): the new value as a string; nil, "NOT_FOUND" or another of the server's errors.
function _M.incr(self, key, delta)
    return count(self, "incr", key, delta)
end

--- decr(key, delta): the new value as a string, never below 0.
function _M.decr(self, key, delta)
    return count(self, "decr", key, delta)
end

--- touch(key, exptime): 1; nil, "NOT_FOUND" when there is none.
function _M.touch(self, key, exptime)
    local name, err = key_of(self, key)
    if not name then return nil, err end
    local seconds = whole(exptime)
    if not seconds then return nil, "invalid exptime" end
    return run(self, "touch " .. name .. " " .. seconds .. "\r\n", touched)
end

--- flush_all(seconds?): drops all entries, now or then. 1, or nil and why not.
function _M.flush_all(self, time)
    local request = "flush_all\r\n"
    if time ~= nil then
        local seconds = whole(time)
        if not seconds then return nil, "invalid time" end
        request = "flush_all " .. seconds .. "\r\n"
    end
    return run(self, request, ok_answer)
end

-- One more word of a command, "" for none; nil for what would be more than a word.
local function word(value)
    if value == nil then return "" end
    value = tostring(value)
    if #value > MAX_KEY or find(value, "%c") then return nil end
    return " " .. value
end

--- stats("items" | "sizes" | …, none for the general ones): the lines as they came, or nil and what went wrong.
function _M.stats(self, args)
    local more = word(args)
    if not more then return nil, "invalid argument" end
    return run(self, "stats" .. more .. "\r\n", lines_answer)
end

--- The server's version, like "1.6.18"; nil and what went wrong.
function _M.version(self)
    return run(self, "version\r\n", version_answer)
end

--- Has the server close the connection: 1, or nil and why not.
function _M.quit(self)
    local ok, err = run(self, "quit\r\n", nothing)
    -- The server says nothing more: there is no telling when it has read this.
    if not ok then return nil, err end
    if not self.reqs then self.sock:close() end
    return 1
end

--- verbosity(level): 1, or nil and why not.
function _M.verbosity(self, level)
    local number = whole(level)
    if not number then return nil, "invalid level" end
    return run(self, "verbosity " .. number .. "\r\n", ok_answer)
end

-- Pipelines ---------------------------------------------------------------------------------------------------------

--- Commands are kept from now on and answer 1; `n` says about how many there will be.
function _M.init_pipeline(self, n)
    n = min(tonumber(n) or 4, MAX_PREALLOC)
    self.reqs, self.answers = new_tab(n, 0), new_tab(n, 0)
end

--- Drops what was kept.
function _M.cancel_pipeline(self)
    self.reqs, self.answers = nil, nil
end

local function collect(in_step, ...)
    local n = select("#", ...)
    local result = { ... }
    -- One that says why there is no value reads as in lua-resty-redis: { false, err }.
    if result[1] == nil and n > 1 and result[n] ~= nil then return in_step, { false, result[n] } end
    if n == 1 then return in_step, result[1] end
    return in_step, result
end

--- Sends what was kept in one go: an array with an entry for each command; or nil and what went wrong.
--
-- An entry is what the command returns by itself: one value as it is, more in an array (an empty one for a `get` that
-- found nothing), an error as { false, err }.
function _M.commit_pipeline(self)
    local reqs, answers = self.reqs, self.answers
    if not reqs or not next(reqs) then
        self.reqs, self.answers = nil, nil
        return nil, "no more cmds"
    end
    self.reqs, self.answers = nil, nil
    local sock = self.sock
    if not sock then return nil, "not initialized" end
    if not self.line then return nil, "closed" end
    local bytes, err = sock:send(concat(reqs))
    if not bytes then return nil, err end
    self.left = MAX_ANSWER
    local n = #reqs
    local results = new_tab(n, 0)
    for i = 1, n do
        local in_step, result = collect(answers[i](self))
        if not in_step then
            sock:close()
            return nil, type(result) == "table" and result[2] or "closed"
        end
        results[i] = result
    end
    return results
end

return _M
