--- `net.url`: takes addresses apart and puts them together (the README of golgote/neturl; RFC 3986).
--
-- An address has scheme, authority, userinfo, user, password, host, port, path, query (a table), fragment.

local concat, sort = table.concat, table.sort
local getmetatable, ipairs, pairs, setmetatable, tonumber, tostring, type =
    getmetatable, ipairs, pairs, setmetatable, tonumber, tostring, type

local _M = { version = "1.2.0" }
local mt = { __index = _M }

--- `separator` of arguments, `cumulative_parameters` (an argument that is there twice is a list), `legal_in_path` and
-- `legal_in_query` (characters that stay), `query_plus_is_space`.
_M.options = {
    separator = "&", cumulative_parameters = false, query_plus_is_space = true,
    legal_in_path = {}, legal_in_query = {},
}
for c in (":-_.!~*'()@&=+$,;"):gmatch(".") do _M.options.legal_in_path[c] = true end
for c in (":-_.,!~*';()@$"):gmatch(".") do _M.options.legal_in_query[c] = true end

local legal_in_userinfo = {}
for c in ("-_.!~*'()&=+$,;"):gmatch(".") do legal_in_userinfo[c] = true end

--- Ports that go without saying.
_M.services = { acap = 674, cap = 1026, dict = 2628, ftp = 21, gopher = 70, http = 80, https = 443, iax = 4569, icap = 1344,
    imap = 143, ipp = 631, ldap = 389, mtqp = 1038, mupdate = 3905, news = 2009, nfs = 2049, nntp = 119, rtsp = 554, sip = 5060,
    snmp = 161, telnet = 23, tftp = 69, vemmi = 575, afs = 1483, jms = 5673, rsync = 873, prospero = 191, videotex = 516,
    ws = 80, wss = 443 }

local function decode(text, plus)
    if plus then text = text:gsub("+", " ") end
    return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end

local function encode(text, legal)
    return (text:gsub("([^%w])", function(c)
        return legal[c] and c or ("%%%02X"):format(c:byte())
    end))
end

local function encode_path(path)
    return (path:gsub("[^/]+", function(segment) return encode(segment, _M.options.legal_in_path) end))
end

