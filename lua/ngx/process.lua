--- `require("ngx.process")`: every VM that serves is a worker.

return {
    version = "0.1.28",
    type = function() return "worker" end,
    enable_privileged_agent = function() return true end,
    get_master_pid = function() return ngx.worker.pid() end,
    signal_graceful_exit = function() return nil, "not supported" end,
}
