--- Limits who may call a route, by the consumer, its group, the service or the route.
local core = require("apisix.core")
local ipairs, setmetatable, tostring = ipairs, setmetatable, tostring

local name = "consumer-restriction"

local _M = {
    version = 0.1,
    priority = 2400,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

-- list -> { [value] = true }; goes with the conf that holds the list.
local sets = setmetatable({}, { __mode = "k" })

local function is_among(list, value)
    local set = sets[list]
    if not set then
        set = {}
        for _, one in ipairs(list) do
            set[one] = true
        end
        sets[list] = set
    end
    return set[value] == true
end

-- A list of methods binds those that it names.
local function may_use_method(allowed, value, method)
    local named = false
    for _, entry in ipairs(allowed) do
        if entry.user == value then
            named = true
            if is_among(entry.methods or {}, method) then
                return true
            end
        end
    end
    return not named
end

-- The blacklist comes first, then the whitelist, which also frees from the methods.
local function is_allowed(conf, value, method)
    if conf.blacklist and is_among(conf.blacklist, value) then
        return false
    end
    if conf.whitelist then
        return is_among(conf.whitelist, value)
    end
    return not conf.allowed_by_methods or may_use_method(conf.allowed_by_methods, value, method)
end

function _M.access(conf, ctx)
    local value = ctx[conf.type]
    if value == nil then
        return 401, { message = "The request is rejected, please check the " .. conf.type .. " for this request" }
    end
    if not is_allowed(conf, tostring(value), ctx.var.request_method) then
        return conf.rejected_code, { message = conf.rejected_msg or "The " .. conf.type .. " is forbidden." }
    end
end

return _M
