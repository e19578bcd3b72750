--- `apisix`: the gateway as scripts of its nginx.conf see it. There is no nginx.conf here: what it would call is done by
--- the gateway itself, so that the functions are there to be called and have nothing to do.
local _M = { version = require("apisix.core.version") }

local function nothing() end

for _, name in ipairs({ "http_init", "http_init_worker", "http_exit_worker", "http_ssl_phase", "http_ssl_client_hello_phase",
    "http_access_phase", "http_balancer_phase", "http_header_filter_phase", "http_body_filter_phase", "http_log_phase",
    "http_admin", "http_control", "stream_init", "stream_init_worker", "stream_preread_phase", "stream_balancer_phase",
    "stream_log_phase" }) do
    _M[name] = nothing
end

return _M
