--- Uploaded functions: compiled in an environment without files, processes, FFI, the debug library or this VM's insides. Those
-- that an administrator trusts get the globals of plugins.

local native = require("moongate.native")
local assert, error, ipairs, next, pairs, pcall, rawset, setfenv, setmetatable, tostring, type =
    assert, error, ipairs, next, pairs, pcall, rawset, setfenv, setmetatable, tostring, type
local real_require, real_loadstring = require, loadstring
local byte, concat, find, getmetatable, rawget = string.byte, table.concat, string.find, getmetatable, rawget

local _M = {}

local trusted = native.purpose == "trusted"

-- Lua's own libraries, as `require` would give them.
local own_libraries = { _G = true, string = true, table = true, math = true, bit = true, coroutine = true, os = true, io = true,
    debug = true, package = true, jit = true, ffi = true }

-- Takes modules out of a table of modules, and gives them: APISIX's, or all that a function may have changed.
local function taken(modules, all)
    local out = {}
    for name, module in pairs(modules) do
        local kept = own_libraries[name] or find(name, "^moongate") or find(name, "^jit%.")
        if find(name, "^apisix") or all and not kept then out[name], modules[name] = module, nil end
    end
    return out
end

-- A module for this file alone, on top of the real ones of APISIX: what reads the process's environment is gone again before a
-- function can require it.
local function load_alone(name)
    local loaded, preload = taken(package.loaded, true), taken(package.preload)
    local ok, module = pcall(real_require, name)
    taken(package.loaded, true)
    for known, other in pairs(loaded) do package.loaded[known] = other end
    for known, other in pairs(preload) do package.preload[known] = other end
    if not ok then return nil, module end
    return module
end

local secret = trusted and real_require("apisix.secret") or assert(load_alone("apisix.secret"))

-- Modules that open what the sandbox closes, and what only a plugin needs.
local forbidden = { ffi = true, jit = true, io = true, os = true, debug = true, package = true,
    -- Its pointers go anywhere in memory.
    ["string.buffer"] = true, ["apisix.core.io"] = true, ["apisix.core.os"] = true,
    ["apisix.core.env"] = true, ["apisix.core.data_encryption"] = true, ["apisix.consumer"] = true, ["apisix.secret"] = true,
    ["apisix.secret.vault"] = true, ["apisix.secret.aws"] = true, ["apisix.secret.gcp"] = true, ["apisix.core.etcd"] = true,
    ["apisix.core.config"] = true, prometheus = true, ["apisix.core.config_etcd"] = true, ["apisix.core.config_yaml"] = true, lfs = true,
    ["resty.shell"] = true, ["resty.signal"] = true, ["ngx.pipe"] = true, ["pl.path"] = true, ["pl.file"] = true,
    ["pl.dir"] = true }

-- Of APISIX's modules, those that need nothing but what a function has anyway. The others run the gateway's own work: plugins, what is
-- stored, what is written.
local open_utils = { ["apisix.utils.content-decode"] = true, ["apisix.utils.redis"] = true,
    ["apisix.utils.rediscluster"] = true, ["apisix.utils.redis-schema"] = true, ["apisix.utils.rfc5424"] = true,
    ["apisix.utils.router"] = true }

local function is_closed(name)
    if forbidden[name] or find(name, "^moongate") or find(name, "^jit%.") then return true end
    return find(name, "^apisix") and name ~= "apisix.core" and not find(name, "^apisix%.core%.") and not open_utils[name]
end

-- Copies: functions of one VM share nothing that they could change for each other. What a library keeps to itself it shares; what
-- it shows, each function has copies of, made when it first asks.

-- The marks that cjson knows arrays by are everybody's, and cannot be changed.
local cjson = require("cjson")
local EVERYBODYS = "this table is everybody's: it cannot be changed"
-- Tables that take no writes, and why.
local frozen = setmetatable({ [cjson.array_mt] = EVERYBODYS, [cjson.empty_array_mt] = EVERYBODYS }, { __mode = "k" })

local function freeze(mark)
    local function refuse() error(EVERYBODYS, 2) end
    setmetatable(mark, { __newindex = refuse, __metatable = false })
