--- Uploaded functions: compiled in an environment without files, processes, FFI, the debug library or this VM's insides.

local error, ipairs, pairs, setfenv, setmetatable, type = error, ipairs, pairs, setfenv, setmetatable, type
local real_require, real_loadstring = require, loadstring

local _M = {}

-- Modules that open what the sandbox closes, and what only a plugin needs.
local forbidden = { ffi = true, jit = true, io = true, os = true, debug = true, package = true,
    ["jit.util"] = true, ["jit.opt"] = true, ["apisix.core.io"] = true, ["apisix.core.os"] = true,
    ["apisix.core.env"] = true, ["apisix.core.data_encryption"] = true, ["apisix.consumer"] = true, ["apisix.secret"] = true,
    ["apisix.secret.vault"] = true, ["apisix.secret.aws"] = true, ["apisix.secret.gcp"] = true, ["apisix.core.etcd"] = true,
    ["apisix.core.config"] = true, ["apisix.core.config_etcd"] = true, ["apisix.core.config_yaml"] = true, lfs = true,
    ["resty.shell"] = true, ["resty.signal"] = true, ["ngx.pipe"] = true, ["pl.path"] = true, ["pl.file"] = true,
    ["pl.dir"] = true }

local env

local function sandboxed_require(name)
    if type(name) ~= "string" or forbidden[name] or name:find("^moongate") then
        error("module '" .. tostring(name) .. "' is not open to functions", 2)
    end
    return real_require(name)
end

-- Text only, in the same environment.
local function sandboxed_load(chunk, name)
    if type(chunk) == "function" then
        local parts = {}
        for part in chunk do
            if part == "" then break end
            parts[#parts + 1] = part
        end
        chunk = table.concat(parts)
    end
    if chunk:byte(1) == 27 then return nil, "bytecode is refused" end
    local f, err = real_loadstring(chunk, name)
    return f and setfenv(f, env), err
end

local function copy(t)
    local c = {}
    for key, value in pairs(t) do c[key] = value end
    return c
end

local function make_env()
    local open = { require = sandboxed_require, loadstring = sandboxed_load, load = sandboxed_load,
        os = { time = os.time, date = os.date, clock = os.clock, difftime = os.difftime }, ngx = ngx,
        ndk = copy(ndk) }
    for _, name in ipairs({ "assert", "error", "ipairs", "next", "pairs", "pcall", "print", "rawequal", "rawget",
        "rawlen", "rawset", "select", "tonumber", "tostring", "type", "unpack", "xpcall", "_VERSION" }) do
        open[name] = _G[name]
    end
    open.setmetatable = setmetatable
    function open.getmetatable(value)
        -- A string's metatable is everybody's.
        if type(value) ~= "table" then return nil end
        return getmetatable(value)
    end
    for _, name in ipairs({ "string", "table", "math", "bit", "coroutine" }) do open[name] = copy(_G[name]) end
    open._G = open
    return open
end

string.dump = nil
-- In the library itself: that is where a string finds its methods.
for name, f in pairs(require("moongate.pattern")) do string[name] = f end
env = make_env()
if package.preload then
    for name in pairs(forbidden) do
        if name:find("^apisix") then package.preload[name] = function() return {} end end
    end
end

--- What functions have for globals: for libraries that compile text.
function _M.globals()
    return env
end

--- Compiles a function's text under its name; what to call per request, or nil and why not.
function _M.load(name, source)
    local own = setmetatable({}, { __index = env })
    own._G = own
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
