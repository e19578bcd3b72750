--- What a VM that checks knows of modules: `moongate migrate check` asks.
local native = require("moongate.native")
local pcall, require, type = pcall, require, type

local _M = {}

--- Where a module comes from.
--- @param module string: `resty.redis`
--- @return string: `packed` (part of the binary), `built in` (of the VM), a file on the Lua path; nil: it is nowhere
function _M.find(module)
    if native.packed(module) then
        return "packed"
    end
    if package.loaded[module] ~= nil or package.preload[module] then
        return "built in"
    end
    return (package.searchpath(module, package.path) or package.searchpath(module, package.cpath))
end

--- Whether a module has a member.
--- @param module string: its name; `_G` stands for what scripts find without a `require`
--- @param member string: `request.header`
--- @return boolean: false when it is surely absent; true where only a request could tell, or the module does not load
function _M.has(module, member)
    local ok, value = pcall(require, module)
    if not ok then
        return true
    end
    for name in member:gmatch("[^.]+") do
        -- Functions and userdata are asked when they run.
        if type(value) ~= "table" then
            return true
        end
        local read, inner = pcall(function() return value[name] end)
        if not read then
            return true
        end
        if inner == nil then
            return false
        end
        value = inner
    end
    return true
end

return _M
