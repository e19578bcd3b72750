--- `core.env`: `$ENV://NAME` and `$env://NAME` references (terminology/secret.md). All phases; none of these waits.
--
-- The environment is the process's, with `nginx_config.envs` of config.yaml (`NAME=value`) in it.
local json = require("apisix.core.json")
local getenv = os.getenv
local sub, find, upper = string.sub, string.find, string.upper
local type = type

local PREFIX = "$ENV://"

local _M = { PREFIX = PREFIX }

--- The value of the variable `name` as a text, or nil.
function _M.get(name)
    return getenv(name)
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

--- Nothing is left to make ready.
function _M.init() end

return _M
