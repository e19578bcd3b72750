--- Runs the plugins of a plan, phase by phase, and uploaded functions.
--
-- A plan is made once (`build`) and run many times. For each phase it has sections, one per owner (each global rule,
-- then the route with what is merged into it); a section is a flat list: function, conf, entry, function, …

local native = require("moongate.native").plugin
local ctx_of = require("moongate.ctx")
local plugins = require("moongate.plugins")
local detours = require("moongate.phases")
local load_text = require("moongate.chunk").load
local pre_function = require("moongate.pre_function")
local request = require("moongate.request")
local function_json = require("cjson").new()
local ctxs = request.ctxs
local begin = ctx_of.begin
local error, ipairs, next, pairs, pcall, rawget, require, setmetatable, tostring, type, unpack =
    error, ipairs, next, pairs, pcall, rawget, require, setmetatable, tostring, type, unpack

local _M = {}

-- Confs as tables, by uid: shared by the plans that use them, gone with the last.
local confs = setmetatable({}, { __mode = "v" })

local TYPE_CONSUMER = 1

local function conf_table(item, plugin)
    local conf = confs[item.uid]
    if conf then return conf end
    conf = native.decode(item.json)
    local ok, passed, err = pcall(plugins.run_check, plugin, conf, item.consumer and TYPE_CONSUMER or nil, true)
    if not ok or not passed then
        -- The store let it in, this VM does not: a request must not go on without it.
        error("failed to check the configuration of plugin " .. item.name .. " err: "
            .. tostring(ok and err or passed), 0)
    end
    local meta = conf._meta
    if type(meta) ~= "table" then
        meta = {}
        conf._meta = meta
    end
    setmetatable(meta, { __index = { parent = { resource_key = require("moongate.keys") .. item.key, resource_version = item.version } } })
    confs[item.uid] = conf
    return conf
end

-- `beside_workflow`: the plan has a workflow, which may run this plugin, too.
local function entry_of(item, conf, beside_workflow)
    local meta = conf._meta
    local entry = { name = item.name, filter = item.filter, error_response = meta.error_response }
    if meta.pre_function then
        local f, err = pre_function.compile(meta.pre_function)
        if not f then native.log_error(item.name .. ": " .. err) end
        entry.pre_function = f
    end
    entry.resolved = require("apisix.secret").bind(conf)
    entry.beside_workflow = beside_workflow
    entry.plain = not entry.filter and not entry.pre_function and not entry.resolved and not beside_workflow
        and entry.error_response == nil
    return entry
end

local function section_of(owner)
    return { n = 0, plain = true, conf_type = owner.conf_type, conf_id = owner.conf_id,
        conf_version = owner.conf_version }
end

local function add(section, f, conf, entry)
    local n = section.n
    section[n + 1], section[n + 2], section[n + 3] = f, conf, entry
    section.n = n + 3
    section.plain = section.plain and entry.plain
end

-- The phases of a plan and the plugins' functions that make them. A global rule's access comes before the route's rewrite.
local passes = {
    { "rewrite", "rewrite", global = true, route = true }, { "rewrite", "access", global = true },
    { "consumer", "rewrite", consumer = true }, { "access", "access", route = true },
    { "before_proxy", "before_proxy", global = true, route = true },
    { "header_filter", "header_filter", global = true, route = true },
    { "body_filter", "body_filter", global = true, route = true },
    { "delayed_body_filter", "delayed_body_filter", global = true, route = true },
    { "log", "log", global = true, route = true },
}

-- A plugin may say of a conf that it has nothing to do in a phase: `idle_in(conf, phase) -> boolean`, asked once per plan.
-- A hook that runs before the plugin wants every phase.
local function is_idle(member, phase)
    local idle_in = member.plugin.idle_in
    return idle_in and not member.entry.pre_function and idle_in(member.conf, phase)
end

local function wants(pass, owner, member)
    local item, plugin, phase = member.item, member.plugin, pass[2]
    if type(plugin[phase]) ~= "function" or is_idle(member, phase) then return false end
    if owner.global then return pass.global end
    if pass.consumer then return item.consumer_only and plugin.type ~= "auth" end
    if phase == "rewrite" and item.consumer_only then return false end
    return pass.route
end

-- The same function, with its calls noted: requests that are watched have plans of their own.
local function noted(f, name, phase, owner)
    local owner_name, global = owner.name, owner.global
    return function(conf, ctx)
        native.watch_start(name, phase, owner_name)
        local code, body = f(conf, ctx)
        native.watch_end(name, phase, global, type(code) == "number" and code or body == nil and code and 200 or nil)
        return code, body
    end
end

-- What stands in a plan for a plugin's phase.
local function function_of(pass, owner, member)
    local f = member.plugin[pass[2]]
    return owner.noted and noted(f, member.item.name, pass[2], owner) or f
end

