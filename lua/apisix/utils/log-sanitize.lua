--- `apisix.utils.log-sanitize`: what error.log may know of requests that carry credentials. All phases; copies are given, what
-- is passed stays as it is.
local clone = require("table.clone")
local pairs, type = pairs, type

local _M = {}

local REDACTED = "[REDACTED]"

-- Headers that carry credentials, in lower case.
local SECRET_HEADERS = {
    ["authorization"] = true, ["proxy-authorization"] = true, ["api-key"] = true, ["apikey"] = true, ["x-api-key"] = true,
    ["x-goog-api-key"] = true, ["x-amz-security-token"] = true, ["cookie"] = true, ["set-cookie"] = true,
}

--- A copy of a table of headers without the credentials in it.
function _M.redact_headers(headers)
    local out = {}
    for name, value in pairs(headers) do
        out[name] = type(name) == "string" and SECRET_HEADERS[name:lower()] and REDACTED or value
    end
    return out
end

--- A copy of the parameters of an HTTP request (`{ method, host, headers, … }`) without the credentials in its headers and in
-- its query.
function _M.redact_params(params)
    local out = clone(params)
    if type(params.headers) == "table" then
        out.headers = _M.redact_headers(params.headers)
    end
    if params.query ~= nil then
        out.query = REDACTED
    end
    return out
end

--- A copy of a plugin's options without `auth`.
function _M.redact_extra_opts(opts)
    local out = clone(opts)
    out.auth = nil
    return out
end

return _M
