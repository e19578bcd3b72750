--- `apisix.discovery.dns`: nodes from DNS (discovery/dns.md): every address of a name, or what its SRV records say. `service_name` is
-- the name, with the port behind it where the records' own is not meant.
--
-- Answers are kept for their TTL. When that is over one request asks again, and the others go on with what is known.
local client = require("apisix.core.dns.client")
local config_local = require("apisix.core.config_local")
local utils = require("apisix.core.utils")
local lrucache = require("resty.lrucache")
local ipairs, max, floor, pcall, tostring = ipairs, math.max, math.floor, pcall, tostring
local now = ngx.now

local _M = {}

-- Names whose nodes are kept in one VM.
local MAX_NAMES = 4096
local DEFAULT_ORDER = { "last", "SRV", "A", "AAAA", "CNAME" }
-- Seconds for which a failure is remembered, and for which nodes outlive their TTL while the servers do not answer.
local FAILURE_TTL, STALE = 1, 4
-- One request may ask for so long before another does so, too: it may have ended half way.
local ASKING = 10
-- Nodes of one name: as many as an upstream may get from a registry.
local MAX_NODES = 10000
-- Weights are multiplied at most so often to split one evenly over the addresses of a target.
local MAX_SCALE = 1000

local ADDRESSES = { "last", "A", "AAAA" }

local kept = lrucache.new(MAX_NAMES)
local services, addresses

-- Aliases are followed by whoever asks for an address: asking for one alone gives none.
local function types_of(order)
    local types = {}
    for _, name in ipairs(order) do
        if name ~= "CNAME" then
            types[#types + 1] = name
        end
    end
    return types[1] and types or ADDRESSES
end

-- Made by the first who asks, at the latest.
local function clients()
    if services then
        return
    end
    local conf = config_local.local_conf().discovery.dns
    local servers, resolv_conf = conf.servers, conf.resolv_conf or "/dev/null"
    -- Names are those of DNS: no file has a say, no search domain is put behind them.
    local function make(order)
        return client.new({ hosts = "/dev/null", resolvConf = resolv_conf, nameservers = servers, search = {}, order = order })
    end
    services, addresses = make(types_of(conf.order or DEFAULT_ORDER)), make(ADDRESSES)
end

local function gcd(a, b)
    while b > 0 do
        a, b = b, a % b
    end
    return a
end

-- What all weights are multiplied by, so that each divides evenly among the addresses of its target.
local function scale_of(targets)
    local scale = 1
    for _, target in ipairs(targets) do
        local factor = #target.found / gcd(target.weight, #target.found)
        scale = scale / gcd(scale, factor) * factor
    end
    return scale <= MAX_SCALE and scale or 1
end

-- The addresses of the records' targets, and for how many seconds they hold. Targets without one are left out.
local function targets_of(records, ttl)
    local targets, last = {}, nil
    for _, record in ipairs(records) do
        local found, seconds = addresses:ask(record.target)
        if found then
            -- RFC 2782: a weight of 0 has a very small chance of being selected.
            targets[#targets + 1] = { found = found, record = record, weight = max(record.weight, 1) }
            ttl = seconds < ttl and seconds or ttl
        else
            last = seconds
        end
    end
    if not targets[1] then
        return nil, last
    end
    return targets, ttl
end

local function nodes_of_services(records, ttl, port)
    local targets, seconds = targets_of(records, ttl)
    if not targets then
        return nil, seconds
    end
    local nodes, scale = {}, scale_of(targets)
    for _, target in ipairs(targets) do
        local record = target.record
        local weight = max(1, floor(target.weight * scale / #target.found))
        for _, entry in ipairs(target.found) do
            nodes[#nodes + 1] = {
                host = entry.address, port = port or record.port ~= 0 and record.port or nil, weight = weight,
                -- The lowest is asked first, of nodes the highest.
                priority = -record.priority,
            }
        end
        if #nodes > MAX_NODES then
            return nil, "more than " .. MAX_NODES .. " addresses"
        end
    end
    return nodes, seconds
end

local function look_up(service)
    local name, port = utils.parse_addr(service)
    local records, ttl = services:ask(name)
    if not records then
        return nil, ttl
    end
    if records[1].target then
        return nodes_of_services(records, ttl, port)
    end
    local nodes = {}
    for i, record in ipairs(records) do
        nodes[i] = { host = record.address, port = port, weight = 1 }
    end
    return nodes, ttl
end

-- Asks, with the other requests kept from doing so meanwhile.
local function refresh(service, entry)
    entry.expires = now() + ASKING
    local ok, nodes, ttl = pcall(look_up, service)
    local time = now()
    if ok and nodes then
        entry.nodes, entry.err, entry.expires = nodes, nil, time + ttl
        entry.stale = entry.expires + STALE
    else
        entry.err, entry.expires = tostring(ok and ttl or nodes), time + FAILURE_TTL
        if entry.nodes and time > entry.stale then
            entry.nodes = nil
        end
    end
    return entry.nodes, entry.err
end

--- The nodes of `name` or `name:port`: `{ host, port, weight, priority }` each, or nil and the reason. Waits where nothing is known yet,
-- or the TTL is over. Phases: rewrite, access, timers.
function _M.nodes(service)
    clients()
    local entry = kept:get(service)
    if not entry then
        -- Several may ask at once for the first time: none of them has anything to go on with.
        entry = { expires = 0, stale = 0 }
        local nodes, err = refresh(service, entry)
        kept:set(service, entry)
        return nodes, err
    end
    if now() < entry.expires then
        return entry.nodes, entry.err
    end
    return refresh(service, entry)
end

--- Reads the configuration; no name is asked for before a request needs it.
function _M.init_worker()
    clients()
end

return _M
