--- Sends shares of the traffic to different upstreams, by rules.
local core = require("apisix.core")
local expr = require("resty.expr.v1")
local upstream_mod = require("apisix.upstream")
local roundrobin = require("resty.roundrobin")
local ipairs, setmetatable, tostring, type = ipairs, setmetatable, tostring, type

local name = "traffic-split"

local _M = {
    version = 0.1,
    priority = 966,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

-- A rule's weighted_upstreams -> its picker; vars -> compiled expression. They go with the conf.
local pickers = setmetatable({}, { __mode = "k" })
local compiled = setmetatable({}, { __mode = "k" })

local function check_match(match)
    for _, entry in ipairs(match or {}) do
        if entry.vars then
            local made, err = expr.new(entry.vars)
            if not made then
                return false, "failed to validate the 'vars' expression: " .. tostring(err)
            end
        end
    end
    return true
end

local function check_upstreams(list)
    for _, weighted in ipairs(list or {}) do
        if weighted.upstream then
            local ok, err = upstream_mod.check_schema(weighted.upstream)
            if not ok then
                return false, err
            end
        end
    end
    return true
end

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    for _, rule in ipairs(conf.rules or {}) do
        ok, err = check_match(rule.match)
        if not ok then
            return false, err
        end
        ok, err = check_upstreams(rule.weighted_upstreams)
        if not ok then
            return false, err
        end
    end
    return true
end

local function holds(vars, ctx)
    local made = compiled[vars]
    if not made then
        local err
        made, err = expr.new(vars)
        if not made then
            core.log.error("vars expression does not match: ", err)
            return false
        end
        compiled[vars] = made
    end
    local ok, err = made:eval(ctx.var)
    if err then
        core.log.error("failed to run the vars expression: ", err)
    end
    return ok
end

-- A rule without conditions, or one of its conditions.
local function matches(match, ctx)
    if not match or #match == 0 then
        return true
    end
    for _, entry in ipairs(match) do
        if not entry.vars or holds(entry.vars, ctx) then
            return true
        end
    end
    return false
end

-- Choices by index: an upstream in the conf, an id, or neither, which means the route's own.
local function picker_of(weighted_upstreams)
    local picker = pickers[weighted_upstreams]
    if not picker then
        local weights = {}
        for i, weighted in ipairs(weighted_upstreams) do
            weights[i] = weighted.weight or 1
        end
        picker = roundrobin:new(weights)
        pickers[weighted_upstreams] = picker
    end
    return picker
end

local function use(weighted, ctx)
    if weighted.upstream then
        return upstream_mod.choose(ctx, weighted.upstream)
    end
    if weighted.upstream_id then
        ctx.upstream_id = type(weighted.upstream_id) == "number" and tostring(weighted.upstream_id)
            or weighted.upstream_id
    end
end

function _M.access(conf, ctx)
    for _, rule in ipairs(conf.rules or {}) do
        if matches(rule.match, ctx) then
            local index = picker_of(rule.weighted_upstreams):find()
            -- Where all weigh nothing the route's own is left.
            return index and use(rule.weighted_upstreams[index], ctx)
        end
    end
end

return _M
