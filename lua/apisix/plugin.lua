--- `apisix.plugin`: the loaded plugins, their attributes and metadata, and running lists of them.
--
-- What runs for a request is put together by the gateway (`moongate.run`); `filter`, `merge_*` and `run_plugin` do the same
-- for lists that a plugin makes itself. All phases unless a function says otherwise.
local native = require("moongate.native").apisix
local config_version = require("moongate.native").fast.config_version
local config_local = require("apisix.core.config_local")
local log = require("apisix.core.log")
local core_table = require("apisix.core.table")
local expr = require("resty.expr.v1")
local deepcopy, nkeys = core_table.deepcopy, core_table.nkeys
local load_text = require("moongate.chunk").load
local pre_function = require("moongate.pre_function")
local getmetatable, ipairs, pairs, rawget, setmetatable, sort, tostring, type =
    getmetatable, ipairs, pairs, rawget, setmetatable, table.sort, tostring, type

local _M = { init_plugins_syncer = function() end }

--- Every loaded plugin's module, by descending priority. The same table until plugins are reloaded.
function _M.plugins()
    return require("moongate.plugins").list()
end

--- The same. Plugins are loaded, and loaded anew (`PUT /apisix/admin/plugins/reload`), by the gateway.
function _M.load()
    return _M.plugins()
end

--- One loaded plugin's module, or nil.
function _M.get(name)
    return require("moongate.plugins").get(name)
end

--- Of each loaded plugin the fields that `attrs` names (`{ name = true }`): a table by the plugins' names.
function _M.get_all(attrs)
    local out = {}
    for _, plugin in ipairs(_M.plugins()) do
        out[plugin.name] = core_table.pick(plugin, attrs)
    end
    return out
end

--- `plugin_attr.<name>` of config.yaml, or nil.
function _M.plugin_attr(name)
    local attrs = config_local.local_conf().plugin_attr
    return attrs and attrs[name]
end

-- name -> { uid, metadata, version }; one entry per plugin.
local metadata_of = {}

local function load_metadata(name)
    local value, revision = native.metadata(name)
    local loaded = value and _M.get(name)
    if loaded and loaded.check_schema then
        -- Fills the defaults; what does not hold was refused when it was written.
        loaded.check_schema(value, require("apisix.core.schema").TYPE_METADATA)
    end
    return value and { value = value, modifiedIndex = revision }
end

local function find_metadata(_, name)
    local version = config_version()
    local known = metadata_of[name]
    if known and known.version == version then
        return known.metadata
    end
    -- Something changed, not often this.
    local uid = native.metadata_uid(name)
    if uid == 0 and not known and not _M.get(name) then
        -- No plugin's name: one entry per plugin is the bound.
        return nil
    end
    if not known or known.uid ~= uid then
        known = { uid = uid, metadata = uid ~= 0 and load_metadata(name) or nil }
        metadata_of[name] = known
    end
    known.version = version
    return known.metadata
end

--- What `plugin_metadata` asks: `plugin_metadatas:get(name)`.
_M.plugin_metadatas = { get = find_metadata }

--- `/plugin_metadata/<name>` as `{ value = …, modifiedIndex = … }`, or nil. The same table until it changes.
function _M.plugin_metadata(name)
    return _M.plugin_metadatas:get(name)
end

--- The version of the conf under which the plugin runs: changes whenever the conf may have.
function _M.conf_version(conf)
    local parent = conf._meta and conf._meta.parent
    return parent and parent.resource_version
end

--- Has each conf of `plugins` know what it belongs to: `conf._meta.parent` is
-- `{ resource_key = parent.key, resource_version = parent.modifiedIndex }`.
function _M.set_plugins_meta_parent(plugins, parent)
    local face = { __index = { parent = { resource_key = parent.key, resource_version = tostring(parent.modifiedIndex) } } }
    for _, conf in pairs(plugins or {}) do
        if type(conf) == "table" then
            local meta = conf._meta
            if type(meta) ~= "table" then
                meta = {}
                conf._meta = meta
            end
            if not getmetatable(meta) then
                setmetatable(meta, face)
            end
        end
    end
