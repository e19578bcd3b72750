--- `require("ngx.balancer")` (lua-resty-core's balancer.md), for what runs before the request goes upstream. Scripts are not asked
-- again between tries: the upstream's own balancer picks the node of each further one.

local native = require("moongate.native").balancer

return {
    _VERSION = "0.1.28",
    --- The node of the first try. @param host string: an address @param port number @return true; nil, err
    set_current_peer = function(host, port)
        if not port then
            local h, p = tostring(host):match("^(.*):(%d+)$")
            host, port = h or host, tonumber(p)
        end
        return native.set_peer(host, port or 80)
    end,
    --- state, status = get_last_failure(): nil on the first try.
    get_last_failure = native.last_failure,
    --- Tries beside the first. @param count number @return true, warning?
    set_more_tries = native.set_more_tries,
    --- Seconds for this request; nil: as configured. @return true
    set_timeouts = native.set_timeouts,
    --- How long the connection may lie idle afterwards, and how many requests it serves. @return true
    enable_keepalive = native.enable_keepalive,
    --- Whether the node is spoken to with TLS. @param on boolean @return true
    set_upstream_tls = native.set_upstream_tls,
    --- The request is written anew for each try anyway. @return true
    recreate_request = function() return true end,
    bind_to_local_addr = function() return nil, "not supported" end,
}
