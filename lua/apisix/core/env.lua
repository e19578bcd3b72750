--- `core.env`: `$ENV://NAME` and `$env://NAME` references.
local json = require("apisix.core.json")
local getenv = os.getenv
local sub = string.sub
local find = string.find
local upper = string.upper
local type = type

local PREFIX = "$ENV://"

local _M = { PREFIX = PREFIX }

--- The variable that the reference names, or of its JSON value the field after the slash; nil when it is unset.
function _M.fetch_by_uri(uri)
    if type(uri) ~= "string" or upper(sub(uri, 1, #PREFIX)) ~= PREFIX then
        return nil, "error env_uri prefix: " .. tostring(uri)
    end
    local path = sub(uri, #PREFIX + 1)
    local slash = find(path, "/", 1, true)
    if not slash then
        return getenv(path)
    end
    local whole = getenv(sub(path, 1, slash - 1))
    if not whole then
        return nil
    end
    local fields, err = json.decode(whole)
    if type(fields) ~= "table" then
        return nil, "decode failed, err: " .. tostring(err)
    end
    return fields[sub(path, slash + 1)]
end

function _M.init() end

return _M
