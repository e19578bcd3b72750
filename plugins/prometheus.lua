--- Counts requests for Prometheus.
--
-- The counting is native: a request whose plan holds this plugin is counted by the gateway itself when it ends, and scraped
-- outside of the workers. This file is the plugin's contract: its schema, its place among others, its endpoint.
local core = require("apisix.core")
local plugin = require("apisix.plugin")
local native = require("moongate.native").apisix

local name = "prometheus"
local DEFAULT_URI = "/apisix/prometheus/metrics"
local schemas = core.schema.of_plugin(name)

local _M = {
    version = 0.2,
    priority = 500,
    name = name,
    schema = schemas.schema,
    metadata_schema = schemas.metadata_schema,
    run_policy = "prefer_route",
}

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_METADATA then
        return core.schema.check(_M.metadata_schema, conf)
    end
    return core.schema.check(_M.schema, conf)
end

local function scrape()
    core.response.set_header("Content-Type", "text/plain; version=0.0.4")
    return 200, native.scrape()
end

function _M.api()
    local attr = plugin.plugin_attr(name)
    return {
        { methods = { "GET" }, uri = attr and attr.export_uri or DEFAULT_URI, handler = scrape },
    }
end

return _M