end

-- Tables of `ngx` and `ndk`, whose metatables look at nothing but the name that is asked for: a copy works by the same one.
local magic = {}

local function note_magic(t)
    if magic[t] then return end
    magic[t] = true
    for _, value in next, t do
        if type(value) == "table" then note_magic(value) end
    end
end

local copy_of

-- What stands behind a library's table, for a copy of it.
local function behind(t, mt, memo)
    local own = {}
    for key, value in next, mt do
        if key ~= "__newindex" and key ~= "__metatable" then own[key] = value end
    end
    local index = mt.__index
    if type(index) == "table" then
        own.__index = copy_of(index, memo)
    elseif index then
        own.__index = function(self, key)
            local value = t[key]
            if type(value) ~= "table" then return value end
            value = copy_of(value, memo)
            rawset(self, key, value)
            return value
        end
    end
    if mt.__call then own.__call = function(_, ...) return t(...) end end
    return own
end

-- @param t table: of a library @param memo table: original -> copy, of one function @return table: its copy, with copies of all in it
function copy_of(t, memo)
    local known = memo[t]
    if known then return known end
    if frozen[t] then return t end
    local copy = {}
    -- Both ways: a copy is not copied again.
    memo[t], memo[copy] = copy, copy
    for key, value in next, t do
        copy[key] = type(value) == "table" and copy_of(value, memo) or value
    end
    local mt = getmetatable(t)
    if magic[t] then
        setmetatable(copy, mt)
    elseif type(mt) == "table" then
        setmetatable(copy, behind(t, mt, memo))
    end
    return copy
end

local shared = { os = { time = os.time, date = os.date, clock = os.clock, difftime = os.difftime } }

for _, name in ipairs({ "assert", "error", "ipairs", "next", "pairs", "pcall", "print", "rawequal", "rawget", "rawlen",
    "select", "tonumber", "tostring", "type", "unpack", "xpcall", "_VERSION", "string", "table", "math", "bit", "coroutine" }) do
    shared[name] = _G[name]
end

