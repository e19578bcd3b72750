--- The endpoints that plugins offer: `_M.api()`, served where the public-api plugin exposes them, and `_M.control_api()`, served by
--- the control API.
--
-- Both give a list of `{ methods = { "GET" }, uri = "/path" | uris = { … }, handler = function(ctx) … return code, body end }`. A
-- uri may end with `*`; `:name` stands for a part of the path in the control API where `apisix.control.router` is
-- `radixtree_uri_with_parameter`: what matched is in `ctx.curr_req_matched`.
local plugin = require("apisix.plugin")
local ipairs, next, select, table_sort, type = ipairs, next, select, table.sort, type

local _M = {}

-- A uri's parts as a pattern of Lua and the names of what it captures. Parameters count only when `named`.
local function pattern_of(uri, named)
    local names, out = {}, {}
    for piece in (uri:gsub("%*$", "") .. "/"):gmatch("([^/]*)/") do
        local name = named and piece:match("^:(.+)$")
        if name then names[#names + 1] = name end
        out[#out + 1] = name and "([^/]+)" or piece:gsub("%p", "%%%0")
    end
    local rest = uri:sub(-1) == "*"
    return "^" .. table.concat(out, "/") .. (rest and "(.*)$" or "$"), names, rest
end

local function add(found, uri, endpoint, named)
    if uri:sub(-1) ~= "*" and not (named and uri:find("/:", 1, true)) then
        found.exact[uri] = found.exact[uri] or {}
        table.insert(found.exact[uri], endpoint)
        return
    end
    local pattern, names, rest = pattern_of(uri, named)
    table.insert(found.patterns, { uri = uri, pattern = pattern, names = names, rest = rest, endpoint = endpoint })
end

-- All endpoints of a kind ("api", "control_api"); patterns with the longest uri first.
local function collect(kind, named)
    local found = { exact = {}, patterns = {} }
    for _, loaded in ipairs(plugin.plugins()) do
        for _, api in ipairs(type(loaded[kind]) == "function" and loaded[kind]() or {}) do
            local methods = {}
            for _, method in ipairs(api.methods or {}) do methods[method] = true end
            local endpoint = { methods = methods, handler = api.handler }
            for _, uri in ipairs(api.uris or { api.uri }) do add(found, uri, endpoint, named) end
        end
    end
    table_sort(found.patterns, function(a, b)
        if #a.uri ~= #b.uri then return #a.uri > #b.uri end
        return a.uri < b.uri
    end)
    return found
end

-- kind -> { found, of }: one generation of plugins is alive in a VM.
local kept = {}

local function endpoints(kind, named)
    local generation = plugin.plugins()
    local known = kept[kind]
    if not known or known.of ~= generation then
        known = { found = collect(kind, named), of = generation }
        kept[kind] = known
    end
    return known.found
end

local function allows(endpoint, method)
    return next(endpoint.methods) == nil or endpoint.methods[method]
end

local function captured(one, ...)
    local matched = { _path = one.uri }
    for i, name in ipairs(one.names) do matched[name] = (select(i, ...)) end
    if one.rest then matched[":ext"] = (select(#one.names + 1, ...)) end
    return matched
end

-- The endpoint at `uri` for `method`, and what of the uri matched.
local function find(found, uri, method)
    for _, endpoint in ipairs(found.exact[uri] or {}) do
        if allows(endpoint, method) then return endpoint, { _path = uri } end
    end
    for _, one in ipairs(found.patterns) do
        if allows(one.endpoint, method) and uri:find(one.pattern) then
            return one.endpoint, captured(one, uri:match(one.pattern))
        end
    end
end

--- The endpoint that a plugin has at `uri` for `method`, or nil: its handler, and what of the uri matched. `kind`: "api" or
--- "control_api"; `named`: parameters in uris count. All phases.
function _M.find(kind, uri, method, named)
    local endpoint, matched = find(endpoints(kind, named), uri, method)
    return endpoint and endpoint.handler, matched
end

--- Runs the public endpoint at `uri`: its status and body, or nil when there is none for this method. In every phase that may answer.
function _M.match(uri, ctx)
    local handler = _M.find("api", uri, ctx.var.request_method)
    if handler then return handler(ctx) end
    return nil
end

return _M
