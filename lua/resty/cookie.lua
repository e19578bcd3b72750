--- lua-resty-cookie: reads the request's cookies and sets the response's.

local _M = { _VERSION = "0.1.0" }
local mt = { __index = _M }

function _M.new(_)
    return setmetatable({}, mt)
end

local function all(self)
    if self.cookies then return self.cookies end
    local header = ngx.var.http_cookie
    if not header then return nil, "no cookie found in the current request" end
    local cookies = {}
    for pair in header:gmatch("[^;]+") do
        local name, value = pair:match("^%s*([^=]-)%s*=%s*(.-)%s*$")
        if name and name ~= "" and cookies[name] == nil then
            cookies[name] = value:match('^"(.*)"$') or value
        end
    end
    self.cookies = cookies
    return cookies
end

--- value, err = cookie:get(name)
function _M:get(name)
    local cookies, err = all(self)
    if not cookies then return nil, err end
    return cookies[name]
end

--- cookies, err = cookie:get_all()
function _M:get_all()
    return all(self)
end

--- ok, err = cookie:set({ key=, value=, path=, domain=, secure=, httponly=, expires=, max_age=, samesite=, extension= })
function _M:set(cookie)
    if not cookie.key or not cookie.value then return nil, 'missing field "key" or "value"' end
    if cookie["max-age"] then cookie.max_age = cookie["max-age"] end
    local text = cookie.key .. "=" .. cookie.value
        .. (cookie.expires and "; Expires=" .. cookie.expires or "")
        .. (cookie.max_age and "; Max-Age=" .. cookie.max_age or "")
        .. (cookie.domain and "; Domain=" .. cookie.domain or "")
        .. (cookie.path and "; Path=" .. cookie.path or "")
        .. (cookie.secure and "; Secure" or "")
        .. (cookie.httponly and "; HttpOnly" or "")
        .. (cookie.samesite and "; SameSite=" .. cookie.samesite or "")
        .. (cookie.extension and "; " .. cookie.extension or "")
    local set = ngx.header["Set-Cookie"]
    if set == nil then
        ngx.header["Set-Cookie"] = text
        return true
    end
    if type(set) == "string" then set = { set } end
    for _, known in ipairs(set) do
        if known == text then return true end
    end
    set[#set + 1] = text
    ngx.header["Set-Cookie"] = set
    return true
end

return _M
