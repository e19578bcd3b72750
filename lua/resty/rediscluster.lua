--- `resty.rediscluster`: a client of Redis Cluster with the public interface of lua-resty-redis-cluster (its README; Redis'
--- "Cluster specification"). Waits.
--
-- `cluster:new(config)`, then commands as methods. A command goes to the node that its first key belongs to, and follows
-- MOVED and ASK. Not pipelines and transactions: their commands may belong to several nodes.

local redis = require("resty.redis")
local lrucache = require("resty.lrucache")
local bit = require("bit")

local band, bxor, lshift = bit.band, bit.bxor, bit.lshift
local max, min = math.max, math.min
local byte, find, lower, match, sub = string.byte, string.find, string.lower, string.match, string.sub
local md5 = ngx.md5
local error, ipairs, pairs, rawget, select, setmetatable, tonumber, tostring, type =
    error, ipairs, pairs, rawget, select, setmetatable, tonumber, tostring, type

local _M = { _VERSION = "1.05" }

local SLOTS = 16384
local DEFAULT_REDIRECTIONS = 5
local DEFAULT_TIMEOUT = 1000
-- Clusters whose slots a worker knows, by name.
local MAX_CLUSTERS = 64

-- CRC-16/XMODEM, which the specification names.
local crc_table = {}
for i = 0, 255 do
    local crc = lshift(i, 8)
    for _ = 1, 8 do
        crc = band(crc, 0x8000) ~= 0 and bxor(lshift(crc, 1), 0x1021) or lshift(crc, 1)
    end
    crc_table[i] = band(crc, 0xffff)
end

--- The slot of a key: of what is between the first { and the } behind it, if that is not empty.
function _M.keyslot(key)
    key = tostring(key)
    local open = find(key, "{", 1, true)
    local close = open and find(key, "}", open + 1, true)
    if close and close > open + 1 then key = sub(key, open + 1, close - 1) end
    local crc = 0
    for i = 1, #key do
        crc = bxor(band(lshift(crc, 8), 0xffff), crc_table[bxor(band(crc, 0xff00) / 256, byte(key, i))])
    end
    return crc % SLOTS
end

-- name -> { slot -> node }; a node is { ip, port }.
local known = lrucache.new(MAX_CLUSTERS)

-- A connection is used again by those who speak for the same user, as sure of the peer.
local function pool_of(config, node)
    local opts = config.connect_opts or {}
    return node.ip .. ":" .. node.port .. "#" .. (config.username or "") .. "#" .. (config.auth and md5(config.auth) or "")
        .. (opts.ssl and (opts.ssl_verify and "#tls verified" or "#tls") or "")
end

-- What to connect with: of its own for each node, whose pool it names.
local function options_for(config, node)
    local options = { pool = pool_of(config, node), pool_size = config.keepalive_cons }
    for name, value in pairs(config.connect_opts or {}) do options[name] = value end
    return options
end

local function connect(self, node)
    local config = self.config
    local red = redis:new()
    red:set_timeouts(config.connect_timeout or DEFAULT_TIMEOUT, config.send_timeout or DEFAULT_TIMEOUT,
        config.read_timeout or DEFAULT_TIMEOUT)
    local ok, err = red:connect(node.ip, node.port, options_for(config, node))
    if not ok then return nil, err end
    if config.auth and config.auth ~= "" and red:get_reused_times() == 0 then
        if config.username then
            ok, err = red:auth(config.username, config.auth)
        else
            ok, err = red:auth(config.auth)
        end
        if not ok then
            red:close()
            return nil, err
        end
    end
    return red
end

local function give_back(self, red)
    red:set_keepalive(self.config.keepalive_timeout or 60000, self.config.keepalive_cons or 100)
end

local function read_slots(reply, asked)
    local slots = {}
    for _, range in ipairs(reply) do
        local first, last, node = range[1], range[2], range[3]
        local ip = type(node) == "table" and node[1]
        -- An empty name stands for the node that was asked.
        local owner = ip and { ip = ip ~= "" and ip or asked.ip, port = node[2] }
        -- What a node says has the bounds that slots have.
        for slot = max(tonumber(first) or 0, 0), min(tonumber(last) or -1, SLOTS - 1) do slots[slot] = owner end
    end
    return slots
