--- `core.dns.client`: records of a name: /etc/hosts, then DNS with config.yaml's servers. Waits where nothing is known.
--
-- `client.new(opts)`, then `client:resolve(name, selector)`. Answers are kept for their TTL, or for `opts.valid` seconds.
local native = require("moongate.native")
local dns = require("resty.dns.resolver")
local lrucache = require("resty.lrucache")
local config_local = require("apisix.core.config_local")
local log = require("apisix.core.log")
local json = require("apisix.core.json")
local ipairs, setmetatable, type = ipairs, setmetatable, type
local floor, max, min, random = math.floor, math.max, math.min, math.random

local _M = {
    --- Selectors of `resolve`: one record, every record.
    RETURN_RANDOM = 1,
    RETURN_ALL = 2,
}
local mt = { __index = _M }

-- Names whose answers one client keeps. A plugin may resolve what clients send.
local MAX_NAMES = 256
-- The TTL of what stands in /etc/hosts, as lua-resty-dns-client gives it: ten years.
local HOSTS_TTL = 10 * 365 * 24 * 60 * 60
-- CNAMEs that are followed, as RFC 1034 leaves to the resolver.
local MAX_ALIASES = 8
-- Lines of /etc/hosts or /etc/resolv.conf that are read.
local MAX_LINES = 65536
local DEFAULT_ORDER = { "last", "A", "AAAA", "CNAME" }
-- Seconds for which a failure is remembered.
local FAILURE_TTL = 1

local function each_line(path, visit)
    local file = io.open(path)
    if not file then
        return
    end
    local count = 0
    for line in file:lines() do
        count = count + 1
        if count > MAX_LINES then
            break
        end
        visit(line:gsub("[#;].*$", ""))
    end
    file:close()
end

local function record(name, address)
    local v6 = address:find(":", 1, true) ~= nil
    return {
        name = name, address = v6 and "[" .. address .. "]" or address, class = dns.CLASS_IN,
        type = v6 and dns.TYPE_AAAA or dns.TYPE_A, ttl = HOSTS_TTL,
    }
end

-- name -> its records, by type: what a hosts file says.
local function read_hosts(path)
    local known = {}
    each_line(path, function(line)
        local address, names = line:match("^%s*(%S+)%s+(.*)$")
        for name in (names or ""):lower():gmatch("%S+") do
            local entry = record(name, address)
            known[name] = known[name] or {}
            known[name][entry.type] = known[name][entry.type] or entry
        end
    end)
    return known
end