-- Names of a table in a steady order: numbers first.
local function names_of(t)
    local names = {}
    for name in pairs(t) do names[#names + 1] = name end
    sort(names, function(a, b)
        if type(a) == type(b) and type(a) == "number" then return a < b end
        return tostring(a) < tostring(b)
    end)
    return names
end

-- Nesting of tables in a query that is followed.
local MAX_DEPTH = 20

--- The query string of a table; tables inside become `name[key]`.
function _M.buildQuery(query, sep, key, depth)
    depth = depth or 0
    if depth > MAX_DEPTH then return "" end
    local legal, parts = _M.options.legal_in_query, {}
    for _, name in ipairs(names_of(query)) do
        local value = query[name]
        name = encode(tostring(name), legal)
        if key then
            name = (_M.options.cumulative_parameters and tonumber(name)) and key or key .. "[" .. name .. "]"
        end
        if type(value) == "table" then
            local inner = _M.buildQuery(value, sep, name, depth + 1)
            if inner ~= "" then parts[#parts + 1] = inner end
        else
            local text = encode(tostring(value), legal)
            parts[#parts + 1] = text ~= "" and name .. "=" .. text or name
        end
    end
    return concat(parts, sep or _M.options.separator)
end

local function put(query, name, keys, value)
    if #keys == 0 then
        local old = query[name]
        if old ~= nil and _M.options.cumulative_parameters then
            if type(old) ~= "table" then query[name] = { old, value } else old[#old + 1] = value end
        else
            query[name] = value
        end
        return
    end
    local at = query[name]
    if type(at) ~= "table" then
        at = {}
        query[name] = at
    end
    for i, key in ipairs(keys) do
        if key == "" then key = #at + 1 else key = tonumber(key) or key end
        if i == #keys then
            at[key] = value
        else
            if type(at[key]) ~= "table" then at[key] = {} end
            at = at[key]
        end
    end
end

--- The table of a query string: `a=1&b[x]=2&c[]=3`.
function _M.parseQuery(text, sep)
    local query, plus = {}, _M.options.query_plus_is_space
    for pair in text:gmatch("[^" .. (sep or "&;") .. "]+") do
        local name, value = pair:match("^([^=]*)=?(.*)$")
        name = decode(name, plus)
        local keys = {}
        local base = name:gsub("%[([^%]]*)%]", function(key)
            if #keys < MAX_DEPTH then keys[#keys + 1] = key end
            return ""
        end)
        if base == "" then base = "0" end
        put(query, base, keys, decode(value, plus))
    end
    return setmetatable(query, { __tostring = function(q) return _M.buildQuery(q) end })
end

--- Sets the query, of a table or text. @return the query
function _M:setQuery(query)
    if type(query) == "table" then query = _M.buildQuery(query) end
    self.query = _M.parseQuery(query)
    return query
end

--- Sets authority, userinfo, user, password, host, port of a text. @return text
function _M:setAuthority(authority)
    self.authority = authority
    self.port, self.host, self.userinfo, self.user, self.password = nil, nil, nil, nil, nil
    local rest = authority:gsub("^([^@]*)@", function(info)
        self.userinfo = info
        return ""
    end)
    rest = rest:gsub(":(%d+)$", function(port)
        self.port = tonumber(port)
        return ""
    end)
    local address = rest:match("^%[(.+)%]$")
    if rest ~= "" then self.host = address and "[" .. address:lower() .. "]" or rest:lower() end
    if self.userinfo then
        self.user, self.password = self.userinfo:match("^([^:]*):?(.*)$")
        self.user = decode(self.user)
        self.password = self.userinfo:find(":", 1, true) and decode(self.password) or nil
    end
    return authority
end

--- Takes an address apart. @param text string @return address
function _M.parse(text)
    local url = setmetatable({ query = _M.parseQuery("") }, mt)
    text = tostring(text or "")
    text = text:gsub("#(.*)$", function(v)
        url.fragment = v
        return ""
    end)
    text = text:gsub("^([%w][%w%+%-%.]*)%:", function(v)
        url.scheme = v:lower()
        return ""
    end)
    text = text:gsub("%?(.*)", function(v)
        url:setQuery(v)
        return ""
    end)
    text = text:gsub("^//([^/]*)", function(v)
        url:setAuthority(v)
        return ""
    end)
    url.path = text:gsub("([^/]+)", function(segment)
        return encode(decode(segment), _M.options.legal_in_path)
    end)
    return url
end

-- RFC 3986, 5.2.4.
local function without_dots(path)
    local out, absolute = {}, path:sub(1, 1) == "/"
    local last
    for segment in path:gmatch("[^/]*") do
        last = segment
        if segment == ".." then
            if #out > 0 then out[#out] = nil end
        elseif segment ~= "." and segment ~= "" then
            out[#out + 1] = segment
        end
    end
    local text = (absolute and "/" or "") .. concat(out, "/")
    local ends = path:sub(-1) == "/" or last == "." or path:match("/%.%.?$")
    if ends and text:sub(-1) ~= "/" and text ~= "" then text = text .. "/" end
    return text
end

_M.removeDotSegments = without_dots

--- Puts the address together. @return string
function _M:build()
    local url = self.path or ""
    if url ~= "" then
        url = url:gsub("([^/]+)", function(segment) return encode(decode(segment), _M.options.legal_in_path) end)
    end
    local query = self.query and tostring(type(self.query) == "table" and _M.buildQuery(self.query) or self.query) or ""
    if query ~= "" then url = url .. "?" .. query end
    if self.host then
        local authority = self.host
        if self.port and self.services[self.scheme] ~= self.port then authority = authority .. ":" .. self.port end
        if self.user and self.user ~= "" then
            local info = encode(self.user, legal_in_userinfo)
            if self.password then info = info .. ":" .. encode(self.password, legal_in_userinfo) end
            authority = info .. "@" .. authority
        end
        if url ~= "" and url:sub(1, 1) ~= "/" and url:sub(1, 1) ~= "?" then url = "/" .. url end
        url = "//" .. authority .. url
    end
    if self.scheme then url = self.scheme .. ":" .. url end
    if self.fragment then url = url .. "#" .. self.fragment end
    return url
end
mt.__tostring = _M.build

-- A copy with the methods of an address.
local function copy(url)
    return _M.parse(tostring(url))
end

--- The address with its dots resolved, its default port left out, its arguments in order. @return the address itself
function _M:normalize()
    if type(self) == "string" then self = _M.parse(self) end
    if self.path then
        local path = without_dots(self.path:gsub("//+", "/"))
        if path == "" and self.host then path = "/" end
        self.path = path
    end
    if self.fragment == "" then self.fragment = nil end
    return self
end

--- What a reference means, seen from this address (RFC 3986, 5.2). @param other string or address @return address
function _M:resolve(other)
    if type(self) == "string" then self = _M.parse(self) end
    other = type(other) == "string" and _M.parse(other) or copy(other)
    if other.scheme then return other:normalize() end
    other.scheme = self.scheme
    if not other.authority or other.authority == "" then
        for _, name in ipairs({ "authority", "userinfo", "user", "password", "host", "port" }) do other[name] = self[name] end
        if not other.path or other.path == "" then
            other.path = self.path
            if not next(other.query) then other.query = self.query end
        elseif other.path:sub(1, 1) ~= "/" then
            local base = (self.path or ""):gsub("[^/]*$", "")
            other.path = (base == "" and "/" or base) .. other.path
        end
    end
    return other:normalize()
end

--- Adds a segment to the path. @return the address itself
function _M:addSegment(segment)
    if type(segment) == "string" then
        self.path = (self.path or ""):gsub("/$", "") .. "/" .. encode_path(segment:gsub("^/", ""))
    end
    return self
end

--- address / "segment"
function mt.__div(url, segment)
    return copy(url):addSegment(segment)
end

--- address .. "text" and back
function mt.__concat(a, b)
    return tostring(a) .. tostring(b)
end

function mt.__eq(a, b)
    return getmetatable(a) == getmetatable(b) and copy(a):normalize():build() == copy(b):normalize():build()
end

return _M