end

-- Who has which slot, by the first node that tells.
local function refresh(self)
    local last = "no node to ask: serv_list is empty"
    for _, node in ipairs(self.config.serv_list) do
        local red, err = connect(self, node)
        local reply
        if red then
            reply, err = red:cluster("slots")
            if reply then give_back(self, red) else red:close() end
        end
        if type(reply) == "table" then
            local slots = read_slots(reply, node)
            known:set(self.config.name, slots)
            return slots
        end
        last = err
    end
    return nil, "failed to fetch slots: " .. tostring(last)
end

local function slots_of(self)
    local slots = known:get(self.config.name)
    if slots then return slots end
    return refresh(self)
end

local function first_node(self)
    return self.config.serv_list[1]
end

-- Where a refusal sends a command to: the node, and whether it is to be asked (ASK) rather than to be known (MOVED).
local function redirection(err)
    local kind, ip, port = match(err, "^(%u+) %d+ (.*):(%d+)$")
    if kind == "MOVED" or kind == "ASK" then
        return { ip = ip, port = tonumber(port) }, kind == "ASK"
    end
end

local function call_on(self, node, asking, command, ...)
    local red, err = connect(self, node)
    if not red then return nil, err, true end
    if asking then red:asking() end
    local reply
    reply, err = red[command](red, ...)
    -- nil: the connection is broken; false: the node refuses.
    if reply == nil then
        red:close()
        return nil, err, true
    end
    give_back(self, red)
    return reply or nil, err
end

local function call(self, command, key, ...)
    local slots, err = slots_of(self)
    if not slots then return nil, err end
    local slot = key ~= nil and _M.keyslot(key)
    local node, asking = slot and slots[slot] or first_node(self), false
    for _ = 1, self.config.max_redirection or DEFAULT_REDIRECTIONS do
        local reply, why, broken = call_on(self, node, asking, command, ...)
        if reply ~= nil then return reply end
        err = why
        local elsewhere, ask = redirection(tostring(why))
        if elsewhere then
            if elsewhere.ip == "" then elsewhere.ip = node.ip end
            node, asking = elsewhere, ask
            if slot and not ask then slots[slot] = elsewhere end
        elseif broken then
            slots, why = refresh(self)
            if not slots then return nil, why end
            node, asking = slot and slots[slot] or first_node(self), false
        else
            return nil, err
        end
    end
    return nil, "failed after " .. (self.config.max_redirection or DEFAULT_REDIRECTIONS) .. " redirections: " .. tostring(err)
end

local SCRIPTS = { eval = true, evalsha = true, eval_ro = true, evalsha_ro = true }
local REFUSED = { multi = true, exec = true, watch = true, subscribe = true, psubscribe = true, init_pipeline = true,
    commit_pipeline = true }

-- The key that says where a command goes.
local function key_of(command, ...)
    if SCRIPTS[command] then
        return tonumber((select(2, ...))) ~= 0 and select("#", ...) >= 3 and (select(3, ...)) or nil
    end
    return (...)
end

local mt = {
    __index = function(self, name)
        local method = rawget(_M, name)
        if method then return method end
        local command = lower(name)
        if REFUSED[command] then
            error("resty.rediscluster has no " .. command .. ": its commands may belong to several nodes", 2)
        end
        method = function(this, ...)
            return call(this, command, key_of(command, ...), ...)
        end
        self[name] = method
        return method
    end,
}

--- A client. `config`: `name` (clusters of the same name share what is known of their slots), `serv_list` (array of
-- `{ ip, port }`), `auth`, `username`, `connect_timeout`, `send_timeout`, `read_timeout` (ms), `keepalive_timeout` (ms),
-- `keepalive_cons`, `max_redirection`, `connect_opts` (as of resty.redis). nil and the reason when no node tells of slots.
function _M.new(_, config)
    if type(config.name) ~= "string" or type(config.serv_list) ~= "table" then
        return nil, "config.name and config.serv_list are needed"
    end
    local self = setmetatable({ config = config }, mt)
    local slots, err = slots_of(self)
    if not slots then return nil, err end
    return self
end

return _M