local function read_resolv_conf(path)
    local conf = { servers = {}, search = {} }
    each_line(path, function(line)
        local key, rest = line:match("^%s*(%S+)%s+(.-)%s*$")
        if key == "nameserver" then
            conf.servers[#conf.servers + 1] = rest
        elseif key == "search" or key == "domain" then
            conf.search = {}
            for domain in rest:gmatch("%S+") do
                conf.search[#conf.search + 1] = domain
            end
        end
    end)
    return conf
end

--- The servers of /etc/resolv.conf: an array of texts.
function _M.system_servers()
    return read_resolv_conf("/etc/resolv.conf").servers
end

-- "1.2.3.4", "1.2.3.4:53", "[::1]:53" as lua-resty-dns takes them.
local function nameserver(text)
    if type(text) ~= "string" then
        return text
    end
    local host, port = text:match("^%[(.-)%]:?(%d*)$")
    if not host then
        host, port = text:match("^([^:]+):?(%d*)$")
    end
    if not host then
        return text
    end
    return port ~= "" and { host, tonumber(port) } or host
end

-- The types that are asked for, in order, and whether the one that had an answer the last time comes first.
local function types_of(order, ipv6)
    local types, last = {}, false
    for _, name in ipairs(order) do
        local known = dns["TYPE_" .. name]
        last = last or name == "last"
        if known and (known ~= dns.TYPE_AAAA or ipv6) then
            types[#types + 1] = known
        end
    end
    return types, last
end

-- Uploaded functions have no files of their own choice.
local function path_of(given, default)
    return native.purpose ~= "functions" and given or default
end

--- A client. `opts`: `nameservers` (texts with or without a port), `hosts` and `resolvConf` (paths), `order` (of "A",
-- "AAAA", "SRV", "CNAME"; with "last" the type that had an answer the last time comes first), `search` (domains), `enable_ipv6`,
-- `valid` (seconds), `timeout` (ms), `retrans`. What is left out is config.yaml's, or /etc/resolv.conf's.
function _M.new(opts)
    opts = opts or {}
    local apisix = config_local.local_conf().apisix or {}
    local system = read_resolv_conf(path_of(opts.resolvConf, "/etc/resolv.conf"))
    local ipv6 = opts.enable_ipv6
    if ipv6 == nil then
        ipv6 = apisix.enable_ipv6 ~= false
    end
    local given = opts.nameservers or not opts.resolvConf and apisix.dns_resolver
    if not given or #given == 0 then
        given = system.servers
    end
    local servers = {}
    for i, server in ipairs(given) do
        servers[i] = nameserver(server)
    end
    local search = opts.search or apisix.enable_resolv_search_opt ~= false and system.search or {}
    local types, last = types_of(opts.order or DEFAULT_ORDER, ipv6)
    return setmetatable({
        hosts = read_hosts(path_of(opts.hosts, "/etc/hosts")),
        types = types,
        last = last and lrucache.new(MAX_NAMES) or nil,
        search = search,
        valid = opts.valid or apisix.dns_resolver_valid,
        query = { nameservers = servers, retrans = opts.retrans or 5, timeout = opts.timeout or 2000 },
        cache = lrucache.new(MAX_NAMES),
    }, mt)
end

local function from_hosts(self, name)
    local known = self.hosts[name]
    for _, kind in ipairs(known and self.types or {}) do
        if known[kind] then
            return { known[kind] }
        end
    end
end

local function chosen(answers, name, kind)
    local out, alias = {}, nil
    for _, answer in ipairs(answers) do
        if answer.type == kind then
            if kind == dns.TYPE_AAAA then
                answer.address = "[" .. answer.address .. "]"
            end
            out[#out + 1] = answer
        elseif answer.type == dns.TYPE_CNAME and answer.name == name then
            alias = answer.cname
        end
    end
    return out, alias
end

-- The records of that type, aliases followed; nil and the server's words.
local function ask(resolver, name, kind)
    for _ = 1, MAX_ALIASES do
        local answers, err = resolver:query(name, { qtype = kind })
        if not answers then
            return nil, err
        end
        if answers.errcode then
            return nil, answers.errstr
        end
        local records, alias = chosen(answers, name, kind)
        if #records > 0 then
            return records
        end
        if not alias then
            return nil, "empty record received"
        end
        name = alias
    end
    return nil, "too many aliases"
end

-- The name as it is, or under each search domain: those with a dot first as they are (resolv.conf(5), ndots:1).
local function candidates(self, name)
    if name:sub(-1) == "." then
        return { name:sub(1, -2) }
    end
    local out = {}
    for _, domain in ipairs(self.search) do
        out[#out + 1] = name .. "." .. domain
    end
    table.insert(out, name:find(".", 1, true) and 1 or #out + 1, name)
    return out
end

-- The types to ask for, that of the last answer first.
local function types_for(self, name)
    local last = self.last and self.last:get(name)
    if not last then
        return self.types
    end
    local types = { last }
    for _, kind in ipairs(self.types) do
        if kind ~= last then
            types[#types + 1] = kind
        end
    end
    return types
end

local function look_up(self, name)
    local resolver, err = dns:new(self.query)
    if not resolver then
        return nil, err
    end
    local last
    for _, full in ipairs(candidates(self, name)) do
        for _, kind in ipairs(types_for(self, full)) do
            local records, why = ask(resolver, full, kind)
            if records then
                if self.last then
                    self.last:set(full, kind)
                end
                return records
            end
            last = why
        end
    end
    return nil, last or "there is no type of record to ask for"
end

local function seconds_of(self, records)
    if self.valid then
        return self.valid
    end
    local ttl = HOSTS_TTL
    for _, entry in ipairs(records) do
        ttl = min(ttl, entry.ttl or 0)
    end
    return max(ttl, 1)
end

local function records_of(self, name)
    local records = from_hosts(self, name)
    if records then
        return records
    end
    local kept = self.cache:get(name)
    if kept then
        return kept.records, kept.err
    end
    local err
    records, err = look_up(self, name)
    self.cache:set(name, { records = records, err = err }, records and seconds_of(self, records) or FAILURE_TTL)
    return records, err
end

--- Asks the servers now, whatever is kept and /etc/hosts says: an array of the records of the first type that has some, as the server
-- sent them (SRV: `target`, `port`, `weight`, `priority`), and for how many seconds they hold; nil and the reason.
function _M.ask(self, name)
    local records, err = look_up(self, name:lower())
    if not records then
        return nil, "failed to query the DNS server: " .. err
    end
    return records, seconds_of(self, records)
end

--- The record of `name`, `{ name, address, type, class, ttl }` with an IPv6 address in brackets: one of them, or with
-- `RETURN_ALL` an array of them. nil and the reason where there is none.
function _M.resolve(self, name, selector)
    local records, err = records_of(self, name:lower())
    if not records then
        return nil, "failed to query the DNS server: " .. err
    end
    log.info("dns resolve ", name, ", result: ", json.delay_encode(records))
    if selector == _M.RETURN_ALL then
        return records
    end
    return records[floor(random() * #records) + 1]
end

return _M
