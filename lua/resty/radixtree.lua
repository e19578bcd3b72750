--- lua-resty-radixtree: matches paths with methods, hosts, addresses, variables and priorities.
--
-- For what plugins match with (a handful of routes). Requests are matched by the router in Rust.

local expr = require("resty.expr.v1")
local ipmatcher = require("resty.ipmatcher")

local find, lower, sort, sub = string.find, string.lower, table.sort, string.sub
local ipairs, pairs, setmetatable, type = ipairs, pairs, setmetatable, type

local _M = { _VERSION = "2.9.1" }
local mt = { __index = _M }

local function list(value)
    if value == nil then return nil end
    return type(value) == "table" and value or { value }
end

local function set_of(values)
    if not values then return nil end
    local set = {}
    for _, value in ipairs(values) do set[value] = true end
    return set
end

-- `/user/:id/*rest` as a list of literal texts and names.
local function parse_path(path)
    local parts, at = {}, 1
    while at <= #path do
        local from, to, kind, name = find(path, "/([:*])([^/]*)", at)
        if not from then break end
        parts[#parts + 1] = { text = sub(path, at, from) }
        parts[#parts + 1] = { kind = kind, name = name ~= "" and name or ":ext" }
        at = to + 1
        if kind == "*" then return parts end
    end
    if at <= #path then parts[#parts + 1] = { text = sub(path, at) } end
    return parts
end

local function match_parts(parts, path, matched)
    local at = 1
    for _, part in ipairs(parts) do
        if part.text then
            if sub(path, at, at + #part.text - 1) ~= part.text then return false end
            at = at + #part.text
        elseif part.kind == "*" then
            matched[part.name] = sub(path, at)
            at = #path + 1
        else
            local stop = find(path, "/", at, true) or #path + 1
            if stop == at then return false end
            matched[part.name] = sub(path, at, stop - 1)
            at = stop
        end
    end
    return at == #path + 1
end

local function compile_route(route, path, order)
    local vars, err
    if route.vars then
        vars, err = expr.new(route.vars)
        if not vars then return nil, err end
    end
    local addrs = list(route.remote_addrs or route.remote_addr)
    if addrs then
        addrs, err = ipmatcher.new(addrs)
        if not addrs then return nil, err end
    end
    local hosts = nil
    for i, host in ipairs(list(route.hosts or route.host) or {}) do
        hosts = hosts or {}
        hosts[i] = lower(host)
    end
    local star = sub(path, -1) == "*" and not find(path, "/:", 1, true)
    return {
        path = path, prefix = star and sub(path, 1, -2) or nil,
        parts = not star and find(path, "/[:*]") and parse_path(path) or nil,
        methods = set_of(list(route.methods)), hosts = hosts, addrs = addrs, vars = vars,
        filter = route.filter_fun, priority = route.priority or 0, order = order,
        metadata = route.metadata, handler = route.handler, route = route,
    }
end

local function better(a, b)
    if a.priority ~= b.priority then return a.priority > b.priority end
    local a_exact, b_exact = not a.prefix and not a.parts, not b.prefix and not b.parts
    if a_exact ~= b_exact then return a_exact end
    if #a.path ~= #b.path then return #a.path > #b.path end
    return a.order < b.order
end

--- tree, err = new({ { paths, methods, hosts, remote_addrs, vars, filter_fun, priority, metadata, handler }, … })
function _M.new(routes)
    if not routes then return nil, "missing argument route" end
    local compiled = {}
    for order, route in ipairs(routes) do
        for _, path in ipairs(list(route.paths or route.path or route.uris or route.uri) or {}) do
            local one, err = compile_route(route, path, order)
            if not one then return nil, err end
            compiled[#compiled + 1] = one
        end
    end
    sort(compiled, better)
    return setmetatable({ routes = compiled }, mt)
end

local function host_matches(hosts, host)
    if not host then return false end
    host = lower(host)
    for _, pattern in ipairs(hosts) do
        if pattern == host then return pattern end
        if sub(pattern, 1, 1) == "*" and #host >= #pattern and sub(host, 1 - #pattern) == sub(pattern, 2) then
            return pattern
        end
    end
    return false
end

local function path_matches(route, path, matched)
    if route.prefix then
        if sub(path, 1, #route.prefix) ~= route.prefix then return false end
        matched[":ext"] = sub(path, #route.prefix + 1)
        return true
    end
    if route.parts then return match_parts(route.parts, path, matched) end
    return route.path == path
end

local function allows(route, opts, matched, ...)
    if route.methods then
        if not route.methods[opts.method] then return false end
        matched._method = opts.method
    end
    if route.hosts then
        local host = host_matches(route.hosts, opts.host)
        if not host then return false end
        matched._host = host
    end
    if route.addrs and not (opts.remote_addr and route.addrs:match(opts.remote_addr)) then return false end
    if route.vars and not route.vars:eval(opts.vars or ngx.var) then return false end
    if route.filter and not route.filter(opts.vars or ngx.var, opts, ...) then return false end
    return true
end

local function search(self, path, opts, ...)
    opts = opts or {}
    for _, route in ipairs(self.routes) do
        local matched = {}
        if path_matches(route, path, matched) and allows(route, opts, matched, ...) then
            if opts.matched then
                for name, value in pairs(matched) do opts.matched[name] = value end
                opts.matched._path = route.path
            end
            return route
        end
    end
end

--- metadata = tree:match(path, { method, host, remote_addr, vars, matched })
function _M:match(path, opts, ...)
    if type(path) ~= "string" then return nil, "invalid argument path" end
    local route = search(self, path, opts, ...)
    return route and route.metadata
end

--- ok = tree:dispatch(path, opts, ...): calls the route's handler with the rest.
function _M:dispatch(path, opts, ...)
    local route = search(self, path, opts, ...)
    if not route or not route.handler then return nil, "no matched route" end
    route.handler(...)
    return true
end

return _M
