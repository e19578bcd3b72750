--- `apisix.plugins.prometheus.exporter`: what other plugins ask of the plugin `prometheus`.
local prometheus = require("prometheus")

local _M = {}

--- The maker of metrics on the gateway's own page (`prometheus`): counter, gauge, histogram. Their names get `metric_prefix` by
-- themselves. All phases.
function _M.get_prometheus()
    return prometheus.own()
end

--- The gateway's page as an array of lines. Waits; before the head of a response.
function _M.metric_data()
    return prometheus.own():metric_data()
end

return _M
