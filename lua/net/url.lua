--- net.url: parse(text) gives scheme, authority, userinfo, user, password, host, port, path, query, fragment.

local _M = { version = "1.1.0" }
local mt = { __index = _M }

local function decode(s)
    return (ngx.unescape_uri(s))
end

--- A table of the arguments of a query string.
function _M.parseQuery(text)
    local query = {}
    for pair in text:gmatch("[^&;]+") do
        local name, value = pair:match("^([^=]*)=?(.*)$")
        query[decode(name)] = decode(value)
    end
    return setmetatable(query, { __tostring = _M.buildQuery })
end

--- The query string of a table.
function _M.buildQuery(query)
    local names, parts = {}, {}
    for name in pairs(query) do names[#names + 1] = tostring(name) end
    table.sort(names)
    for i, name in ipairs(names) do
        local value = query[name]
        parts[i] = ngx.escape_uri(name) .. (value ~= "" and "=" .. ngx.escape_uri(tostring(value)) or "")
    end
    return table.concat(parts, "&")
end

function _M.parse(text)
    local url = setmetatable({ query = {}, path = "" }, mt)
    text = tostring(text or "")
    text = text:gsub("#(.*)$", function(v) url.fragment = v return "" end)
    text = text:gsub("^([%w][%w%+%-%.]*)%:", function(v) url.scheme = v:lower() return "" end)
    text = text:gsub("%?(.*)$", function(v) url.query = _M.parseQuery(v) return "" end)
    text = text:gsub("^//([^/]*)", function(authority)
        url.authority = authority
        local rest = authority:gsub("^([^@]*)@", function(info)
            url.userinfo = info
            url.user, url.password = info:match("^([^:]*):?(.*)$")
            return ""
        end)
        rest = rest:gsub(":(%d+)$", function(port) url.port = tonumber(port) return "" end)
        url.host = rest ~= "" and rest:lower() or nil
        return ""
    end)
    url.path = decode(text)
    return url
end

function mt.__tostring(url)
    local out = url.path or ""
    local query = next(url.query) and _M.buildQuery(url.query) or ""
    if query ~= "" then out = out .. "?" .. query end
    if url.authority or url.host then
        local authority = (url.userinfo and url.userinfo .. "@" or "") .. (url.host or "")
        if url.port then authority = authority .. ":" .. url.port end
        if out ~= "" and out:sub(1, 1) ~= "/" then out = "/" .. out end
        out = "//" .. authority .. out
    end
    if url.scheme then out = url.scheme .. ":" .. out end
    if url.fragment then out = out .. "#" .. url.fragment end
    return out
end

return _M
