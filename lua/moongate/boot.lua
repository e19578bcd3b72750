--- The first chunk of every VM: coroutines that pass host waits outwards, the loader of packed modules, what
--- OpenResty's LuaJIT has and stock LuaJIT lacks.
--
-- For those who write Lua on top of this:
--
-- * `require("moongate.native")` is the table of host functions (docs/lua-api.md lists them): `native.<area>.<name>`
--   are functions, `native.fast.<name>` C function pointers of LuaJIT's FFI. Pass FFI functions plain strings and
--   numbers; they neither raise nor yield.
-- * `require("moongate.request")` keeps the tables of the request that runs: `ctx()` is the plugins' `ctx`
--   (`api_ctx`), `ngx_ctx()` is `ngx.ctx`; both nil or fresh outside of a request.
-- * Modules are looked up in `package.preload`, on the user's path (`apisix.extra_lua_path`, <prefix>/plugins,
--   <prefix>/lua), then among the packed ones (`lua/**`; `plugins/x.lua` is `apisix.plugins.x`). `ngx.*` is always packed.
-- * `ctx` is a table per request: `ctx.var` (read and write variables, also `http_*`, `arg_*`, `cookie_*`), and, on
--   demand, `ctx.matched_route`, `ctx.matched_upstream`, `ctx.service`, `ctx.route_id`, `ctx.route_name`,
--   `ctx.service_id`, `ctx.service_name`, `ctx.conf_type`, `ctx.conf_id`, `ctx.conf_version`, `ctx.consumer`,
--   `ctx.consumer_name`, `ctx.consumer_group_id`, `ctx.consumer_ver`, `ctx.credential_id`, `ctx.curr_req_matched`,
--   `ctx.plugins`; from before_proxy on `ctx.upstream_conf`, `ctx.upstream_key`, `ctx.upstream_version`, `ctx.upstream_scheme`; once
--   a node was picked `ctx.picked_server`, `ctx.balancer_ip`, `ctx.balancer_port`, `ctx.balancer_try_count`. A plugin may set any
--   field; `ctx.upstream_id` set in rewrite or access chooses the upstream, `ctx.upstream_conf` (also in before_proxy) is one,
--   and `ctx.picked_server` set in before_proxy is the node.
-- * A yield passes pcall, xpcall, metamethods and iterators, not string.gsub callbacks, table.sort or require.

local native = ...

package.loaded["moongate.native"] = native

local ffi = require("ffi")
local ipairs, next, pairs, select, setmetatable, tostring, type =
    ipairs, next, pairs, select, setmetatable, tostring, type

-- FFI functions: Rust gives {address, signature}; the cast happens once, here.
for name, pair in pairs(native.fast) do
    local signature = pair[2]:gsub("%(", "(*)(", 1)
    native.fast[name] = ffi.cast(signature, pair[1])
end

-- What OpenResty's LuaJIT has built in.
local function preload(name, module)
    package.preload[name] = function() return module end
end

local new_tab, clear_tab = require("table.new"), require("table.clear")
table.new, table.clear = new_tab, clear_tab

function table.nkeys(t)
    local n = 0
    for _ in next, t do n = n + 1 end
    return n
end

function table.isempty(t)
    return next(t) == nil
end

function table.isarray(t)
    local n = 0
    for key in next, t do
        if type(key) ~= "number" or key <= 0 or key % 1 ~= 0 then return false end
        n = n + 1
    end
    return true
end

function table.clone(t)
    local copy = {}
    for key, value in next, t do copy[key] = value end
    return copy
end

for _, name in ipairs({ "nkeys", "isempty", "isarray", "clone" }) do
    preload("table." .. name, table[name])
end

-- thread.exdata(value) stores one value for the running coroutine; resty.core keeps the request there.
local exdata = setmetatable({}, { __mode = "k" })
local raw_running = coroutine.running
preload("thread.exdata", function(...)
    local key = raw_running() or exdata
    if select("#", ...) == 0 then return exdata[key] end
    exdata[key] = ...
end)

-- User coroutines. A host function that waits yields the marker; each resumer hands that on to its own resumer, until
-- the driver has it, and passes the results back in.
local marker = native.marker
local raw_create, raw_resume, raw_yield, raw_status =
    coroutine.create, coroutine.resume, coroutine.yield, coroutine.status

-- A light thread lives while it waits for something, and until somebody has waited for it.
local light = native.thread.state

-- Those that are suspended since a coroutine which they have resumed waits.
local resumers = setmetatable({}, { __mode = "k" })

