--- Hooks of the debug mode: functions of modules, named in conf/debug.yaml, that tell error.log of their calls.

local native = require("moongate.native").plugin
local ipairs, pairs, pcall, require, select, tostring, type = ipairs, pairs, pcall, require, select, tostring, type

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
    return require("inspect")(values, { depth = DEPTH })
end

local function results(conf, tell, ...)
    if conf.results then tell(" return:", ...) end
    return ...
end

local function hook_of(module, name, original, conf)
    local what = 'call require("' .. module .. '").' .. name .. "()"
    local level = ngx[conf.level:upper() == "ERROR" and "ERR" or conf.level:upper()] or ngx.WARN
    local function tell(kind, ...)
        -- Debugging must not change what happens.
        local ok, text = pcall(shown, ...)
        ngx.log(level, what, kind, ok and text or tostring(text))
    end
    return function(...)
        if conf.dynamic and not native.hooked() then return original(...) end
        if conf.arguments then tell(" args:", ...) end
        return results(conf, tell, original(...))
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
