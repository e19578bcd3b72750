--- Hooks of the debug mode: functions of modules, named in conf/debug.yaml, that tell error.log of their calls.

local native = require("moongate.native").plugin
local ipairs, pairs, pcall, require, select, tostring, type, unpack =
    ipairs, pairs, pcall, require, select, tostring, type, unpack

local _M = {}

-- What stood where hooks are now: { module, name, original, hook }.
local applied = {}

-- Deeper tables are told as `{...}`: a request's context leads to everything.
local DEPTH = 3

local function shown(...)
    local n = select("#", ...)
    local values = { ... }
    for i = 1, n do
        if values[i] == nil then values[i] = "nil" end
    end
    -- Debugging must not change what happens.
    local ok, text = pcall(require("inspect"), values, { depth = DEPTH })
    return ok and text or "{" .. tostring(text) .. "}"
end

local function pack(...)
    return { n = select("#", ...), ... }
end

-- The hook itself logs: the line names the function that was called.
local function hook_of(module, name, original, conf)
    local what = 'call require("' .. module .. '").' .. name .. "()"
    local level = ngx[conf.level:upper() == "ERROR" and "ERR" or conf.level:upper()] or ngx.WARN
    return function(...)
        if conf.dynamic and not native.debugged() then return original(...) end
        if conf.arguments then ngx.log(level, what, " args:", shown(...)) end
        if not conf.results then return original(...) end
        local list = pack(original(...))
        ngx.log(level, what, " return:", shown(unpack(list, 1, list.n)))
        return unpack(list, 1, list.n)
    end
end

local function put(module_name, name, conf)
    local ok, module = pcall(require, module_name)
    if not ok or type(module) ~= "table" then
        ngx.log(ngx.ERR, "failed to load module: ", module_name, ": ", ok and "it is no table" or tostring(module))
        return
    end
    local original = module[name]
    if type(original) ~= "function" then
        ngx.log(ngx.ERR, "failed to find function ", name, " in module ", module_name)
        return
    end
    local hook = hook_of(module_name, name, original, conf)
    module[name] = hook
    applied[#applied + 1] = { module = module, name = name, original = original, hook = hook }
end

--- Takes all hooks off, and puts on those of `json`: `{ functions = { module = { name, … } }, level, arguments, results, dynamic }`,
--- or nil for none.
function _M.apply(json)
    for i = #applied, 1, -1 do
        local one = applied[i]
        -- Whoever has replaced the function since keeps it.
        if one.module[one.name] == one.hook then one.module[one.name] = one.original end
        applied[i] = nil
    end
    if not json then return end
    local conf = native.decode(json)
    for module_name, names in pairs(conf.functions) do
        for _, name in ipairs(names) do put(module_name, name, conf) end
    end
end

return _M