end

-- Checking confs -------------------------------------------------------------------------------------------------

--- Whether what the runner obeys of a conf holds, `_meta.filter` and `_meta.pre_function`: true, or false and the reason.
function _M.check_meta(name, conf)
    local meta = type(conf) == "table" and conf._meta
    if type(meta) ~= "table" then
        return true
    end
    if meta.filter then
        local made, err = expr.new(meta.filter)
        if not made then
            return false, "failed to validate the 'vars' expression: " .. tostring(err)
        end
    end
    if meta.pre_function then
        local chunk, err = load_text(meta.pre_function, "meta pre_function")
        if not chunk then
            return false, "failed to load _meta.pre_function in plugin " .. name .. ": " .. err
        end
    end
    return true
end

local function is_disabled(conf)
    return type(conf) == "table" and type(conf._meta) == "table" and conf._meta.disable == true
end

local function check_one(name, conf, kind)
    local loaded = _M.get(name)
    if not loaded then
        return false, "unknown plugin [" .. name .. "]"
    end
    if type(conf) ~= "table" then
        return false, "invalid plugin conf " .. tostring(conf) .. " for plugin [" .. name .. "]"
    end
    local ok, err = loaded.check_schema(conf, kind)
    if not ok then
        return false, "failed to check the configuration of plugin " .. name .. " err: " .. tostring(err)
    end
    return _M.check_meta(name, conf)
end

--- Whether each plugin of `{ name = conf }` is loaded and its conf passes its check; defaults are filled in. `kind`: nil,
-- `core.schema.TYPE_CONSUMER` or `TYPE_METADATA`. `skip_unknown`: plugins that are not loaded pass, with a line of
-- error.log. True, or false and the reason.
function _M.check_schema(plugins, kind, skip_unknown)
    for name, conf in pairs(plugins) do
        if skip_unknown and not _M.get(name) then
            log.warn("skipping check schema for disabled or unknown plugin [", name, "]. ",
                "Enable the plugin or modify configuration")
        else
            local ok, err = check_one(name, conf, kind)
            if not ok then
                return false, err
            end
        end
    end
    return true
end

--- Checks `item.plugins` of a resource as `check_schema` does, passing over plugins that are not loaded.
function _M.plugin_checker(item, kind)
    if item.plugins then
        return _M.check_schema(item.plugins, kind, true)
    end
    return true
end

local function apply(owner, key, f)
    local value = owner[key]
    if type(value) ~= "string" then
        return
    end
    local new, err = f(value)
    if new then
        owner[key] = new
    end
    return err
end

--- Replaces what a conf has at `field` ("a", "a.b", through arrays, too) by `f(text)`, a text or nil and the reason, such as
-- `core.data_encryption.encrypt`. What fails stays, with a line of error.log that names the plugin and the `action`.
function _M.process_encrypt_field(conf, field, f, plugin_name, action)
    local first, rest = field:match("^([^.]+)%.(.+)$")
    local key = first or field
    local value = conf[key]
    local err
    if value == nil then
        return
    elseif first then
        for _, inner in ipairs(core_table.isarray(value) and value or { value }) do
            if type(inner) == "table" then
                _M.process_encrypt_field(inner, rest, f, plugin_name, action)
            end
        end
    elseif type(value) == "table" then
        for i in pairs(value) do
            err = apply(value, i, f) or err
        end
    else
        err = apply(conf, key, f)
    end
    if err then
        log.warn("failed to ", action, " the conf of plugin [", plugin_name, "] key [", key, "], err: ", err)
    end
end

-- Lists of plugins -----------------------------------------------------------------------------------------------

local function priority_of(member)
    local meta = member.conf._meta
    return type(meta) == "table" and meta.priority or member.plugin.priority
end

-- Those of the same priority stay as they are.
local function by_priority(a, b)
    if a.priority ~= b.priority then
        return a.priority > b.priority
    end
    return a.order < b.order
end