function coroutine.status(co)
    local status = raw_status(co)
    if status == "suspended" or status == "dead" then
        local state = light(co)
        if state == 1 and status == "suspended" then return resumers[co] and "normal" or "running" end
        if state == 2 then return "zombie" end
    end
    return status
end

local pass

local function pass_on(co, own, ...)
    resumers[own] = nil
    return pass(co, raw_resume(co, ...))
end

function pass(co, ok, first, ...)
    if ok and first == marker and raw_status(co) == "suspended" then
        local own = raw_running()
        resumers[own] = true
        return pass_on(co, own, raw_yield(marker))
    end
    return ok, first, ...
end

function coroutine.resume(co, ...)
    return pass(co, raw_resume(co, ...))
end

local function unwrap(ok, ...)
    if ok then return ... end
    error((...), 0)
end

function coroutine.wrap(f)
    local co = raw_create(f)
    return function(...)
        return unwrap(pass(co, raw_resume(co, ...)))
    end
end

-- Modules: the user's path, <prefix>/lua, then the packed ones. A plugin may also be an uploaded source, which wins, or
-- <prefix>/plugins/<name>.lua.
local prefix = native.prefix
if native.purpose == "functions" then
    package.path, package.cpath = "", ""
else
    local own = prefix ~= "" and prefix .. "/lua/?.lua;" .. prefix .. "/lua/?/init.lua;" or ""
    -- As nginx's lua_package_path: `;;` stands for the default, `$prefix` for the prefix.
    local function with_default(path, default)
        if path == "" then return default end
        path = path:gsub("%$prefix", function() return prefix end):gsub("%${prefix}", function() return prefix end)
        return (path:gsub(";;", function() return ";" .. default .. ";" end, 1))
    end
    package.path = native.lua_path .. ";" .. with_default(native.package_path, own .. package.path)
    package.cpath = native.lua_cpath .. ";" .. with_default(native.package_cpath, package.cpath)
end

local sources, packed = native.plugin_sources, native.packed

local function plugin_searcher(name)
    local plugin = name:match("^apisix%.plugins%.(.+)$")
    local source = plugin and sources[plugin]
    if type(source) == "string" then error(source, 0) end
    if source then return source end
end

local function plugin_file_searcher(name)
    local plugin = name:match("^apisix%.plugins%.(.+)$")
    if not plugin or prefix == "" or native.purpose == "functions" then return nil end
    local file = prefix .. "/plugins/" .. plugin:gsub("%.", "/") .. ".lua"
    local handle = io.open(file, "rb")
    if not handle then return "\n\tno file '" .. file .. "'" end
    local text = handle:read("*a")
    handle:close()
    local chunk, err = loadstring(text, "@plugins/" .. plugin:gsub("%.", "/") .. ".lua")
    if not chunk then error(err, 0) end
    return chunk
end

local function packed_searcher(name)
    local chunk = packed(name)
    return chunk or "\n\tno packed module '" .. name .. "'"
end

-- What lua-resty-core has of nginx itself comes from here whatever the path says: another copy, such as the one that
-- Debian puts beside plain libraries, speaks to nginx's insides.
local function ngx_searcher(name)
    return name:find("^ngx%.") and packed(name) or nil
end

table.insert(package.loaders, 2, ngx_searcher)
table.insert(package.loaders, 3, plugin_searcher)
table.insert(package.loaders, 5, plugin_file_searcher)
table.insert(package.loaders, 6, packed_searcher)

if native.packed("moongate.ngx") then
    -- Before any library keeps what it replaces.
    if native.purpose == "functions" then require("moongate.bounds").install() else require("moongate.files") end
    require("moongate.ngx")
    if native.purpose == "plugins" then require("moongate.blocking") end
end

-- A request that makes a new global variable shares it with all others by accident, most of the time.
local phase = native.fast.phase
-- The numbers of init_worker_by_lua, and from which on all are of a VM's start and end, where nobody races (src/exchange).
local INIT_WORKER, INIT = 0, 19

setmetatable(_G, {
    __newindex = function(globals, name, value)
        rawset(globals, name, value)
        local number = phase()
        if number ~= INIT_WORKER and number < INIT and ngx.log then
            ngx.log(ngx.WARN, "writing a global Lua variable ('", tostring(name), "') which may lead to race conditions ",
                "between concurrent requests, so prefer the use of 'local' variables\n", debug.traceback("", 2))
        end
    end,
})
