--- `apisix.discovery.init`: service registries by name, as `upstream.discovery_type` gives it.
--
-- A registry is a module with `nodes(service_name, args)`: an array of `{ host, port, weight }`, or nil and the reason. Modules
-- of the user's path named `apisix.discovery.<name>` are loaded for the names below `discovery` in config.yaml.
local config_local = require("apisix.core.config_local")
local log = require("apisix.core.log")
local pairs, pcall, require, type = pairs, pcall, require, type

local _M = {
    --- The registries; a script may add its own.
    discovery = {},
}

local function load(name)
    local ok, module = pcall(require, "apisix.discovery." .. name)
    if not ok then
        return log.error("failed to load discovery [", name, "]: ", module)
    end
    _M.discovery[name] = module
end

for name in pairs(config_local.local_conf().discovery or {}) do
    if type(name) == "string" and name:find("^[%w_-]+$") then
        load(name)
    end
end

--- Calls each registry's `init_worker`.
function _M.init_worker()
    for name, module in pairs(_M.discovery) do
        if type(module.init_worker) == "function" then
            local ok, err = pcall(module.init_worker)
            if not ok then
                log.error("failed to init discovery [", name, "]: ", err)
            end
        end
    end
end

return _M
