--- The plugins that are loaded in this VM.

local error, ipairs, pairs, pcall, require, tostring, type = error, ipairs, pairs, pcall, require, tostring, type
local debug_traceback, xpcall = debug.traceback, xpcall
local purpose = require("moongate.native").purpose
local detours = require("moongate.phases")

local _M = {}

local by_name, ordered = {}, {}

--- Phases that a plugin may have a function for, in the order of their bits.
_M.phases = { "rewrite", "access", "before_proxy", "header_filter", "body_filter", "delayed_body_filter", "log" }

-- What every plugin's schema allows beside its own properties.
local meta_schema = {
    type = "object",
    additionalProperties = false,
    properties = {
        disable = { type = "boolean" },
        error_response = { oneOf = { { type = "string" }, { type = "object" } } },
        priority = { type = "integer", description = "runs the plugin as if it had this priority" },
        filter = { type = "array", description = "an expression over variables: the plugin runs for requests that fulfil it" },
        pre_function = { type = "string", description = "Lua that returns a function(conf, ctx), called before the plugin in each phase" },
    },
}

local function complete(name, plugin)
    if type(plugin) ~= "table" then return nil, "invalid plugin [" .. name .. "]: it returns no table" end
    for _, field in ipairs({ "priority", "version" }) do
        if not plugin[field] then return nil, "invalid plugin [" .. name .. "], missing field: " .. field end
    end
    if type(plugin.priority) ~= "number" then return nil, "invalid plugin [" .. name .. "]: priority is no number" end
    if type(plugin.schema) ~= "table" then return nil, "invalid plugin [" .. name .. "] schema field" end
    plugin.name = name
    local schema = plugin.schema
    if schema.type == "object" or schema.properties then
        schema.properties = schema.properties or {}
        if not schema.properties._meta then schema.properties._meta = meta_schema end
    end
    if not plugin.check_schema then
        function plugin.check_schema(conf)
            return require("apisix.core.schema").check(schema, conf)
        end
    end
    return plugin
end

-- `plugin_attr` of config.yaml, when the plugin says what it may be.
local function check_attr(plugin)
    if type(plugin.attr_schema) ~= "table" then return true end
    local attr = require("apisix.plugin").plugin_attr(plugin.name) or {}
    local ok, err = require("apisix.core.schema").check(plugin.attr_schema, attr)
    if ok then return true end
    return nil, "failed to check the plugin_attr[" .. plugin.name .. "]: " .. tostring(err)
end

