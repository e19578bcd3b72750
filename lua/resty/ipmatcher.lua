--- lua-resty-ipmatcher over sets of networks (src/lua/host/ip.rs).

local ffi = require("ffi")
local fast = require("moongate.native").fast

local ipairs, pairs, setmetatable, tostring, type = ipairs, pairs, setmetatable, tostring, type
local ip_add, ip_match, ip_kind = fast.ip_add, fast.ip_match, fast.ip_kind

local _M = { _VERSION = "0.6.1" }
local mt = { __index = _M }

local function empty()
    return ffi.gc(fast.ip_new(), fast.ip_free)
end

--- matcher, err = new(list of addresses and CIDRs)
function _M.new(ips)
    if type(ips) ~= "table" then return nil, "missing valid ip argument" end
    local set = empty()
    for i, ip in ipairs(ips) do
        if type(ip) ~= "string" or ip_add(set, ip, #ip, i) == 0 then
            return nil, "invalid ip address: " .. tostring(ip)
        end
    end
    return setmetatable({ set = set }, mt)
end

--- matcher, err = new_with_value({ [address or CIDR] = value }): `match` gives the value.
function _M.new_with_value(ips)
    if type(ips) ~= "table" then return nil, "missing valid ip argument" end
    local set, values = empty(), {}
    for ip, value in pairs(ips) do
        values[#values + 1] = value
        if type(ip) ~= "string" or ip_add(set, ip, #ip, #values) == 0 then
            return nil, "invalid ip address: " .. tostring(ip)
        end
    end
    return setmetatable({ set = set, values = values }, mt)
end

--- Whether the set holds the address (or its value); false and the reason for what is no address.
function _M:match(ip)
    if type(ip) ~= "string" then return false, "missing ip" end
    local n = ip_match(self.set, ip, #ip)
    if n < 0 then return false, "invalid ip address, not ipv4 and ipv6" end
    if n == 0 then return false end
    local values = self.values
    if values then return values[n] end
    return true
end

--- As `match`, for an address in network byte order.
function _M:match_bin(bin)
    local parts = {}
    if #bin == 4 then
        return self:match(("%d.%d.%d.%d"):format(bin:byte(1, 4)))
    elseif #bin == 16 then
        for i = 1, 16, 2 do
            parts[#parts + 1] = ("%x"):format(bin:byte(i) * 256 + bin:byte(i + 1))
        end
        return self:match(table.concat(parts, ":"))
    end
    return false, "invalid ip address"
end

--- The address as a number, or false.
function _M.parse_ipv4(ip)
    if type(ip) ~= "string" or ip_kind(ip, #ip) ~= 4 then return false end
    local n = 0
    for part in ip:gmatch("%d+") do n = n * 256 + part end
    return n
end

--- True for an IPv6 address, or false.
function _M.parse_ipv6(ip)
    if type(ip) ~= "string" then return false end
    return ip_kind(ip, #ip) == 6
end

return _M
