--- A DNS resolver over ngx.socket.udp and tcp, with the public interface of lua-resty-dns (its README, v0.23); RFC 1035.
--
-- A datagram that does not answer the question that was asked, with its random number, is not looked at. Names and
-- records are bounded by the message that they stand in; a pointer goes backwards only.

local crypto = require("moongate.native").crypto

local floor, max, min, random = math.floor, math.max, math.min, math.random
local ipairs, setmetatable, tonumber, tostring, type = ipairs, setmetatable, tonumber, tostring, type
local byte, char, concat, find, format, gsub, lower, rep, sub = string.byte, string.char, table.concat, string.find,
    string.format, string.gsub, string.lower, string.rep, string.sub
local now = ngx.now
local tcp, udp = ngx.socket.tcp, ngx.socket.udp

-- Bytes of a datagram: more than a server sends that was not told of room for more than 512.
local MAX_DATAGRAM = 4096
-- Datagrams that are no answers, for each that is waited for.
local MAX_STRAYS = 128
-- RFC 1035, 2.3.4.
local MAX_NAME, MAX_LABEL = 255, 63
-- Pointers in a name: as many as it can have labels.
local MAX_POINTERS = 127
local DEFAULT_RETRANS, DEFAULT_TIMEOUT = 5, 2000
-- Retransmissions that a caller may ask for.
local MAX_RETRANS = 100

local TYPE_A, TYPE_NS, TYPE_CNAME, TYPE_SOA, TYPE_PTR, TYPE_MX = 1, 2, 5, 6, 12, 15
local TYPE_TXT, TYPE_AAAA, TYPE_SRV, TYPE_SPF = 16, 28, 33, 99
local CLASS_IN = 1
local NAME_ERROR = 3

local _M = {
    _VERSION = "0.23",
    TYPE_A = TYPE_A, TYPE_NS = TYPE_NS, TYPE_CNAME = TYPE_CNAME, TYPE_SOA = TYPE_SOA, TYPE_PTR = TYPE_PTR,
    TYPE_MX = TYPE_MX, TYPE_TXT = TYPE_TXT, TYPE_AAAA = TYPE_AAAA, TYPE_SRV = TYPE_SRV, TYPE_SPF = TYPE_SPF,
    CLASS_IN = CLASS_IN, SECTION_AN = 1, SECTION_NS = 2, SECTION_AR = 3,
}
local mt = { __index = _M }

local error_names = {
    "format error", "server failure", "name error", "not implemented", "refused",
}

