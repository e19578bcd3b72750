--- Limits who may call a route, by the host in the Referer header.
local core = require("apisix.core")
local ipairs, setmetatable, type = ipairs, setmetatable, type
local byte, lower, match, sub = string.byte, string.lower, string.match, string.sub

local name = "referer-restriction"
local STAR = byte("*")

local _M = {
    version = 0.1,
    priority = 2990,
    name = name,
    schema = core.schema.of_plugin(name).schema,
}

function _M.check_schema(conf)
    return core.schema.check(_M.schema, conf)
end

-- list -> { exact = { [host] = true }, endings = { … } }; goes with the conf that holds the list.
local parsed = setmetatable({}, { __mode = "k" })

local function parse(list)
    local hosts = { exact = {}, endings = {} }
    for _, host in ipairs(list) do
        host = lower(host)
        if byte(host) == STAR then
            hosts.endings[#hosts.endings + 1] = sub(host, 2)
        else
            hosts.exact[host] = true
        end
    end
    parsed[list] = hosts
    return hosts
end

local function is_among(list, host)
    local hosts = parsed[list] or parse(list)
    if hosts.exact[host] then
        return true
    end
    for _, ending in ipairs(hosts.endings) do
        if ending == "" or sub(host, -#ending) == ending then
            return true
        end
    end
    return false
end

-- The host of an absolute URI (RFC 3986, section 3.2) in lower case, without user and port; nil for anything else.
local function host_of(referer)
    local authority = type(referer) == "string" and match(referer, "^%a[%w+.-]*://([^/?#]+)")
    if not authority then
        return nil
    end
    authority = match(authority, "([^@]*)$")
    local host = match(authority, "^%[[%x:.]+%]") or match(authority, "^[^:]+")
    return host and lower(host)
end

local function is_allowed(conf, host)
    if not host then
        return conf.bypass_missing
    end
    if conf.whitelist then
        return is_among(conf.whitelist, host)
    end
    return not is_among(conf.blacklist, host)
end

function _M.access(conf, ctx)
    if not is_allowed(conf, host_of(ctx.var.http_referer)) then
        return 403, { message = conf.message }
    end
end

return _M
