--- `apisix.schema_def`: JSON Schemas of resources and plugins, as tables.
--
-- They are kept once, in the binary, as APISIX 3.18 publishes them (its control API's `/v1/schema`), and become Lua tables on
-- first use: the Admin API and the plugins check against the same text.
local native = require("moongate.native").apisix
local setmetatable = setmetatable

local _M = {}

-- Names that plugins read as `core.schema.<name>` -> resource in the published schema.
local resources = {
    route = "route",
    service = "service",
    upstream = "upstream",
    consumer = "consumer",
    consumer_group = "consumer_group",
    ssl = "ssl",
    proto = "proto",
    global_rule = "global_rule",
    plugin_config = "plugin_config",
    stream_route = "stream_route",
    plugins = "plugins",
    upstream_hash_vars_schema = "upstream_hash_vars_schema",
    upstream_hash_header_schema = "upstream_hash_header_schema",
}

local IPV4_SEGMENT = "([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"

_M.ip_def = {
    { title = "IPv4", type = "string", format = "ipv4" },
    {
        title = "IPv4/CIDR",
        type = "string",
        pattern = "^" .. IPV4_SEGMENT .. "\\." .. IPV4_SEGMENT .. "\\." .. IPV4_SEGMENT .. "\\." .. IPV4_SEGMENT
            .. "/([12]?[0-9]|3[0-2])$",
    },
    { title = "IPv6", type = "string", format = "ipv6" },
    {
        title = "IPv6/CIDR",
        type = "string",
        pattern = "^([a-fA-F0-9]{0,4}:){1,8}(:[a-fA-F0-9]{0,4}){0,8}([a-fA-F0-9]{0,4})?/[0-9]{1,3}$",
    },
}

_M.host_def_pat = "^\\*$|^\\*?[0-9a-zA-Z-._\\[\\]:]+$"
_M.host_def = { type = "string", pattern = _M.host_def_pat }

_M.id_schema = {
    anyOf = {
        { type = "string", minLength = 1, maxLength = 64, pattern = "^[a-zA-Z0-9-_.]+$" },
        { type = "integer", minimum = 1 },
    },
}

_M.uri_def = { type = "string", pattern = "^[^\\/]+:\\/\\/([\\da-zA-Z.-]+|\\[[\\da-fA-F:]+\\])(:\\d+)?" }

_M.method_schema = {
    description = "HTTP method",
    type = "string",
    enum = { "GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "CONNECT", "TRACE", "PURGE" },
}

--- The JSON Schema of a secret manager's configuration (`vault`, `aws`, `gcp`). nil for another.
function _M.of_secret_manager(name)
    return native.resource_schema("secret/" .. name)
end

--- A bundled plugin's schemas: `schema`, `consumer_schema`, `metadata_schema` (those that it has). Errors for an unknown name.
function _M.of_plugin(name)
    local schemas = native.plugin_schema(name)
    if not schemas then
        error("there is no schema of a plugin " .. name, 2)
    end
    return schemas
end

return setmetatable(_M, {
    __index = function(self, name)
        local resource = resources[name]
        local schema = resource and native.resource_schema(resource)
        if schema then
            self[name] = schema
        end
        return schema
    end,
})