--- new{ nameservers = { "host" | { "host", port }, … }, retrans = 5, timeout = 2000 (ms), no_recurse, no_random }:
-- a resolver, or nil and why not.
function _M.new(_, opts)
    if type(opts) ~= "table" then return nil, "no options table specified" end
    local given = opts.nameservers
    if type(given) ~= "table" or #given == 0 then return nil, "no nameservers specified" end
    local timeout = tonumber(opts.timeout) or DEFAULT_TIMEOUT
    local servers, socks = {}, {}
    for i, server in ipairs(given) do
        local host, port = server, 53
        if type(server) == "table" then host, port = server[1], server[2] or 53 end
        if type(host) ~= "string" then return nil, "bad nameserver" end
        local sock, err = udp()
        if not sock then return nil, "failed to create udp socket: " .. err end
        local ok
        ok, err = sock:setpeername(host, port)
        if not ok then return nil, "failed to set peer name: " .. err end
        sock:settimeout(timeout)
        servers[i], socks[i] = { host, port }, sock
    end
    return setmetatable({
        servers = servers, socks = socks, timeout = timeout, no_recurse = opts.no_recurse,
        retrans = max(1, min(tonumber(opts.retrans) or DEFAULT_RETRANS, MAX_RETRANS)),
        -- The server that the next query begins with.
        cur = opts.no_random and 1 or random(1, #servers),
    }, mt)
end

--- Closes the sockets; the resolver is of no more use.
function _M.destroy(self)
    for _, sock in ipairs(self.socks or {}) do sock:close() end
    self.socks, self.servers = nil, nil
end

--- Milliseconds for each attempt, at all servers.
function _M.set_timeout(self, timeout)
    if not self.socks then return nil, "not initialized" end
    self.timeout = timeout
    for _, sock in ipairs(self.socks) do sock:settimeout(timeout) end
end

-- Addresses ---------------------------------------------------------------------------------------------------------

local function groups_of(address)
    local groups = {}
    for group in address:gmatch("[^:]+") do groups[#groups + 1] = group end
    return groups
end

--- The longest run of zero groups of an IPv6 address as "::"; an address that has one already, as it is.
function _M.compress_ipv6_addr(address)
    if find(address, "::", 1, true) then return address end
    local groups = groups_of(address)
    local at, best, from = 0, 1, nil
    for i, group in ipairs(groups) do
        if find(group, "^0+$") then
            if at == 0 then from = i end
            at = at + 1
            if at > best then best, groups.from = at, from end
        else
            at = 0
        end
    end
    if not groups.from then return address end
    return concat(groups, ":", 1, groups.from - 1) .. "::" .. concat(groups, ":", groups.from + best)
end

--- "::" of an IPv6 address as the zero groups it stands for; an address without it, as it is.
function _M.expand_ipv6_addr(address)
    local at = find(address, "::", 1, true)
    if not at then return address end
    local before, after = groups_of(sub(address, 1, at - 1)), groups_of(sub(address, at + 2))
    for _ = 1, 8 - #before - #after do before[#before + 1] = "0" end
    for _, group in ipairs(after) do before[#before + 1] = group end
    return concat(before, ":")
end

--- The name that holds the PTR record of an IPv4 or IPv6 address.
function _M.arpa_str(address)
    local a, b, c, d = address:match("^(%d+)%.(%d+)%.(%d+)%.(%d+)$")
    if a then return concat({ d, c, b, a, "in-addr.arpa" }, ".") end
    local digits = {}
    for _, group in ipairs(groups_of(_M.expand_ipv6_addr(address))) do
        digits[#digits + 1] = rep("0", 4 - #group) .. group
    end
    return (gsub(concat(digits):reverse(), ".", "%0.")) .. "ip6.arpa"
end

-- The question ------------------------------------------------------------------------------------------------------

-- A name as it goes out; nil when it cannot be one.
local function encode_name(name)
    if name == "." then return "\0" end
    if sub(name, -1) == "." then name = sub(name, 1, -2) end
    if name == "" or sub(name, 1, 1) == "." or find(name, "..", 1, true) then return nil end
    local parts, n = {}, 0
    for label in name:gmatch("[^.]+") do
        if #label > MAX_LABEL then return nil end
        parts[n + 1], parts[n + 2] = char(#label), label
        n = n + 2
    end
    parts[n + 1] = "\0"
    local encoded = concat(parts)
    if #encoded > MAX_NAME then return nil end
    return encoded
end

local function pair(n)
    return char(floor(n / 0x100) % 0x100, n % 0x100)
end

-- { id, question, message }, or nil and why not.
local function build(self, name, opts)
    local qtype = opts and opts.qtype or TYPE_A
    local encoded = encode_name(tostring(name))
    if not encoded then return nil, "bad name" end
    if type(qtype) ~= "number" or qtype < 0 or qtype > 0xffff then return nil, "bad type" end
    local id = crypto.random(2)
    local question = encoded .. pair(qtype) .. pair(CLASS_IN)
    local flags = self.no_recurse and "\0\0" or "\1\0"
    return { id = id, question = question, message = id .. flags .. "\0\1\0\0\0\0\0\0" .. question }
end

-- The answer --------------------------------------------------------------------------------------------------------

local function int16(data, at)
    local a, b = byte(data, at, at + 1)
    if b then return a * 0x100 + b end
end

local function int32(data, at)
    local a, b, c, d = byte(data, at, at + 3)
    if d then return ((a * 0x100 + b) * 0x100 + c) * 0x100 + d end
end

-- The name at `at`, and where it ends; nil and why not. Dots in labels are escaped: no name reads as another.
local function read_name(data, at)
    local labels, n, size, pointers, behind = {}, 0, 1, 0, nil
    while true do
        local length = byte(data, at)
        if not length then return nil, "truncated" end
        if length == 0 then return concat(labels, "."), behind or at + 1 end
        if length >= 0xc0 then
            local low = byte(data, at + 1)
            if not low then return nil, "truncated" end
            behind = behind or at + 2
            local to = (length - 0xc0) * 0x100 + low + 1
            pointers = pointers + 1
            if to >= at or pointers > MAX_POINTERS then return nil, "bad name pointer" end
            at = to
        elseif length > MAX_LABEL then
            return nil, "bad label"
        else
            size = size + length + 1
            if size > MAX_NAME then return nil, "name too long" end
            local label = sub(data, at + 1, at + length)
            if #label < length then return nil, "truncated" end
            n = n + 1
            labels[n] = find(label, "[.\\]") and gsub(label, "[.\\]", "\\%0") or label
            at = at + 1 + length
        end
    end
end

-- What fills in a record of a type from the data between `at` and `to`: true, or nil and why not.
local readers = {}

local function name_reader(field, what)
    return function(record, data, at, to)
        local name, behind = read_name(data, at)
        if not name then return nil, behind end
        if behind ~= to + 1 then return nil, "bad " .. what .. " record length" end
        record[field] = name
        return true
    end
end

readers[TYPE_CNAME] = name_reader("cname", "cname")
readers[TYPE_NS] = name_reader("nsdname", "nsdname")
readers[TYPE_PTR] = name_reader("ptrdname", "ptrdname")

readers[TYPE_A] = function(record, data, at, to)
    if to - at ~= 3 then return nil, "bad A record value length: " .. (to - at + 1) end
    record.address = format("%d.%d.%d.%d", byte(data, at, to))
    return true
end

readers[TYPE_AAAA] = function(record, data, at, to)
    if to - at ~= 15 then return nil, "bad AAAA record value length: " .. (to - at + 1) end
    local groups = {}
    for i = 0, 7 do groups[i + 1] = format("%x", int16(data, at + 2 * i)) end
    record.address = concat(groups, ":")
    return true
end

local read_exchange = name_reader("exchange", "MX")
readers[TYPE_MX] = function(record, data, at, to)
    if to - at < 2 then return nil, "bad MX record value length: " .. (to - at + 1) end
    record.preference = int16(data, at)
    return read_exchange(record, data, at + 2, to)
end

local read_target = name_reader("target", "SRV")
readers[TYPE_SRV] = function(record, data, at, to)
    if to - at < 6 then return nil, "bad SRV record value length: " .. (to - at + 1) end
    record.priority, record.weight, record.port = int16(data, at), int16(data, at + 2), int16(data, at + 4)
    return read_target(record, data, at + 6, to)
end

local function text_reader(field)
    return function(record, data, at, to)
        local texts, n = {}, 0
        while at <= to do
            local size = byte(data, at)
            if at + size > to then return nil, "bad " .. field:upper() .. " record value length" end
            n = n + 1
            texts[n] = sub(data, at + 1, at + size)
            at = at + 1 + size
        end
        if n == 0 then return nil, "bad " .. field:upper() .. " record value length" end
        record[field] = n == 1 and texts[1] or texts
        return true
    end
end

readers[TYPE_TXT], readers[TYPE_SPF] = text_reader("txt"), text_reader("spf")

readers[TYPE_SOA] = function(record, data, at, to)
    local name, behind = read_name(data, at)
    if not name then return nil, behind end
    record.mname = name
    name, behind = read_name(data, behind)
    if not name then return nil, behind end
    record.rname = name
    if behind + 19 ~= to then return nil, "bad SOA record length" end
    for i, field in ipairs({ "serial", "refresh", "retry", "expire", "minimum" }) do
        record[field] = int32(data, behind + 4 * (i - 1))
    end
    return true
end

-- Reads `count` records from `at` on into `into`, if there is one: where they end; nil and why not.
local function read_section(data, at, count, section, into)
    for _ = 1, count do
        local name, behind = read_name(data, at)
        if not name then return nil, behind end
        local kind, class = int16(data, behind), int16(data, behind + 2)
        local ttl, size = int32(data, behind + 4), int16(data, behind + 8)
        local from = behind + 10
        if not size or from + size - 1 > #data then return nil, "truncated" end
        at = from + size
        if into then
            local record = { name = name, type = kind, class = class, ttl = ttl, section = section }
            local reader = readers[kind]
            if reader then
                local ok, err = reader(record, data, from, at - 1)
                if not ok then return nil, err end
            else
                record.rdata = sub(data, from, at - 1)
            end
            into[#into + 1] = record
        end
    end
    return at
end

-- Answers; nil and why not; nil, why not and true for what answers something else.
local function parse(data, query, opts)
    if #data < 12 then return nil, "truncated", true end
    if sub(data, 1, 2) ~= query.id then return nil, "id mismatch", true end
    local high, low = byte(data, 3, 4)
    if high < 0x80 then return nil, "bad QR flag in the DNS response", true end
    local code = low % 0x10
    local questions = int16(data, 5)
    local at = 13
    if questions == 1 then
        local question, asked = sub(data, at, at + #query.question - 1), query.question
        -- Names are the same in any case; type and class follow.
        if lower(sub(question, 1, -5)) ~= lower(sub(asked, 1, -5)) or sub(question, -4) ~= sub(asked, -4) then
            return nil, "question mismatch", true
        end
        at = at + #asked
    elseif questions ~= 0 or code == 0 then
        return nil, "bad number of questions in the DNS response: " .. questions
    end
    if floor(high / 2) % 2 == 1 then return nil, "truncated" end

    local answers = {}
    if code ~= 0 then answers.errcode, answers.errstr = code, error_names[code] or "unknown" end
    local err
    at, err = read_section(data, at, int16(data, 7), _M.SECTION_AN, answers)
    if not at then return nil, err end
    local authority, additional = opts and opts.authority_section, opts and opts.additional_section
    if authority or additional then
        at, err = read_section(data, at, int16(data, 9), _M.SECTION_NS, authority and answers)
        if not at then return nil, err end
    end
    if additional then
        at, err = read_section(data, at, int16(data, 11), _M.SECTION_AR, answers)
        if not at then return nil, err end
    end
    return answers
end

-- Asking ------------------------------------------------------------------------------------------------------------

local function pick_server(self)
    local cur = self.cur
    self.cur = cur < #self.servers and cur + 1 or 1
    return cur
end

local function tcp_exchange(self, server, query, opts)
    local sock, err = tcp()
    if not sock then return nil, "failed to create tcp socket: " .. err end
    sock:settimeout(self.timeout)
    local at = server[1] .. ":" .. server[2]
    local ok
    ok, err = sock:connect(server[1], server[2])
    if not ok then return nil, "failed to connect to TCP server " .. at .. ": " .. err end
    local bytes
    bytes, err = sock:send(pair(#query.message) .. query.message)
    if not bytes then
        sock:close()
        return nil, "failed to send query to TCP server " .. at .. ": " .. err
    end
    local head, data
    head, err = sock:receive(2)
    if not head then
        sock:close()
        return nil, "failed to receive the reply length field from TCP server " .. at .. ": " .. err
    end
    data, err = sock:receive(int16(head, 1))
    sock:close()
    if not data then
        return nil, "failed to receive the reply message body from TCP server " .. at .. ": " .. err
    end
    local answers
    answers, err = parse(data, query, opts)
    return answers, err
end

-- The answer to `query`, of all that comes from this server within the timeout.
local function udp_exchange(self, sock, server, query, opts)
    local at = server[1] .. ":" .. server[2]
    local ok, err = sock:send(query.message)
    if not ok then return nil, "failed to send request to UDP server " .. at .. ": " .. err end
    local deadline = now() + self.timeout / 1000
    local answers, stray, data
    for _ = 1, MAX_STRAYS do
        sock:settimeout(max(1, (deadline - now()) * 1000))
        data, err = sock:receive(MAX_DATAGRAM)
        if not data then
            return nil, "failed to receive reply from UDP server " .. at .. ": " .. err
        end
        answers, err, stray = parse(data, query, opts)
        if not stray then break end
    end
    if answers or err ~= "truncated" or stray then return answers, err end
    return tcp_exchange(self, server, query, opts)
end

local function ask(self, name, opts, tries, over_tcp)
    if not self.socks then return nil, "not initialized" end
    local query, err = build(self, name, opts)
    if not query then return nil, err, tries end
    local servers = self.servers
    local last
    for i = 1, self.retrans do
        local cur = pick_server(self)
        local answers
        if over_tcp then
            answers, err = tcp_exchange(self, servers[cur], query, opts)
        else
            answers, err = udp_exchange(self, self.socks[cur], servers[cur], query, opts)
        end
        if answers then
            local code = answers.errcode
            -- A server that cannot say leaves it to the next one.
            if not code or code == NAME_ERROR or i >= #servers then return answers, nil, tries end
            err = "server returned error code: " .. code .. ": " .. answers.errstr
        end
        last = answers or last
        if tries then tries[#tries + 1] = err end
    end
    if last then return last, nil, tries end
    return nil, err, tries
end

--- query(name, { qtype = TYPE_A, authority_section, additional_section }?, tries?): an array of records, with errcode and
-- errstr when the server said so; nil and what went wrong. Over TCP where an answer does not fit into a datagram.
-- A `tries` table gets what went wrong at each attempt, and is returned third.
function _M.query(self, name, opts, tries)
    return ask(self, name, opts, tries, false)
end

--- As query, over TCP from the start.
function _M.tcp_query(self, name, opts, tries)
    return ask(self, name, opts, tries, true)
end

--- Asks for the PTR records of an IPv4 or IPv6 address.
function _M.reverse_query(self, address)
    return self:query(_M.arpa_str(address), { qtype = TYPE_PTR })
end

return _M
