--- Runs another plugin, or answers, for requests that fulfil a rule's conditions: the first rule that holds decides.
--
-- A plugin is an action when it has `workflow_handler()`, called once per VM, which returns
-- `{ handler = f(conf, ctx), check_schema = f(conf), log = f(conf, ctx) }` or calls `register`. While a request has had a plugin as
-- an action, the runner passes over what else of that plugin is still to come in the request.
local core = require("apisix.core")
local plugins = require("moongate.plugins")
local expr = require("resty.expr.v1")
local error, ipairs, rawget, setmetatable, tostring, type = error, ipairs, rawget, setmetatable, tostring, type

local name = "workflow"

local _M = {
    version = 0.1,
    priority = 1006,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

local return_schema = {
    type = "object",
    properties = { code = { type = "integer", minimum = 200, maximum = 599 } },
    required = { "code" },
}

-- Names of actions -> { handler, check_schema, log }: at most one per plugin that is loaded, and `return`.
local handlers = {
    ["return"] = {
        check_schema = function(conf)
            return core.schema.check(return_schema, conf)
        end,
        handler = function(conf)
            return conf.code, { error_msg = "rejected by workflow" }
        end,
    },
}

--- Makes a plugin an action: `register(name, check_schema, handler, log)`, or a table with the three by their names. `handler(conf, ctx)`
-- runs in the access phase and may return `code, body`; `check_schema(conf)` is the plugin's own by default; `log(conf, ctx)` runs
-- in the log phase of a request that had the action. Raises when there is no handler. Phases: any.
function _M.register(plugin_name, check_schema, handler, log)
    local given = check_schema
    if type(given) ~= "table" then
        given = { check_schema = check_schema, handler = handler, log = log }
    end
    if type(plugin_name) ~= "string" or type(given.handler) ~= "function" then
        error("workflow.register: give a plugin's name and a handler(conf, ctx)", 2)
    end
    handlers[plugin_name] = given
end

-- What runs an action, or nil. A VM that only checks has started no plugin: those that are asked for offer themselves here.
local function find_handler(plugin_name)
    if not handlers[plugin_name] then
        local offered, err = plugins.offer_to_workflow(plugin_name)
        if err then
            core.log.error("the workflow_handler of plugin ", plugin_name, " failed: ", err)
        elseif type(offered) == "table" then
            _M.register(plugin_name, offered)
        end
    end
    return handlers[plugin_name]
end

local function check_conf(plugin_name, conf)
    local check = handlers[plugin_name].check_schema or plugins.get(plugin_name).check_schema
    return check(conf)
end

local function check_action(action)
    local plugin_name = action[1]
    if type(plugin_name) ~= "string" or not find_handler(plugin_name) then
        return false, "unsupported action: " .. tostring(plugin_name)
    end
    if action[2] == nil then
        action[2] = {}
    end
    local ok, err = core.schema.check({ type = "object" }, action[2])
    if ok then
        ok, err = check_conf(plugin_name, action[2])
    end
    if not ok then
        return false, "failed to validate the '" .. plugin_name .. "' action: " .. tostring(err)
    end
    return true
end

local function check_rule(rule)
    if rule.case then
        local made, err = expr.new(rule.case)
        if not made then
            return false, "failed to validate the 'case' expression: " .. tostring(err)
        end
    end
    for _, action in ipairs(rule.actions) do
        local ok, err = check_action(action)
        if not ok then
            return false, err
        end
    end
    return true
end

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    for _, rule in ipairs(conf.rules) do
        ok, err = check_rule(rule)
        if not ok then
            return false, err
        end
    end
    return true
end

-- conf -> its rules, ready to run; they go with the conf, of which they hold only parts.
local ready = setmetatable({}, { __mode = "k" })

-- An action's conf belongs to what the workflow belongs to, and is told from that of the other rules: counters depend on both.
local function belong(conf, parent, index)
    if type(conf._meta) ~= "table" then
        conf._meta = {}
    end
    setmetatable(conf._meta, { __index = { parent = parent, workflow_rule = index } })
    return conf
end

local function prepare(conf)
    local rules = {}
    for index, rule in ipairs(conf.rules) do
        local action = rule.actions[1]
        if action then
            rules[#rules + 1] = {
                index = index,
                case = rule.case and expr.new(rule.case),
                name = action[1],
                handler = find_handler(action[1]),
                conf = belong(action[2], conf._meta and conf._meta.parent, index),
            }
        end
    end
    ready[conf] = rules
    return rules
end

local function holds(rule, ctx)
    if not rule.case then
        return true
    end
    local ok, err = rule.case:eval(ctx.var)
    if err then
        core.log.error("failed to run the 'case' expression of rule ", rule.index, ": ", err)
    end
    return ok
end

-- What the request had as actions, for the log phase and for the runner, which goes by the names.
local function note(ctx, rule)
    local taken = rawget(ctx, "_workflow_taken")
    if not taken then
        taken = {}
        ctx._workflow_taken = taken
    end
    taken[rule.name] = true
    taken[#taken + 1] = rule
end

function _M.access(conf, ctx)
    for _, rule in ipairs(ready[conf] or prepare(conf)) do
        if holds(rule, ctx) then
            core.log.info("workflow: rule ", rule.index, " runs ", rule.name)
            note(ctx, rule)
            return rule.handler.handler(rule.conf, ctx)
        end
    end
end

-- The first of several workflows of a request logs for all of them.
function _M.log(_, ctx)
    local taken = rawget(ctx, "_workflow_taken") or {}
    for i = 1, #taken do
        local rule = taken[i]
        taken[i] = nil
        if rule.handler.log then
            rule.handler.log(rule.conf, ctx)
        end
    end
end

return _M
