--- Limits who may call a route, by User-Agent.
local core = require("apisix.core")
local re_find, re_match = ngx.re.find, ngx.re.match
local ipairs, type = ipairs, type

local name = "ua-restriction"

local _M = {
    version = 0.1,
    priority = 2999,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

local function check_regexes(list)
    for _, regex in ipairs(list or {}) do
        local _, err = re_match("", regex, "jo")
        if err then
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
    ok, err = check_regexes(conf.allowlist)
    if not ok then
        return false, err
    end
    return check_regexes(conf.denylist)
end

local function matches_any(list, agent)
    for _, regex in ipairs(list) do
        if re_find(agent, regex, "jo") then
            return true
        end
    end
    return false
end

local function is_allowed(conf, agent)
    if conf.allowlist then
        return matches_any(conf.allowlist, agent)
    end
    return not matches_any(conf.denylist, agent)
end

-- Every User-Agent of a request with several must pass.
local function all_allowed(conf, agents)
    for _, agent in ipairs(agents) do
        if not is_allowed(conf, agent) then
            return false
        end
    end
    return true
end

function _M.access(conf, ctx)
    local agent = core.request.headers(ctx)["User-Agent"]
    if not agent then
        if conf.bypass_missing then
            return
        end
        return 403, { message = conf.message }
    end
    local allowed
    if type(agent) == "table" then
        allowed = all_allowed(conf, agent)
    else
        allowed = is_allowed(conf, agent)
    end
    if not allowed then
        return 403, { message = conf.message }
    end
end

return _M
