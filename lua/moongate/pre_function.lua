--- `_meta.pre_function` of a plugin's conf: compiled once, called before the plugin in each phase.
local load_text = require("moongate.chunk").load
local pcall, tostring, type = pcall, tostring, type

local _M = {}

--- The function(conf, ctx) that a text returns; nil and why there is none. The text runs here.
function _M.compile(text)
    local chunk, err = load_text(text, "meta pre_function")
    if not chunk then return nil, err end
    local ok, f = pcall(chunk)
    if ok and type(f) == "function" then return f end
    return nil, ok and "_meta.pre_function is no function" or tostring(f)
end

--- Calls it; what to log, when it failed. The plugin goes on.
function _M.call(f, plugin_name, conf, ctx)
    local ok, err = pcall(f, conf, ctx)
    if not ok then return "pre_function execution for plugin " .. plugin_name .. " failed: " .. tostring(err) end
end

return _M
