--- `core.ip`: sets of addresses and networks.
local ipmatcher = require("resty.ipmatcher")

local _M = {
    parse_ipv4 = ipmatcher.parse_ipv4,
    parse_ipv6 = ipmatcher.parse_ipv6,
}

--- A matcher for a list of addresses and CIDRs: `matcher:match(ip)`. nil and the reason for a bad list.
function _M.create_ip_matcher(list)
    return ipmatcher.new(list)
end

--- Whether `text` is an address or a CIDR.
function _M.validate_cidr_or_ip(text)
    if ipmatcher.parse_ipv4(text) or ipmatcher.parse_ipv6(text) then
        return true
    end
    return ipmatcher.new({ text }) ~= nil
end

return _M
