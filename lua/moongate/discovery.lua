--- Asks registries for the nodes of upstreams that name one (`discovery_type`), and remembers what became of them.
--
-- A registry is asked for each request to such an upstream. What it answers is read anew only when it has changed: the table is another
-- one and says something else, or it has another length.

local native = require("moongate.native").discovery
local registries = require("apisix.discovery.init").discovery
local json = require("apisix.core.json")
local choose = native.choose
local now = ngx.now
local ipairs, pairs, tostring, type = ipairs, pairs, tostring, type
local concat, format, sort = table.concat, string.format, table.sort
local md5 = ngx.md5_bin

local _M = {}

-- Nodes of one upstream, and bytes of them as JSON: far more than a balancer is good for.
local MAX_NODES, MAX_BYTES = 10000, 4 * 1024 * 1024
-- Upstreams that are remembered, and nodes of all of them. Past it those go that nobody has asked for in a minute; where all are
-- in use, what is found lasts for one request.
local MAX_UPSTREAMS, MAX_ALL_NODES = 4096, 200000
local IDLE = 60
-- What a registry says may depend on the request: so many answers for one upstream are remembered, each with its balancer's state.
local MAX_ANSWERS = 16
-- Seconds between two looks for idle ones.
local SWEEP_EVERY = 1

-- By the uid of the upstream that is written down: { uid, kind, service, args, used, kept }; of the last answer { nodes, count, flat,
-- err }, where err says why it is of no use; { handle } of the last one that was of use; and what became of answers, a handle or such
-- a text, by their print, how many, and the nodes in them { answers, n, held }.
local known, upstreams, all_nodes, swept = {}, 0, 0, 0

local function forget(entry)
    known[entry.uid], entry.kept = nil, nil
    upstreams, all_nodes = upstreams - 1, all_nodes - entry.held
end

local function forget_idle(time)
    if time - swept < SWEEP_EVERY then return end
    swept = time
    for _, entry in pairs(known) do
        if time - entry.used >= IDLE then forget(entry) end
    end
end

local function described(uid, time)
    local kind, service, args = native.described()
    local entry = { uid = uid, kind = kind, service = service, args = args, used = time, count = 0, answers = {}, n = 0, held = 0 }
    if upstreams >= MAX_UPSTREAMS or all_nodes >= MAX_ALL_NODES then forget_idle(time) end
    if upstreams < MAX_UPSTREAMS and all_nodes < MAX_ALL_NODES then
        entry.kept = true
        known[uid], upstreams = entry, upstreams + 1
    end
    return entry
end

local WIDTH = 5

-- The fields that make a node, one after the other: a copy, since the registry may go on working on its table.
local function flat_of(nodes, count)
    local flat, n = {}, 0
    for i = 1, count do
        local node = nodes[i]
        if type(node) ~= "table" then return nil end
        flat[n + 1], flat[n + 2], flat[n + 3] = node.host or false, node.port or false, node.weight or false
        flat[n + 4], flat[n + 5] = node.priority or 0, node.metadata or false
        n = n + WIDTH
    end
    return flat
end

local function same_in_order(nodes, count, flat)
    if not flat then return false end
    local n = 0
    for i = 1, count do
        local node = nodes[i]
        if type(node) ~= "table" or (node.host or false) ~= flat[n + 1] or (node.port or false) ~= flat[n + 2]
            or (node.weight or false) ~= flat[n + 3] or (node.priority or 0) ~= flat[n + 4] or (node.metadata or false) ~= flat[n + 5] then
            return false
        end
        n = n + WIDTH
    end
    return true
end

-- A value as what no other value of another type is: what is wrong with `"1"` is not wrong with `1`.
local function tagged(value)
    local kind = type(value)
    if kind == "number" then return format("%.17g", value) end
    if kind == "table" then
        local text = json.stably_encode(value)
        return text and "t" .. #text .. ":" .. text or "t"
    end
    return kind == "string" and #value .. ":" .. value or tostring(value)
end