local function describe(plugin)
    local info = {
        name = plugin.name, priority = plugin.priority, version = plugin.version,
        type = plugin.type, run_policy = plugin.run_policy, scope = plugin.scope,
        schema = plugin.schema, consumer_schema = plugin.consumer_schema, metadata_schema = plugin.metadata_schema,
        phases = {},
    }
    for i, phase in ipairs(_M.phases) do
        if type(plugin[phase]) == "function" then info.phases[#info.phases + 1] = i end
    end
    return info
end

local function insert(plugin)
    by_name[plugin.name] = plugin
    local at = #ordered + 1
    for i, other in ipairs(ordered) do
        if plugin.priority > other.priority then
            at = i
            break
        end
    end
    table.insert(ordered, at, plugin)
end

-- Functions that the gateway has in place of Lua: requests do not come by what replaces them.
local not_called = {
    apisix = detours.not_called,
    ["apisix.plugin"] = { "load", "filter", "merge_service_route", "merge_consumer_route", "run_plugin", "run_global_rules" },
    ["apisix.upstream"] = { "set_by_route" },
    ["apisix.balancer"] = { "pick_server", "run" },
    ["apisix.router"] = { "http_routes", "services", "stream_routes", "global_rules" },
}

local function functions_not_called()
    local found = {}
    for module, names in pairs(not_called) do
        local of = require(module)
        for _, name in ipairs(names) do found[module .. "." .. name] = { of, name, of[name] } end
    end
    return found
end

local function serves_streams()
    local conf = require("apisix.core.config_local").local_conf().apisix
    local mode = conf and conf.proxy_mode
    return type(mode) == "string" and mode:find("stream", 1, true) ~= nil
end

local function run_hook(name)
    require(name)
    if purpose == "plugins" then detours.start(serves_streams()) end
end

--- `apisix.lua_module_hook`: a module of the user's own that runs before plugins are loaded, and may replace what it likes. Nil, or
--- why it could not; and which functions it has replaced in vain, as text.
function _M.run_user_hook(name)
    local before = functions_not_called()
    local ok, err = xpcall(run_hook, debug_traceback, name)
    local in_vain = {}
    for shown, found in pairs(before) do
        if found[1][found[2]] ~= found[3] then in_vain[#in_vain + 1] = shown end
    end
    table.sort(in_vain)
    return not ok and tostring(err) or nil, in_vain[1] and table.concat(in_vain, ", ") or nil
end

--- Loads one plugin; its description, or nil and why not. `missing` as third result: there is no such module.
function _M.load(name)
    local module = "apisix.plugins." .. name
    local ok, plugin = xpcall(require, debug_traceback, module)
    if not ok then
        local text = tostring(plugin)
        return nil, text, text:find("module '" .. module .. "' not found", 1, true) and "missing" or nil
    end
    local err
    plugin, err = complete(name, plugin)
    if not plugin then return nil, err end
    ok, err = check_attr(plugin)
    if not ok then return nil, err end
    insert(plugin)
    return describe(plugin)
end

-- Plugins that were asked for a `workflow_handler`: name -> { ok, what it returned or why it failed }.
local offers = {}

--- What a loaded plugin's `workflow_handler()` returns, which is called once per VM: nil without one; nil and why it failed.
function _M.offer_to_workflow(name)
    local plugin = by_name[name]
    if not plugin or type(plugin.workflow_handler) ~= "function" then return nil end
    if not offers[name] then offers[name] = { xpcall(plugin.workflow_handler, debug_traceback) } end
    local ok, result = offers[name][1], offers[name][2]
    if ok then return result end
    return nil, tostring(result)
end

-- `run` by way of what stands for a function of `apisix` now; without it where that fails, or does not call the original.
local function by_way_of(name, run)
    if not detours.is_replaced(name) then return run() end
    local reached, ran, own_err = false, nil, nil
    local ok, err = xpcall(detours.go_through, debug_traceback, name, function()
        reached = true
        ran, own_err = xpcall(run, debug_traceback)
    end)
    if not ok then ngx.log(ngx.ERR, "apisix.", name, ": ", tostring(err)) end
    if not reached then return run() end
    -- As without the replacement.
    if not ran then error(own_err, 0) end
end

--- Registries' `init_worker`, then every plugin's `workflow_handler` and `init`, when their VM starts to serve; what failed of
-- plugins, by name.
function _M.init()
    local errors = {}
    by_way_of("http_init_worker", function()
        if require("apisix.core.config_local").local_conf().discovery then require("apisix.discovery.init").init_worker() end
        for _, plugin in ipairs(ordered) do
            -- What the workflow plugin may call comes before `init`, which may wait.
            local _, failed = _M.offer_to_workflow(plugin.name)
            local ok, err = true, nil
            if type(plugin.init) == "function" then ok, err = xpcall(plugin.init, debug_traceback) end
            errors[plugin.name] = not ok and tostring(err) or failed
        end
    end)
    if serves_streams() then by_way_of("stream_init_worker", function() end) end
    return errors
end

--- Every plugin's `destroy`, when its VM has served its last request.
function _M.destroy()
    by_way_of("http_exit_worker", function()
        for _, plugin in ipairs(ordered) do
            if type(plugin.destroy) == "function" then pcall(plugin.destroy) end
        end
    end)
end

local stored_now = false

--- Whether the check that runs now is of a conf that the configuration has. Any other must leave nothing behind.
function _M.checks_stored() return stored_now end

--- A plugin's own check of a conf that the configuration has, or (not `stored`) may get: what it returns, or raises.
function _M.run_check(plugin, conf, kind, stored)
    local before = stored_now
    stored_now = stored
    local ran, ok, err = pcall(plugin.check_schema, conf, kind)
    stored_now = before
    if not ran then error(ok, 0) end
    return ok, err
end

--- Whether `conf` passes the plugin's own check. `kind`: nil, 1 (a consumer's) or 2 (metadata). `stored`: the configuration has it.
function _M.check(name, conf, kind, stored)
    local plugin = by_name[name]
    if not plugin then return nil, "unknown plugin [" .. name .. "]" end
    if kind == 2 and not plugin.metadata_schema then return true end
    local ok, err = _M.run_check(plugin, conf, kind, stored)
    if not ok then return false, tostring(err) end
    return require("apisix.plugin").check_meta(name, conf)
end

-- What an upload must not have wrong. A file of the user's own is loaded all the same, as by APISIX, and refuses every conf.
local function check_schemas(plugin)
    for _, field in ipairs({ "schema", "consumer_schema", "metadata_schema", "attr_schema" }) do
        if plugin[field] ~= nil then
            local ok, err = type(plugin[field]) == "table", "it is no table"
            if ok then ok, err = require("apisix.core.schema").valid(plugin[field]) end
            if not ok then return nil, "invalid plugin [" .. plugin.name .. "]: " .. field .. " is no JSON Schema: " .. tostring(err) end
        end
    end
    return true
end

--- A plugin's text under a name: what it says of itself, or nil and why it cannot be one.
function _M.inspect(chunk, name)
    local ok, plugin = xpcall(chunk, debug_traceback, "apisix.plugins." .. name)
    if not ok then return nil, tostring(plugin) end
    local err
    if type(plugin) == "table" and plugin.name ~= nil and plugin.name ~= name then
        return nil, "the plugin calls itself '" .. tostring(plugin.name) .. "', not '" .. name .. "'"
    end
    plugin, err = complete(name, plugin)
    if not plugin then return nil, err end
    ok, err = check_schemas(plugin)
    if not ok then return nil, err end
    return describe(plugin)
end

--- Every loaded plugin's module, by descending priority.
function _M.list() return ordered end

--- One loaded plugin's module, or nil.
function _M.get(name) return by_name[name] end

return _M
