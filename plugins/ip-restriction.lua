--- Limits who may call a route, by address.
local core = require("apisix.core")
local setmetatable = setmetatable

local name = "ip-restriction"

local _M = {
    version = 0.1,
    priority = 3000,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    local ok, err = core.schema.check(_M.schema, conf)
    if not ok then
        return false, err
    end
    for _, list in pairs({ conf.whitelist or false, conf.blacklist or false }) do
        for _, cidr in ipairs(list or {}) do
            if not core.ip.validate_cidr_or_ip(cidr) then
                return false, "invalid ip address: " .. cidr
            end
        end
    end
    return true
end

-- list -> matcher; goes with the conf that holds the list.
local matchers = setmetatable({}, { __mode = "k" })

local function matches(list, address)
    local matcher = matchers[list]
    if not matcher then
        local err
        matcher, err = core.ip.create_ip_matcher(list)
        if not matcher then
            return nil, err
        end
        matchers[list] = matcher
    end
    return matcher:match(address) == true
end

function _M.restrict(conf, ctx)
    local address = ctx.var.remote_addr
    local allowed, err
    if conf.whitelist then
        allowed, err = matches(conf.whitelist, address)
    else
        local refused
        refused, err = matches(conf.blacklist, address)
        allowed = refused == false
    end
    if err then
        core.log.error("failed to build the matcher: ", err)
        return 500
    end
    if not allowed then
        return conf.response_code, { message = conf.message }
    end
end

_M.access = _M.restrict

return _M
