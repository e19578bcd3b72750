--- `apisix.utils.upstream`: the nodes of upstreams.
local core = require("apisix.core")
local ipmatcher = require("resty.ipmatcher")
local ipairs, pairs, type = ipairs, pairs, type

local _M = {}

local function by_address(a, b)
    if a.host ~= b.host then
        return a.host < b.host
    end
    return (a.port or 0) < (b.port or 0)
end

local function sorted(nodes)
    local out = core.table.clone(nodes)
    core.table.sort(out, by_address)
    return out
end

local function same_list(old, new)
    if #old ~= #new then
        return false
    end
    old, new = sorted(old), sorted(new)
    for i, node in ipairs(new) do
        for _, field in ipairs({ "host", "port", "weight", "priority" }) do
            if old[i][field] ~= node[field] then
                return false
            end
        end
    end
    return true
end

--- Whether `nodes` are the nodes of the upstream `conf`, in whatever order. All phases.
function _M.compare_upstream_node(conf, nodes)
    local old = conf and (conf.original_nodes or conf.nodes)
    if type(old) ~= "table" or type(nodes) ~= "table" then
        return false
    end
    return same_list(old, nodes)
end

local function is_address(host)
    return ipmatcher.parse_ipv4(host) or ipmatcher.parse_ipv6(host)
end

--- A copy of an array of nodes with names replaced by one address each, the name in `domain`; a node whose name is not
-- resolved is left out. nil and the reason when none is left. Waits.
function _M.parse_domain_for_nodes(nodes)
    local out = {}
    for _, node in ipairs(nodes) do
        if is_address(node.host) then
            out[#out + 1] = node
        else
            local address = core.resolver.parse_domain(node.host)
            if address then
                local copy = core.table.clone(node)
                copy.host, copy.domain = address, node.host
                out[#out + 1] = copy
            end
        end
    end
    if #out == 0 and #nodes > 0 then
        return nil, "failed to parse domain of every node"
    end
    return out
end

--- Nodes in the form `{ ["host:port"] = weight }` as an array of `{ host, port, weight }`; an array as it is. All phases.
function _M.as_list(nodes)
    if core.table.isarray(nodes) then
        return nodes
    end
    local out = {}
    for address, weight in pairs(nodes) do
        local host, port = core.utils.parse_addr(address)
        out[#out + 1] = { host = host, port = port, weight = weight }
    end
    core.table.sort(out, by_address)
    return out
end

return _M
