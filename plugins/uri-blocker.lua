--- Refuses requests whose URI one of some regular expressions finds something in.
local core = require("apisix.core")
local re_find = ngx.re.find
local concat = table.concat
local ipairs, setmetatable = ipairs, setmetatable

local name = "uri-blocker"

local _M = {
    version = 0.1,
    priority = 2900,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    for _, rule in ipairs(conf.block_rules) do
        local _, _, re_err = re_find("", rule, "jo")
        if re_err then
            return false, re_err
        end
    end
    return true
end

-- conf -> its rules as one expression; goes with the conf.
local joined = setmetatable({}, { __mode = "k" })

local function rules_of(conf)
    local rules = joined[conf]
    if not rules then
        rules = concat(conf.block_rules, "|")
        joined[conf] = rules
        core.log.info("concat block_rules: ", rules)
    end
    return rules
end

-- What stands in the rules is looked for in the URI as it came, where the query is, and in the path that the gateway makes of it:
-- `/./a` and `/%61` are `/a`.
local function is_blocked(conf, var)
    local rules, options = rules_of(conf), conf.case_insensitive and "ijo" or "jo"
    return re_find(var.request_uri, rules, options) or re_find(var.uri, rules, options)
end

function _M.rewrite(conf, ctx)
    if #conf.block_rules > 0 and is_blocked(conf, ctx.var) then
        return conf.rejected_code, conf.rejected_msg and { error_msg = conf.rejected_msg }
    end
end

return _M
