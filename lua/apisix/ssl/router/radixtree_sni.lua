--- `apisix.ssl.router.radixtree_sni`: certificates by SNI. The gateway picks them by itself, before any script runs.
local core = require("apisix.core")
local error = error

local _M = {}

--- Every ssl object: an array of items (`{ value, key, modifiedIndex }`) and its version. All phases.
function _M.ssls()
    return core.config.fetch_created_obj("/ssls")
end

--- What APISIX does in the handshake. The gateway has done it: this raises.
function _M.match_and_set()
    error("the gateway picks certificates by itself; ngx.ssl.set_cert in a handshake's script takes another", 2)
end

--- Nothing is left to make ready.
function _M.init_worker() end

return _M