-- The same few bytes for the same nodes in any order. nil and the reason where the nodes have too many bytes to be read.
local function print_of(flat)
    local lines, bytes = {}, 0
    for n = 0, #flat - WIDTH, WIDTH do
        local line = concat({ tagged(flat[n + 1]), tagged(flat[n + 2]), tagged(flat[n + 3]), tagged(flat[n + 4]),
            tagged(flat[n + 5]) }, " ")
        bytes = bytes + #line
        if bytes > MAX_BYTES then
            return nil, "invalid nodes format: at least " .. bytes .. " bytes of nodes, more than " .. MAX_BYTES
        end
        lines[#lines + 1] = line
    end
    sort(lines)
    return md5(concat(lines, "\n"))
end

-- What the gateway reads of the nodes, as JSON.
local function text_of(nodes)
    local plain = {}
    for i, node in ipairs(nodes) do
        if type(node) ~= "table" then
            plain[i] = node
        else
            plain[i] = { host = node.host, port = node.port, weight = node.weight, priority = node.priority,
                metadata = type(node.metadata) ~= "table" and node.metadata or nil }
        end
    end
    local text, err = json.encode(plain)
    if not text then return nil, "invalid nodes format: " .. tostring(err) end
    if #text > MAX_BYTES then
        return nil, "invalid nodes format: " .. #text .. " bytes of nodes, more than " .. MAX_BYTES
    end
    return text
end

local function hold(entry, nodes)
    entry.held = entry.held + nodes
    if entry.kept then all_nodes = all_nodes + nodes end
end

local function remember(entry, print, count, answer)
    if entry.n >= MAX_ANSWERS or all_nodes + count > MAX_ALL_NODES then
        entry.answers, entry.n = {}, 0
        hold(entry, -entry.held)
    end
    entry.answers[print], entry.n = answer, entry.n + 1
    hold(entry, count)
    if entry.kept and all_nodes > MAX_ALL_NODES then forget(entry) end
end

-- A handle to the nodes, or why they are of no use.
local function read(nodes)
    local text, err = text_of(nodes)
    if not text then return err end
    local handle
    handle, err = native.found(text)
    return handle or err
end

-- What became of the nodes, and what they are compared with the next time: nothing where they are too many to be kept, or none.
local function answer_of(entry, nodes, count)
    if count > MAX_NODES then return "invalid nodes format: " .. count .. " nodes, more than " .. MAX_NODES end
    local flat = flat_of(nodes, count)
    if not flat then return read(nodes) end
    local print, err = print_of(flat)
    if not print then return err end
    local answer = entry.answers[print]
    if not answer then
        answer = read(nodes)
        remember(entry, print, count, answer)
    end
    return answer, flat
end

-- Reads what has changed.
local function renew(entry, nodes)
    local count = #nodes
    if count == entry.count and same_in_order(nodes, count, entry.flat) then
        entry.nodes = nodes
        return
    end
    local answer, flat = answer_of(entry, nodes, count)
    entry.nodes, entry.count, entry.flat, entry.err = nodes, count, flat, nil
    if type(answer) == "string" then
        entry.err = answer
    else
        entry.handle = answer
    end
end

--- What was found for each upstream, by uid: for the VM that takes this one's place.
function _M.handles()
    local handles = {}
    for uid, entry in pairs(known) do handles[uid] = entry.handle end
    return handles
end

--- Finds nodes for the request's upstream, which has this uid: nothing, or why there are none and whether the registry does not know.
-- May wait.
function _M.choose(uid)
    local time = now()
    local entry = known[uid] or described(uid, time)
    entry.used = time
    local registry = registries[entry.kind]
    if not registry then return "discovery " .. entry.kind .. " is uninitialized" end
    local nodes, err = registry.nodes(entry.service, entry.args)
    if not nodes then return "no valid upstream node: " .. tostring(err), true end
    if type(nodes) ~= "table" then return "invalid nodes format: wrong type: expected array, got " .. type(nodes) end
    if nodes ~= entry.nodes or #nodes ~= entry.count then
        if #nodes == 0 then return "no valid upstream node" end
        renew(entry, nodes)
    end
    if entry.err then return entry.err end
    choose(entry.handle)
end

return _M
