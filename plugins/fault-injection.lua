--- Delays requests or answers them with an error, for tests of what depends on them.
local core = require("apisix.core")
local expr = require("resty.expr.v1")
local sleep = ngx.sleep
local random = math.random
local resolve_var = core.utils.resolve_var
local ipairs, pairs, setmetatable, tostring, type = ipairs, pairs, setmetatable, tostring, type

local name = "fault-injection"

local _M = {
    version = 0.1,
    priority = 11000,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

-- vars -> compiled expressions; goes with the conf that holds them.
local compiled = setmetatable({}, { __mode = "k" })

local function expressions(vars)
    local made = compiled[vars]
    if made then
        return made
    end
    made = {}
    for i, rules in ipairs(vars) do
        local err
        made[i], err = expr.new(rules)
        if not made[i] then
            return nil, err
        end
    end
    compiled[vars] = made
    return made
end

local function check_vars(vars)
    if not vars then
        return true
    end
    local made, err = expressions(vars)
    if not made then
        return false, "failed to create vars expression: " .. tostring(err)
    end
    return true
end

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    ok, err = check_vars(conf.abort and conf.abort.vars)
    if not ok then
        return false, err
    end
    return check_vars(conf.delay and conf.delay.vars)
end

local function sampled(percentage)
    return not percentage or random(1, 100) <= percentage
end

-- One of the rule sets must hold.
local function vars_match(vars, ctx)
    if not vars then
        return true
    end
    local made, err = expressions(vars)
    if not made then
        core.log.error("failed to create vars expression: ", err)
        return false
    end
    for _, e in ipairs(made) do
        local ok, eval_err = e:eval(ctx.var)
        if eval_err then
            core.log.error("failed to run the vars expression: ", eval_err)
        end
        if ok then
            return true
        end
    end
    return false
end

local function applies(fault, ctx)
    return fault and sampled(fault.percentage) and vars_match(fault.vars, ctx)
end

local function abort(fault, ctx)
    for field, value in pairs(fault.headers or {}) do
        if type(value) == "string" then
            value = resolve_var(value, ctx.var)
        end
        core.response.set_header(field, value)
    end
    return fault.http_status, resolve_var(fault.body, ctx.var)
end

function _M.rewrite(conf, ctx)
    if applies(conf.delay, ctx) then
        sleep(conf.delay.duration)
    end
    if applies(conf.abort, ctx) then
        return abort(conf.abort, ctx)
    end
end

return _M
