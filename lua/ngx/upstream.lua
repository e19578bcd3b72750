--- `require("ngx.upstream")` (lua-upstream-nginx-module's README): the upstreams of locations as this worker knows them. A server that
-- is named and not addressed is one peer, under its name.

local native = require("moongate.native").upstream

return {
    _VERSION = "0.07",
    --- @return names of `lua_upstreams`, then the hosts that `proxy_pass` names beside them
    get_upstreams = native.names,
    --- @param name string @return servers as they are configured; nil, "upstream not found"
    get_servers = native.servers,
    --- @param name string @return peers and what is known of each; nil, "upstream not found"
    get_primary_peers = native.primary,
    --- The same for backup servers.
    get_backup_peers = native.backup,
    --- For this worker only. @param name string @param is_backup boolean @param id number: from 0 @param down boolean
    -- @return true; nil, "upstream not found" or "bad peer id"
    set_peer_down = native.set_peer_down,
    --- @return name of the upstream that the request is proxied to; nil: none, or not yet
    current_upstream_name = native.current,
}
