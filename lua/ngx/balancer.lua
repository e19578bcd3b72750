--- `require("ngx.balancer")` (lua-resty-core's balancer.md): for `balancer_by_lua`, which is asked before each try, and for plugins
-- before the first one. Where no try is ahead each function answers nil and why.

local native = require("moongate.native").balancer

return {
    _VERSION = "0.1.28",
    --- The peer of the try that comes. @param host string: an address, perhaps with the port @param port number
    -- @param name string: what TLS expects its name to be (`balancer_by_lua` only) @return true; nil, err
    set_current_peer = function(host, port, name)
        if not port and type(host) == "string" then
            local h, p = host:match("^([^:]+):(%d+)$")
            if not h then h, p = host:match("^(%[.+%]):(%d+)$") end
            host, port = h or host, tonumber(p)
        end
        return native.set_current_peer(host, port or 80, name)
    end,
    --- state, status = get_last_failure(): nil on the first try.
    get_last_failure = native.last_failure,
    --- Tries beside the one that comes. @param count number @return true, warning?
    set_more_tries = native.set_more_tries,
    --- Seconds for this request; nil: as configured. @return true
    set_timeouts = native.set_timeouts,
    --- How long the connection may lie idle afterwards, and how many requests it serves. @return true
    enable_keepalive = native.enable_keepalive,
    --- Whether the peer is spoken to with TLS. @param on boolean @return true
    set_upstream_tls = native.set_upstream_tls,
    --- The request is written anew for each try anyway. @return true
    recreate_request = native.recreate_request,
    --- Where the request's connections come from. @param address string: perhaps with a port @return true; nil, err
    bind_to_local_addr = native.bind_to_local_addr,
}
