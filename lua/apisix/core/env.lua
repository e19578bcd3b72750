--- `core.env`: `$ENV://NAME` and `$env://NAME` references (terminology/secret.md). All phases; none of these waits.
--
-- A name is looked for in `nginx_config.envs` of config.yaml (`NAME=value`), then in the environment of the process.
local json = require("apisix.core.json")
local config_local = require("apisix.core.config_local")
local getenv = os.getenv
local sub, find, upper = string.sub, string.find, string.upper
local ipairs, type = ipairs, type

local PREFIX = "$ENV://"

local _M = { PREFIX = PREFIX }

local configured

local function read_configured()
    local out = {}
    local nginx = config_local.local_conf().nginx_config
    for _, line in ipairs(nginx and nginx.envs or {}) do
        local name, value = tostring(line):match("^([^=]+)=(.*)$")
        if name then
            out[name] = value
        end
    end
    return out
end

--- The value of the variable `name` as a text, or nil.
function _M.get(name)
    configured = configured or read_configured()
    return configured[name] or getenv(name)
end

--- The variable that the reference names, or of its JSON value the field after the slash; nil when it is unset; nil and
-- the reason for what is no reference, or when the value is no JSON.
function _M.fetch_by_uri(uri)
    if type(uri) ~= "string" then
        return nil, "error env_uri type: " .. type(uri)
    end
    if upper(sub(uri, 1, #PREFIX)) ~= PREFIX then
        return nil, "error env_uri prefix: " .. uri
    end
    local path = sub(uri, #PREFIX + 1)
    local slash = find(path, "/", 1, true)
    if not slash then
        return _M.get(path)
    end
    local whole = _M.get(sub(path, 1, slash - 1))
    if not whole then
        return nil
    end
    local fields, err = json.decode(whole)
    if type(fields) ~= "table" then
        return nil, "decode failed, err: " .. (err or "the value is no object") .. ", value: " .. whole
    end
    return fields[sub(path, slash + 1)]
end

--- Reads `nginx_config.envs` anew. The first look-up does so, too.
function _M.init()
    configured = nil
end

return _M