local function fill(plan, owner, members)
    for _, pass in ipairs(passes) do
        local section
        for _, member in ipairs(members) do
            if wants(pass, owner, member) then
                section = section or section_of(owner)
                add(section, function_of(pass, owner, member), member.conf, member.entry)
            end
        end
        if section then
            local list = plan[pass[1]] or {}
            plan[pass[1]] = list
            list[#list + 1] = section
        end
    end
end

-- The functions of `apisix` that nginx.conf would call, and where they have their place. The first decides, in APISIX, whether the
-- request is one that hooks tell of.
local nginx_phases = {
    { "rewrite", "http_access_phase" }, { "header_filter", "http_header_filter_phase" },
    { "body_filter", "http_body_filter_phase" }, { "log", "http_log_phase" },
}

-- In APISIX this decides which plugins run: hooks on it tell of the route's.
local function filter(_, ctx)
    local plugin, route = require("apisix.plugin"), ctx.matched_route
    if route then plugin.filter(ctx, route, nil, nil, "access") end
end

local function add_first(plan, phase, owner, f)
    local section = section_of(owner)
    add(section, f, {}, { name = "apisix", plain = true })
    plan[phase] = plan[phase] or {}
    table.insert(plan[phase], 1, section)
end

-- The phases in which every request comes by what has replaced a function of `apisix`.
local through = {}

-- For hooks: has the plan call them first in their phases.
local function call_nginx_phases(plan, owner, dynamic)
    local apisix = require("apisix")
    add_first(plan, "rewrite", owner, filter)
    for i = dynamic and 2 or 1, #nginx_phases do
        local phase, name = nginx_phases[i][1], nginx_phases[i][2]
        if not through[phase] then add_first(plan, phase, owner, function() apisix[name]() end) end
    end
end

-- What `ctx.plugins` shows: plugin, conf, plugin, conf, … of the route with all that is merged into it.
local function flat(members)
    local out = {}
    for _, member in ipairs(members) do
        out[#out + 1] = member.plugin
        out[#out + 1] = member.conf
    end
    return out
end

local function has_workflow(owners)
    for _, owner in ipairs(owners) do
        for _, item in ipairs(owner.items) do
            if item.name == "workflow" then return true end
        end
    end
    return false
end

--- Makes a plan of its owners (`{ name, global, conf_type, conf_id, conf_version, items }`), items by falling priority. `noting`: their
--- calls are noted; `hooked`: hooks may be on what nginx.conf would call, `dynamic` by a header.
function _M.build(owners, noting, hooked, dynamic)
    local plan = { scope = owners[#owners], switches = #owners > 1 }
    local workflow = has_workflow(owners)
    for _, owner in ipairs(owners) do
        local members = {}
        owner.noted = noting
        for _, item in ipairs(owner.items) do
            local plugin = plugins.get(item.name)
            local conf = plugin and conf_table(item, plugin)
            if conf then
                local entry = entry_of(item, conf, workflow and plugin.workflow_handler ~= nil)
                members[#members + 1] = { plugin = plugin, conf = conf, item = item, entry = entry }
            end
        end
        -- Rewrite and access of one global rule run before the next one's.
        fill(plan, owner, members)
        owner.plugins = flat(members)
    end
    if hooked then call_nginx_phases(plan, owners[#owners], dynamic) end
    local has = {}
    for _, phase in ipairs({ "rewrite", "consumer", "access", "before_proxy", "header_filter", "body_filter",
        "delayed_body_filter", "log" }) do
        has[#has + 1] = (plan[phase] or through[phase]) and 1 or 0
    end
    owners[#owners].items = nil
    return plan, table.concat(has)
end

-- As `core.json` writes them, which functions have only when they ask for it.
function_json.encode_escape_forward_slash(false)

local function_entry = { name = "function" }

-- What is no JSON is no answer of a function; of a plugin it is shown by its name, as `core.response.exit` does.
local function encode(value, entry)
    if entry == function_entry then return function_json.encode(value) .. "\n" end
    local text, err = require("apisix.core.json").encode(value, true)
    if not text then error("failed to encode data: " .. tostring(err), 0) end
    return text .. "\n"
end

-- `return code, body` of a plugin or a function as status and text, and whether the text is JSON.
local function answer(code, body, entry)
    if type(code) ~= "number" then
        if body == nil then code, body = nil, code end
    elseif code >= 400 then
        native.log_exit(entry.name, code)
        if entry.error_response ~= nil then body = entry.error_response end
    end
    local is_json = type(body) == "table"
    if is_json then
        body = encode(body, entry)
    elseif body ~= nil then
        body = tostring(body)
    end
    return type(code) == "number" and code or 200, body, is_json
end

_M.answer = answer

local NOTHING = {}

local function var_text(value)
    return require("apisix.core.utils").var_text(value)
end

-- The filter's verdict. What it asks for in vain is fetched, and it is asked again: the body once each, a registered variable each.
local function evaluate(number, ctx)
    local given, n, _ = {}, 0, nil
    -- What a plugin has written counts, also where the server does not let it be.
    for name in pairs(ctx_of.written(ctx.var) or NOTHING) do
        given[n + 1], given[n + 2] = name, var_text(ctx.var[name]) or false
        n = n + 2
    end
    local passed, graphql, posted, name = native.filter(number, unpack(given, 1, n))
    -- In phases that cannot wait a body may stay unknown.
    if graphql then ctx_of.learn("graphql_name") end
    if posted then ctx_of.learn("post_arg_") end
    if graphql or posted then passed, _, _, name = native.filter(number, unpack(given, 1, n)) end
    while name do
        given[n + 1], given[n + 2] = name, var_text(ctx.var[name]) or false
        n = n + 2
        passed, _, _, name = native.filter(number, unpack(given, 1, n))
    end
    return passed
end

-- Whether the filter of an entry lets the plugin run in this request: asked once per request.
local function passes_filter(entry, conf, ctx)
    local known = rawget(ctx, "_meta_filter")
    if not known then
        known = {}
        ctx._meta_filter = known
    end
    local passed = known[conf]
    if passed == nil then
        passed = evaluate(entry.filter, ctx)
        known[conf] = passed
    end
    return passed
end

-- Whether a workflow ran this plugin for the request before it came to this conf, which then has no say in any phase. One that
-- was run before that goes on.
local function stands_back(entry, conf, ctx, answering)
    local taken = rawget(ctx, "_workflow_taken")
    if not taken or not taken[entry.name] then return false end
    if answering then taken[conf] = true end
    return taken[conf] == true
end

-- `answering`: in a phase whose plugins may answer.
local function prepare(entry, conf, ctx, answering)
    if entry.beside_workflow and stands_back(entry, conf, ctx, answering) then return false end
    if entry.filter and not passes_filter(entry, conf, ctx) then return false end
    local f = entry.pre_function
    if f then
        local err = pre_function.call(f, entry.name, conf, ctx)
        if err then native.log_error(err) end
    end
    return true
end

local function enter(section, ctx)
    ctx.conf_type, ctx.conf_id, ctx.conf_version = section.conf_type, section.conf_id, section.conf_version
end

--- The body for a plugin that has raised in this request, as text; nil without `_meta.error_response`.
function _M.raised(at)
    local ctx = ctxs[at]
    local body = ctx and rawget(ctx, "_error_response")
    if type(body) == "table" then return encode(body) end
    return body ~= nil and tostring(body) or nil
end

-- Phases whose plugins may answer.
local function run_until_answer(sections, plan, ctx)
    for s = 1, #sections do
        local section = sections[s]
        if plan.switches then enter(section, ctx) end
        local plain = section.plain
        -- A plugin that has ended its phase with ngx.exit left its own.
        if rawget(ctx, "_error_response") then ctx._error_response = nil end
        for i = 1, section.n, 3 do
            local conf, entry = section[i + 1], section[i + 2]
            if not plain then ctx._error_response = entry.error_response end
            if plain or prepare(entry, conf, ctx, true) then
                if not plain and entry.resolved then conf = entry.resolved() end
                ctx._plugin_name = entry.name
                local code, body = section[i](conf, ctx)
                if code or body then return answer(code, body, entry) end
            end
        end
        if not plain then ctx._error_response = nil end
    end
    if plan.switches then enter(plan.scope, ctx) end
end

-- Phases whose plugins only look and change.
local function run_all(sections, plan, ctx)
    for s = 1, #sections do
        local section = sections[s]
        if plan.switches then enter(section, ctx) end
        local plain = section.plain
        for i = 1, section.n, 3 do
            local conf, entry = section[i + 1], section[i + 2]
            if plain or prepare(entry, conf, ctx) then
                if not plain and entry.resolved then conf = entry.resolved() end
                ctx._plugin_name = entry.name
                section[i](conf, ctx)
            end
        end
    end
    if plan.switches then enter(plan.scope, ctx) end
end

-- Sends the request to the upstream that a plugin has written to `ctx.upstream_conf`, if one has. A status when it is none.
local function written(ctx)
    local conf = rawget(ctx, "upstream_conf")
    if not conf or conf == rawget(ctx, "_upstream_conf") then return end
    -- Only what was written beside it names it: what was read is another upstream's.
    local key, version = rawget(ctx, "upstream_key"), rawget(ctx, "upstream_version")
    if key == rawget(ctx, "_upstream_key") or version == rawget(ctx, "_upstream_version") or version == nil then
        key, version = nil, nil
    end
    local ok, err = require("apisix.upstream").set(ctx, key, version, conf)
    if ok then return end
    native.log_error("failed to use ctx.upstream_conf: " .. tostring(err))
    return 500
end

-- A status where no upstream has the id that a plugin has set: the route's own does not take its place.
local function chosen(ctx)
    local status = written(ctx)
    if status then return status end
    local id = rawget(ctx, "upstream_id")
    if not id then return end
    if not native.choose_upstream(tostring(id)) then
        native.log_error("failed to find upstream by id: " .. tostring(id))
        return 500
    end
    -- Found out anew when somebody asks.
    ctx.matched_upstream, ctx.upstream_conf, ctx.upstream_key, ctx.upstream_version = nil, nil, nil, nil
    ctx.upstream_scheme = nil
end

--- Global rules' rewrite and access, then the route's rewrite; and its access too unless `pause`.
function _M.rewrite(plan, at, pause)
    local ctx = ctxs[at] or begin(at, plan.scope)
    local sections = plan.rewrite
    if sections then
        local code, body = run_until_answer(sections, plan, ctx)
        if code then return code, body end
    end
    sections = not pause and plan.access
    if sections then
        local code, body = run_until_answer(sections, plan, ctx)
        if code then return code, body end
    end
    -- Access, where it comes, has the last word.
    if not (pause and plan.access) then return chosen(ctx) end
end

--- After a consumer was attached (`joined`): its plugins' rewrite; then everyone's access.
function _M.access(plan, at, joined)
    local ctx = ctxs[at] or begin(at, plan.scope)
    local sections = joined and plan.consumer
    if joined then
        enter(plan.scope, ctx)
        ctx_of.rescope(at, plan.scope)
    end
    if sections then
        local code, body = run_until_answer(sections, plan, ctx)
        if code then return code, body end
    end
    sections = plan.access
    if sections then
        local code, body = run_until_answer(sections, plan, ctx)
        if code then return code, body end
    end
    return chosen(ctx)
end

-- Has the first try go to the node that a plugin of before_proxy has written to `ctx.picked_server`. A status when it is none.
local function picked(ctx, before)
    local server = rawget(ctx, "picked_server")
    if not server or server == before then return end
    local ok, err = nil, "it is no table with host and port"
    if type(server) == "table" and type(server.host) == "string" and type(server.port) == "number" then
        ok, err = require("ngx.balancer").set_current_peer(server.host, server.port)
    end
    -- Who asks later is told of the node that the request went to.
    ctx.picked_server = nil
    if ok then return end
    native.log_error("failed to use ctx.picked_server: " .. tostring(err))
    return 500
end

function _M.before_proxy(plan, at)
    local ctx = ctxs[at] or begin(at, plan.scope)
    local server = rawget(ctx, "picked_server")
    local code, body, is_json = run_until_answer(plan.before_proxy, plan, ctx)
    if code then return code, body, is_json end
    return written(ctx) or picked(ctx, server)
end

for _, phase in ipairs({ "header_filter", "body_filter", "delayed_body_filter", "log" }) do
    _M[phase] = function(plan, at)
        local ctx = ctxs[at] or begin(at, plan.scope)
        return run_all(plan[phase], plan, ctx)
    end
end

--- Has requests come by what has replaced functions of `apisix` by now, which plans are to know before they are built. Whether
--- there is such a function.
function _M.go_through()
    through = detours.install(_M)
    return next(through) ~= nil
end

local function_scope = { conf_type = "function" }

-- A table for each call: it says who was let in, which no other function may change.
local function know_consumer(ctx)
    local consumer = native.consumer()
    if not consumer then return end
    ctx.consumer, ctx.consumer_name = consumer, consumer.consumer_name
    ctx.consumer_group_id, ctx.credential_id = consumer.group_id, native.credential_id()
end

--- Calls an uploaded function: its status, its text and whether that is JSON. `id`, `revision`: which function, and which text
-- of it. `scheduled_at`: the second since the epoch that a schedule named.
function _M.call_function(f, at, id, revision, scheduled_at)
    local ctx = ctxs[at] or begin(at, function_scope)
    ctx.conf_id, ctx.conf_version = id, revision
    know_consumer(ctx)
    if scheduled_at then ctx.scheduled_at = scheduled_at end
    local code, body = f(ctx)
    if code or body then return answer(code, body, function_entry) end
end

--- A route's `filter_func`, compiled.
function _M.compile_filter(source)
    local chunk, err = load_text("return " .. source, "=filter_func")
    if not chunk then return nil, err end
    return chunk()
end

-- The variables of a request that has no route yet. Those that modules give are asked with a context of their own, which ends here.
local function variables()
    local ctx = {}
    ctx.var = ctx_of.var(ctx)
    return ctx.var
end

function _M.call_filter(f)
    return f(variables()) and true or false
end

--- A variable that a module has registered, as text; nil when it has none.
function _M.registered_var(name)
    return var_text(variables()[name])
end

return _M
