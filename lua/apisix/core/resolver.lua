--- `core.resolver`: names to addresses through the gateway's resolver (`apisix.dns_resolver` of config.yaml). Waits.
local native = require("moongate.native").apisix
local config_local = require("apisix.core.config_local")
local log = require("apisix.core.log")
local utils = require("apisix.core.utils")

local _M = {}

local function wants_ipv6()
    local apisix = config_local.local_conf().apisix
    return not apisix or apisix.enable_ipv6 ~= false
end

local function usable(addresses)
    for i = 1, #addresses do
        local address = addresses[i]
        if wants_ipv6() or not address:find(":", 1, true) then
            return address
        end
    end
end

--- One address of `host` as a text; nil and the reason, which is in error.log, too. An IPv6 address only where
-- `apisix.enable_ipv6` is not false.
function _M.parse_domain(host)
    local addresses, err = native.resolve(host)
    local address = addresses and usable(addresses)
    if not address then
        err = err or "it has no address of a kind that is enabled"
        log.error("failed to parse domain: ", host, ", error: ", err)
        return nil, err
    end
    log.info("parse addr: ", address, ", host: ", host)
    return address
end

--- Has `core.utils.dns_parse` ask these servers (texts, with or without a port). The gateway's own resolver keeps
-- config.yaml's.
function _M.init_resolver(servers)
    utils.set_resolver(servers)
end

return _M
