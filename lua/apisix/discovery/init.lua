--- `apisix.discovery.init`: service registries by name, as `upstream.discovery_type` gives it.
--
-- For each name below `discovery` in config.yaml the module `apisix.discovery.<name>` is loaded: the gateway's, or one of the
-- user's own path. It returns a table with
--
-- * `nodes(service_name, discovery_args)`: an array of `{ host, port?, weight, priority?, metadata? }`, or nil and the reason. Called
--   for each request to such an upstream; it may wait. The same table as the last time, of the same length, is taken for unchanged,
--   and one that says the same changes nothing.
-- * `init_worker()`, if it likes: called once in each VM before it serves.
-- * `dump_data()`, if it likes: a table that `GET /v1/discovery/<name>/dump` shows.
-- * `control_api()`, if it likes: endpoints of the control API, as plugins have them.
--
-- `apisix.discovery.<name>.schema`, or the module's field `schema`, is a JSON Schema of what stands below the name in config.yaml;
-- its defaults are filled in before the module is loaded.
local config_local = require("apisix.core.config_local")
local log = require("apisix.core.log")
local schema = require("apisix.core.schema")
local ipairs, pairs, pcall, require, tostring, type, xpcall = ipairs, pairs, pcall, require, tostring, type, xpcall
local sort, traceback = table.sort, debug.traceback

local _M = {
    --- The registries; a script may add its own.
    discovery = {},
}

local function configured()
    local names, conf = {}, config_local.local_conf().discovery
    for name in pairs(type(conf) == "table" and conf or {}) do
        names[#names + 1] = tostring(name)
    end
    sort(names)
    return names
end

-- The module; false where there is none of that name; nil and why it does not load.
local function module_of(name)
    local ok, module = pcall(require, name)
    if ok then
        return module
    end
    if tostring(module):find("module '" .. name .. "' not found", 1, true) then
        return false
    end
    return nil, tostring(module)
end

local function conforms(rule, conf)
    if type(rule) ~= "table" then
        return true
    end
    return schema.check(rule, conf)
end

-- Nothing when the registry can serve under its configuration, else why not.
local function refusal(name)
    if not name:find("^[%w_-]+$") then
        return "is no name of a registry: letters, digits, _ and - only"
    end
    local path = "apisix.discovery." .. name
    local conf = config_local.local_conf().discovery[name]
    local rule, err = module_of(path .. ".schema")
    if rule == nil then
        return err
    end
    local ok
    ok, err = conforms(rule, conf)
    if not ok then
        return err
    end
    local module
    module, err = module_of(path)
    if module == false then
        return "there is no module " .. path .. "; the directory that holds it belongs into apisix.extra_lua_path"
    end
    if module == nil then
        return err
    end
    if type(module) ~= "table" or type(module.nodes) ~= "function" then
        return "module " .. path .. " has no function nodes(service_name, discovery_args)"
    end
    ok, err = conforms(not rule and module.schema, conf)
    if not ok then
        return err
    end
    _M.discovery[name] = module
end

local refused = {}
for _, name in ipairs(configured()) do
    local why = refusal(name)
    if why then
        refused[#refused + 1] = "discovery." .. name .. ": " .. why
    end
end

--- Why registries of config.yaml cannot serve: an array of texts, the key first. The gateway does not start with one that cannot.
function _M.mistakes()
    return refused
end

--- Calls each registry's `init_worker`. The gateway does so when a VM starts to serve.
function _M.init_worker()
    for _, why in ipairs(refused) do
        log.error(why)
    end
    for name, module in pairs(_M.discovery) do
        if type(module.init_worker) == "function" then
            local ok, err = xpcall(module.init_worker, traceback)
            if not ok then
                log.error("failed to init discovery [", name, "]: ", err)
            end
        end
    end
end

local function includes(list, wanted)
    for _, item in ipairs(type(list) == "table" and list or {}) do
        if item == wanted then
            return true
        end
    end
end

local function endpoint_of(module, uri, method)
    local offered = type(module) == "table" and type(module.control_api) == "function" and module.control_api() or {}
    -- One endpoint, or an array of them.
    for _, endpoint in ipairs(offered.handler and { offered } or offered) do
        if includes(endpoint.uris, uri) and includes(endpoint.methods, method) then
            return endpoint.handler
        end
    end
end

--- What registries answer in the control API: true and what the endpoint at `uri` returns (a status and a body), or false when there
-- is none. Phases: those of the control API.
function _M.control(uri, method)
    local name = uri:match("^/v1/discovery/([%w_-]+)/")
    local module = name and _M.discovery[name]
    if not module then
        return false
    end
    if uri == "/v1/discovery/" .. name .. "/dump" and method == "GET" and type(module.dump_data) == "function" then
        return true, 200, module.dump_data()
    end
    local handler = endpoint_of(module, uri, method)
    if handler then
        return true, handler()
    end
    return false
end

return _M
