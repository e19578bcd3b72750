--- `ngx.location.capture`, `capture_multi` and `ngx.exec`: their arguments, as lua-nginx-module's README describes them.

local native = require("moongate.native").location

local concat = table.concat
local error, pairs, select, tostring, type = error, pairs, select, tostring, type

local _M = {}

local method_names

local function args_of(args)
    local kind = type(args)
    if args == nil then return nil end
    if kind == "table" then
        for name in pairs(args) do
            if type(name) ~= "string" then
                error("attempt to use a non-string key in the \"args\" option table", 4)
            end
        end
        return ngx.encode_args(args)
    end
    if kind == "string" or kind == "number" then return tostring(args) end
    return nil, kind
end

-- `path?args` and more args as path and one query.
local function split(uri, args)
    local path, query = uri:match("^([^?]*)%?(.*)$")
    if not path then return uri, args end
    if args and args ~= "" then query = query ~= "" and query .. "&" .. args or args end
    return path, query
end

local function body_of(opts)
    local body = opts.body
    if body == nil then return nil end
    local kind = type(body)
    if kind ~= "string" and kind ~= "number" then error("Bad http request body", 4) end
    return tostring(body)
end

local function vars_of(opts)
    local vars = opts.vars
    if vars == nil then return nil end
    if type(vars) ~= "table" then error("Bad vars option value", 4) end
    local out = {}
    for name, value in pairs(vars) do
        if type(name) ~= "string" then error("attempt to use a non-string key in the \"vars\" option table", 4) end
        local kind = type(value)
        if kind ~= "string" and kind ~= "number" then
            error("attempt to use bad variable value type " .. kind, 4)
        end
        out[name] = tostring(value)
    end
    return out
end

local function subrequest(uri, opts)
    if opts ~= nil and type(opts) ~= "table" then error("expecting table as the 2nd argument for subrequest", 3) end
    opts = opts or {}
    local args, wrong = args_of(opts.args)
    if wrong then error("Bad args option value", 3) end
    local path, query = split(uri, args)
    if path:find("..", 1, true) and (path .. "/"):find("/../", 1, true) then
        error("unsafe uri in argument #1: " .. uri, 3)
    end
    local method = opts.method
    if method ~= nil and type(method) ~= "number" then error("Bad http request method", 3) end
    local name = method and method_names[method] or "GET"
    if method and not method_names[method] then error("unsupported HTTP method: " .. tostring(method), 3) end
    if opts.ctx ~= nil and type(opts.ctx) ~= "table" then
        error("Bad ctx option value type " .. type(opts.ctx) .. ", expected a Lua table", 3)
    end
    local body = body_of(opts)
    return {
        path = path, args = query, method = name, body = body, vars = vars_of(opts), ctx = opts.ctx,
        forward_body = body == nil and (opts.always_forward_body or name == "PUT" or name == "POST") and true or false,
        copy_all_vars = opts.copy_all_vars and true or false, share_all_vars = opts.share_all_vars and true or false,
    }
end

--- ngx.location.capture(uri, options?): `{ status, header, body, truncated }` of a subrequest.
function _M.capture(uri, opts)
    if type(uri) ~= "string" and type(uri) ~= "number" then
        error("bad argument #1 to 'capture' (string expected, got " .. (uri == nil and "nil" or type(uri)) .. ")", 2)
    end
    uri = tostring(uri)
    if uri == "" then error("The uri argument is an empty string", 2) end
    return native.capture({ subrequest(uri, opts) })
end

--- ngx.location.capture_multi({ { uri, options? }, … }): the answers of all, in order.
function _M.capture_multi(list)
    if type(list) ~= "table" then
        error("bad argument #1 to 'capture_multi' (table expected, got " .. type(list) .. ")", 2)
    end
    if #list == 0 then error("at least one subrequest should be specified", 2) end
    local all = {}
    for i = 1, #list do
        local one = list[i]
        if type(one) ~= "table" then error("the query array item " .. i .. " is not a table", 2) end
        if one[1] == nil then error("the query array item " .. i .. " is expecting at least 1 element", 2) end
        all[i] = subrequest(tostring(one[1]), one[2])
    end
    return native.capture(all)
end

--- ngx.exec(uri, args?): goes to another location and does not return.
function _M.exec(...)
    local n = select("#", ...)
    if n ~= 1 and n ~= 2 then
        error("expecting one or two arguments, but got " .. n, 2)
    end
    local uri, args = ...
    if type(uri) ~= "string" and type(uri) ~= "number" then
        error("bad argument #1 to 'exec' (string expected, got " .. (uri == nil and "nil" or type(uri)) .. ")", 2)
    end
    uri = tostring(uri)
    if uri == "" then error("The uri argument is empty", 2) end
    local query, wrong = args_of(args)
    if wrong then
        error(concat({ "bad argument #2 to 'exec' (string, number, or table expected, but got ", wrong, ")" }), 2)
    end
    if uri:sub(1, 1) == "@" then return native.exec((uri:gsub("%?.*", ""))) end
    local path
    path, query = split(uri, query)
    if (path .. "/"):find("/../", 1, true) then
        ngx.log(ngx.ERR, 'unsafe URI "', path, '" was detected')
        error("unsafe uri", 2)
    end
    return native.exec(path, query)
end

--- Takes the names of ngx.HTTP_GET and its like.
function _M.setup(names)
    method_names = names
end

return _M