-- Text only.
local function text_of(chunk)
    if type(chunk) == "function" then
        local parts = {}
        for part in chunk do
            if part == "" then break end
            parts[#parts + 1] = part
        end
        chunk = concat(parts)
    end
    if type(chunk) ~= "string" then error("a chunk is a string or a function that gives its parts", 3) end
    return chunk
end

-- The globals of one function.
local function new_env()
    -- A copy lasts as long as the function has it.
    local own, memo, modules = {}, setmetatable({}, { __mode = "kv" }), {}
    -- Those that the function has made itself.
    local metatables = setmetatable({}, { __mode = "k" })

    local function load(chunk, name)
        chunk = text_of(chunk)
        if byte(chunk, 1) == 27 then return nil, "bytecode is refused" end
        local f, err = real_loadstring(chunk, name)
        return f and setfenv(f, own), err
    end
    own._G, own.load, own.loadstring = own, load, load

    function own.require(name)
        if type(name) ~= "string" or is_closed(name) then
            error("module '" .. tostring(name) .. "' is not open to functions", 2)
        end
        -- The sandbox's own, and not those that everybody's methods are in.
        if own_libraries[name] then return own[name] end
        local module = modules[name]
        if module == nil then
            module = real_require(name)
            if type(module) == "table" then module = copy_of(module, memo) end
            modules[name] = module
        end
        return module
    end

    function own.setmetatable(t, mt)
        if mt and not metatables[mt] then metatables[mt] = true end
        return setmetatable(t, mt)
    end

    function own.getmetatable(value)
        -- A string's metatable is everybody's.
        if type(value) ~= "table" then return nil end
        local mt = getmetatable(value)
        if type(mt) ~= "table" or metatables[mt] then return mt end
        -- Nor are Lua's own libraries, which some modules stand on.
        local index = rawget(mt, "__index")
        for name in next, own_libraries do
            if index and index == _G[name] then return nil end
        end
        return copy_of(mt, memo)
    end

    function own.rawset(t, key, value)
        if frozen[t] then error(frozen[t], 2) end
        return rawset(t, key, value)
    end

    -- What is asked for stays: the next look finds it in the table itself.
    local function first(_, name)
        local value = shared[name]
        if value == nil then return nil end
        if type(value) == "table" then value = copy_of(value, memo) end
        rawset(own, name, value)
        return value
    end
    return setmetatable(own, { __index = first })
end

-- Writes that do not ask a table's metatable.
local function guarded(f)
    return function(t, ...)
        if frozen[t] then error(frozen[t], 2) end
        return f(t, ...)
    end
end

local function close_sandbox()
    string.dump = nil
    for _, name in ipairs({ "insert", "remove", "sort", "clear" }) do table[name] = guarded(table[name]) end
    local clear = table.clear
    package.loaded["table.clear"] = clear
    package.preload["table.clear"] = function() return clear end
    -- In the library itself: that is where a string finds its methods.
    for name, f in pairs(require("moongate.pattern")) do string[name] = f end
    shared.ngx, shared.ndk = ngx, ndk
    note_magic(ngx)
    note_magic(ndk)
    for mark in next, frozen do freeze(mark) end
    -- It takes no writes itself.
    frozen[ndk.set_var] = EVERYBODYS
    if package.preload then
        for name in pairs(forbidden) do
            -- The secrets' managers are `use_manager`'s; functions cannot require them.
            if name:find("^apisix") and not name:find("^apisix%.secret%.") then
                package.preload[name] = function() return {} end
            end
        end
    end
end

if not trusted then close_sandbox() end

-- env: ------------------------------------------------------------------------------------------------------------

-- Makes the manager that a reference names ready for `apisix.secret`, which finds it among the loaded modules.
local function use_manager(text)
    local name = not trusted and text:match("^%$[sS][eE][cC][rR][eE][tT]://([%w_-]+)/")
    local module = name and "apisix.secret." .. name
    -- One that does not exist is `apisix.secret`'s to report.
    if module and not package.loaded[module] then package.loaded[module] = load_alone(module) end
end

--- The table that a function knows as `env`: reading a name gives its text, of a reference the secret that it names; nil, and a
-- line of the log, when that cannot be had.
local function env_of(values)
    for _, text in pairs(values) do use_manager(text) end
    local function get(_, name)
        local text = values[name]
        if text == nil or not secret.is_reference(text) then return text end
        local found, err = secret.fetch_known(text)
        if found == nil then
            ngx.log(ngx.ERR, "failed to fetch secret value of env.", name, ": ", secret.reason(err))
        end
        return found
    end
    local function each(self)
        local name
        return function()
            name = next(values, name)
            if name ~= nil then return name, self[name] end
        end
    end
    local READ_ONLY = "env is read-only"
    local function refuse() error(READ_ONLY, 2) end
    local env = setmetatable({}, { __index = get, __newindex = refuse, __pairs = each, __metatable = false })
    if not trusted then frozen[env] = READ_ONLY end
    return env
end

--- Globals as functions have them, nobody else's: for libraries that compile text.
function _M.globals()
    return trusted and _G or new_env()
end

--- Compiles a function's text under its name; what to call per request, or nil and why not. `values`: names and texts of its `env`.
function _M.load(name, source, values)
    local own = trusted and setmetatable({}, { __index = _G }) or new_env()
    own._G = own
    own.env = env_of(values or {})
    local chunk, err = real_loadstring(source, "@functions/" .. name .. ".lua")
    if not chunk then return nil, err end
    setfenv(chunk, own)
    return chunk
end

--- What a chunk that ran for the first time has come to: the function to call from now on; nil: the chunk itself.
function _M.handler(returned)
    if type(returned) == "function" then return returned end
    if type(returned) == "table" and type(returned.handler) == "function" then return returned.handler end
end

--- Makes a callable of a chunk. The chunk runs in the first request, where `ngx.*` works; when it returns a function,
-- that is called, then and from then on.
function _M.callable(chunk)
    local handler
    return function(ctx)
        if handler then return handler(ctx) end
        local first, second = chunk(ctx)
        handler = _M.handler(first)
        if handler then return handler(ctx) end
        return first, second
    end
end

return _M
