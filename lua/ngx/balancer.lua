--- `require("ngx.balancer")`. Retries and time limits are the upstream's (`retries`, `timeout`), so those setters refuse.

local native = require("moongate.native").balancer

return {
    _VERSION = "0.1.28",
    --- ok, err = set_current_peer(address, port): the node of the next try.
    set_current_peer = function(host, port)
        if not port then
            local h, p = tostring(host):match("^(.*):(%d+)$")
            host, port = h or host, tonumber(p)
        end
        return native.set_peer(host, port or 80)
    end,
    --- state, status = get_last_failure(): nil on the first try.
    get_last_failure = function() return native.last_failure() end,
    set_more_tries = function() return nil, "not supported: use the upstream's retries" end,
    set_timeouts = function() return nil, "not supported: use the upstream's timeout" end,
    enable_keepalive = function() return true end,
}
