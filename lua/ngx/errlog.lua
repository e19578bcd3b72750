--- `require("ngx.errlog")`.

local fast = require("moongate.native").fast

return {
    _VERSION = "0.1.28",
    get_sys_filter_level = function() return fast.log_level() end,
    set_filter_level = function() return true end,
    get_logs = function() return {} end,
    raw_log = function(level, text) return require("moongate.native").log.write(level, text) end,
}
