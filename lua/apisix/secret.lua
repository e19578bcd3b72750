--- `apisix.secret`: references to secrets in confs: `$env://NAME`, `$env://NAME/field`.
local env = require("apisix.core.env")
local log = require("apisix.core.log")
local pairs, type, upper, sub = pairs, type, string.upper, string.sub

local _M = { PREFIX = "$secret://" }

local function fetch(uri)
    local start = upper(sub(uri, 1, 7))
    if start == "$ENV://" then
        return env.fetch_by_uri(uri)
    end
    if upper(sub(uri, 1, 10)) == "$SECRET://" then
        return nil, "secret managers are not supported yet"
    end
    return uri
end

--- Whether `text` names a secret rather than being one.
function _M.is_reference(text)
    return upper(sub(text, 1, 7)) == "$ENV://" or upper(sub(text, 1, 10)) == "$SECRET://"
end

--- The value that a reference stands for; other texts as they are. nil and the reason when it cannot be had.
function _M.fetch_by_uri(uri)
    return fetch(uri)
end

--- Replaces the references among the texts of `conf`, tables inside included.
function _M.fetch_in_place(conf)
    for key, value in pairs(conf) do
        if type(value) == "table" then
            _M.fetch_in_place(value)
        elseif type(value) == "string" and sub(value, 1, 1) == "$" then
            local found, err = fetch(value)
            if found ~= nil then
                conf[key] = found
            else
                log.error("failed to fetch secret value: ", err)
            end
        end
    end
    return conf
end

--- A copy of `refs` with its references replaced.
function _M.fetch_secrets(refs)
    if not refs then
        return nil
    end
    return _M.fetch_in_place(require("apisix.core.table").deepcopy(refs))
end

return _M
