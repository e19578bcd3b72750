--- `apisix.global_rules`: the global rules. All phases.
local core = require("apisix.core")

local _M = {}

--- Every global rule: an array of items (`{ value, key, modifiedIndex }`) and its version.
function _M.global_rules()
    return core.config.fetch_created_obj("/global_rules")
end

return _M
