--- One plugin on trial: a mock request through its phases, and what it logs meanwhile.
--
-- The VM is the trial's own. `listen` comes before anything else is loaded, so that whoever keeps `ngx.log` keeps this one.

local ctx_of = require("moongate.ctx")
local native = require("moongate.native").plugin
local plugins = require("moongate.plugins")
local request = require("moongate.request")
local encode = require("cjson").encode
local concat, getinfo = table.concat, debug.getinfo
local getmetatable, pcall, select, tostring, type = getmetatable, pcall, select, tostring, type

local _M = {}

-- Kept of what a plugin logs: a screenful many times over, and bytes that an answer can carry.
local MAX_LINES, MAX_LINE_BYTES, MAX_BYTES = 500, 4096, 262144

local names = { [0] = "stderr", "emerg", "alert", "crit", "error", "warn", "notice", "info", "debug" }
local lines, count, bytes, dropped = {}, 0, 0, 0
local plugin, conf

local function keep(level, text)
    text = text:sub(1, MAX_LINE_BYTES)
    if count >= MAX_LINES or bytes + #text > MAX_BYTES then
        dropped = dropped + 1
        return
    end
    count, bytes = count + 1, bytes + #text
    lines[count] = { level = level, message = text }
end

local function text_of(...)
    local parts = { ... }
    local n = select("#", ...)
    for i = 1, n do
        if type(parts[i]) == "table" and not (getmetatable(parts[i]) or {}).__tostring then
            error("bad argument #" .. i .. " to 'log' (expected table to have __tostring metamethod)", 3)
        end
        parts[i] = tostring(parts[i])
    end
    return concat(parts, "", 1, n)
end

-- `my-plugin.lua:12: ` of whoever logs: the frames of core.log are gone by their tail calls.
local function place()
    local info = getinfo(3, "Sl")
    if not info or info.currentline < 0 then return "" end
    return (info.short_src:match("[^/]*$")) .. ":" .. info.currentline .. ": "
end

--- Takes every line from now on, whatever its level.
function _M.listen()
    local ngx = ngx
    require("ngx.errlog").get_sys_filter_level = function() return ngx.DEBUG end
    function ngx.log(level, ...)
        if type(level) ~= "number" or not names[level] then error("bad argument #1 to 'log' (bad log level)", 2) end
        keep(names[level], place() .. text_of(...))
    end
    function _G.print(...)
        keep("notice", place() .. text_of(...))
    end
end

--- Adds a line of the gateway's own.
function _M.note(level, text)
    keep(level, text)
end

--- What was logged, and how many lines more.
function _M.lines()
    return encode({ lines = lines, dropped = dropped })
end

--- Loads the plugin and checks the conf (JSON): the phases that it has functions for (JSON); or nil and why not.
function _M.prepare(name, json)
    local info, err = plugins.load(name)
    if not info then return nil, err end
    plugin, conf = plugins.get(name), native.decode(json)
    local ok, passed, reason = pcall(plugin.check_schema, conf)
    if not ok or not passed then
        return nil, "failed to check the configuration of plugin " .. name .. " err: " .. tostring(ok and reason or passed)
    end
    if type(conf._meta) ~= "table" then conf._meta = {} end
    local phases = {}
    for _, phase in ipairs(plugins.phases) do
        if type(plugin[phase]) == "function" then phases[#phases + 1] = phase end
    end
    return concat(phases, " ")
end

local scope = { conf_type = "route", conf_id = "test", conf_version = "1" }

--- Runs one phase for the request with the slot `at`: a status and a body when the plugin answers.
function _M.run(phase, at)
    local ctx = request.ctxs[at] or ctx_of.begin(at, scope)
    local code, body = plugin[phase](conf, ctx)
    if code == nil and body == nil then return end
    if type(code) ~= "number" then
        if body == nil then body = code end
        code = 200
    end
    if type(body) == "table" then
        body = encode(body) .. "\n"
    elseif body ~= nil then
        body = tostring(body)
    end
    return code, body
end

return _M
