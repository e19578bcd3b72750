--- `apisix.utils.auth`: what the auth plugins share.
local core = require("apisix.core")

local _M = {}

--- Whether the plugin runs for multi-auth, which tries others after it.
function _M.is_running_under_multi_auth(ctx)
    return ctx._plugin_name == "multi-auth"
end

--- The answer when even the anonymous consumer cannot be had.
function _M.refuse_anonymous(err)
    core.log.error(err)
    return 401, { message = "Invalid user authorization" }
end

return _M