-- A global rule's instance of such a plugin steps back for the route's.
local function steps_back(plugin, route)
    local plugins = plugin.run_policy == "prefer_route" and route and route.value.plugins
    local conf = plugins and plugins[plugin.name]
    return conf ~= nil and conf ~= false and not is_disabled(conf)
end

--- The plugins of `conf.value.plugins` that are loaded and not disabled, by falling priority: a flat list of plugin, conf,
-- plugin, conf, …, appended to `list` if there is one. `route_conf`: of a global rule, the route that it is beside.
function _M.filter(ctx, conf, list, route_conf, _)
    list = list or {}
    local user = conf.value.plugins
    if type(user) ~= "table" or nkeys(user) == 0 then
        return list
    end
    if ctx then
        _M.set_plugins_meta_parent(user, conf)
    end
    local members = {}
    for order, plugin in ipairs(_M.plugins()) do
        local its = user[plugin.name]
        if type(its) == "table" and not is_disabled(its) and not steps_back(plugin, route_conf) then
            local member = { plugin = plugin, conf = its, order = order }
            member.priority = priority_of(member)
            members[#members + 1] = member
        end
    end
    sort(members, by_priority)
    for _, member in ipairs(members) do
        list[#list + 1] = member.plugin
        list[#list + 1] = member.conf
    end
    return list
end

local function overlay(into, from)
    for name, conf in pairs(from or {}) do
        into[name] = conf
    end
    return into
end

--- A copy of a service's item with a route's laid over it: plugins one by one, other fields as a whole.
function _M.merge_service_route(service_conf, route_conf)
    local merged = deepcopy(service_conf)
    local value, route = merged.value, route_conf.value
    value.plugins = overlay(value.plugins or {}, route.plugins)
    if route.upstream or route.upstream_id then
        value.upstream, value.upstream_id = nil, nil
    end
    for name, field in pairs(route) do
        if name ~= "plugins" then
            value[name] = field
        end
    end
    merged.modifiedIndex = route_conf.modifiedIndex .. "#" .. service_conf.modifiedIndex
    merged.key = route_conf.key
    return merged
end

--- A copy of a route's item with the plugins of the consumer's group and of the consumer laid over it, and whether there were
-- any. The consumer's plugins win.
function _M.merge_consumer_route(route_conf, consumer_conf, group_conf, api_ctx)
    local group = group_conf and group_conf.plugins or group_conf and group_conf.value and group_conf.value.plugins
    local own = consumer_conf.plugins
    if (not group or nkeys(group) == 0) and (not own or nkeys(own) == 0) then
        return route_conf, false
    end
    local merged = deepcopy(route_conf)
    local plugins = overlay(merged.value.plugins or {}, group)
    for name, conf in pairs(own or {}) do
        if not plugins[name] then
            -- It has missed the rewrite of the route's.
            conf = core_table.clone(conf)
            conf._from_consumer = true
        end
        plugins[name] = conf
    end
    merged.value.plugins = plugins
    if api_ctx then
        api_ctx.conf_type = api_ctx.conf_type .. "&consumer"
        api_ctx.conf_version = api_ctx.conf_version .. "&" .. tostring(api_ctx.consumer_ver)
    end
    return merged, true
end

-- Running --------------------------------------------------------------------------------------------------------

-- filter tables -> compiled; they go with their conf.
local compiled = setmetatable({}, { __mode = "k" })

local function passes_filter(meta, ctx)
    local made = compiled[meta.filter]
    if not made then
        local err
        made, err = expr.new(meta.filter)
        if not made then
            log.error("failed to validate the 'vars' expression: ", err)
            return true
        end
        compiled[meta.filter] = made
    end
    local ok, err = made:eval(ctx.var)
    if err then
        log.error("failed to run the 'vars' expression: ", err)
    end
    return ok or err ~= nil
end

-- _meta tables -> what their pre_function is, or false; they go with their conf.
local hooks = setmetatable({}, { __mode = "k" })

local function run_hook(name, meta, conf, ctx)
    local hook, err = hooks[meta], nil
    if hook == nil then
        hook, err = pre_function.compile(meta.pre_function)
        hooks[meta] = hook or false
    end
    if hook then
        err = pre_function.call(hook, name, conf, ctx)
    end
    if err then
        log.error(name, ": ", err)
    end
end

local function may_run(plugin, conf, ctx)
    local taken = rawget(ctx, "_workflow_taken")
    if taken and taken[plugin.name] then
        return false
    end
    local meta = type(conf._meta) == "table" and conf._meta
    if not meta then
        return true
    end
    if meta.filter and not passes_filter(meta, ctx) then
        return false
    end
    if meta.pre_function then
        run_hook(plugin.name, meta, conf, ctx)
    end
    return true
end

local ANSWERS = { rewrite = true, access = true, before_proxy = true, rewrite_in_consumer = true, preread = true }

local function exit_with(plugin, conf, code, body)
    if type(code) == "number" and code >= 400 then
        log.warn(plugin.name, " exits with http status code ", code)
        if type(conf._meta) == "table" and conf._meta.error_response then
            body = conf._meta.error_response
        end
    end
    require("apisix.core.response").exit(code or 200, body)
end

local function function_of(plugin, conf, phase)
    if phase == "rewrite_in_consumer" then
        return conf._from_consumer and plugin.type ~= "auth" and plugin.rewrite
    end
    return plugin[phase]
end

--- Calls the function for `phase` of each plugin of a flat list (`filter`), or of the request's own plugins
-- (`api_ctx.plugins`). In "rewrite", "access", "before_proxy" and "rewrite_in_consumer" what a plugin returns as
-- `code, body` is answered, which ends the request. Returns `api_ctx` and whether anything ran. Phases: as the plugins'.
function _M.run_plugin(phase, plugins, api_ctx)
    api_ctx = api_ctx or ngx.ctx.api_ctx
    plugins = plugins or api_ctx and api_ctx.plugins
    if not api_ctx or not plugins then
        return api_ctx
    end
    local ran = false
    for i = 1, #plugins, 2 do
        local plugin, conf = plugins[i], plugins[i + 1]
        local f = function_of(plugin, conf, phase)
        if type(f) == "function" and may_run(plugin, conf, api_ctx) then
            ran = true
            api_ctx._plugin_name = plugin.name
            local code, body = f(conf, api_ctx)
            api_ctx._plugin_name = nil
            if ANSWERS[phase] and (code or body) then
                exit_with(plugin, conf, code, body)
            end
        end
    end
    return api_ctx, ran
end

--- Runs the plugins of global rules (`{ { value = { plugins = … }, modifiedIndex = … }, … }`) in a phase; without one, in
-- rewrite and access. Phases: as the plugins'.
function _M.run_global_rules(api_ctx, global_rules, _, phase)
    for _, rule in ipairs(global_rules or {}) do
        local plugins = _M.filter(api_ctx, rule, nil, api_ctx.matched_route)
        for _, name in ipairs(phase and { phase } or { "rewrite", "access" }) do
            _M.run_plugin(name, plugins, api_ctx)
        end
    end
end

--- Has the plugins of the request look at a response that a plugin makes itself: those with
-- `lua_body_filter(conf, ctx, headers, body)` get it in turn and may return a status and another body. Prints what comes out
-- of it and flushes, unless `wait` says otherwise. Returns what `ngx.print` and `ngx.flush` do. Phases: rewrite, access.
function _M.lua_response_filter(api_ctx, headers, body, wait)
    local plugins = api_ctx.plugins or {}
    for i = 1, #plugins, 2 do
        local f, conf = plugins[i].lua_body_filter, plugins[i + 1]
        if type(f) == "function" and may_run(plugins[i], conf, api_ctx) then
            local code, new = f(conf, api_ctx, headers, body)
            if code then
                return exit_with(plugins[i], conf, code, new)
            end
            body = new or body
        end
    end
    local ok, err = ngx.print(body)
    if not ok then
        return nil, err
    end
    return ngx.flush(wait ~= false)
end

return _M
