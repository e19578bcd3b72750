--- What nginx.conf calls of `require("apisix")` in APISIX, phase by phase. The gateway does without, until somebody replaces one of these
--- functions (the module of `apisix.lua_module_hook`, a plugin): then what it stands for runs when the replacement calls the original.

local ctx_of = require("moongate.ctx")
local request = require("moongate.request")
local begin, ctxs = ctx_of.begin, request.ctxs
local slot = require("moongate.native").fast.slot
local error, ipairs, pairs, setmetatable = error, ipairs, pairs, setmetatable

local _M = {}

-- Of requests, and which function of `moongate.run` each stands for.
local of_requests = { http_access_phase = "rewrite", http_header_filter_phase = "header_filter",
    http_body_filter_phase = "body_filter", http_log_phase = "log" }
-- Of a VM's start and end.
local of_vms = { http_init = true, http_init_worker = true, http_exit_worker = true, stream_init = true, stream_init_worker = true }
--- Those that stand for what is never Lua here: nothing comes by them.
_M.not_called = { "http_ssl_phase", "http_ssl_client_hello_phase", "http_balancer_phase", "http_admin", "http_control",
    "stream_preread_phase", "stream_balancer_phase", "stream_log_phase" }

-- function -> slot of a request, or 0 -> what its original has to do. What a request that was cut off leaves here goes with its coroutine.
local pending = {}

local function original_of(name)
    local waiting = setmetatable({}, { __mode = "v" })
    pending[name] = waiting
    return function()
        local at = of_requests[name] and slot() or 0
        local run = waiting[at]
        -- A second call does nothing.
        waiting[at] = nil
        if run then run() end
    end
end

local originals = {}
for name in pairs(of_requests) do originals[name] = original_of(name) end
for name in pairs(of_vms) do originals[name] = original_of(name) end
for _, name in ipairs(_M.not_called) do originals[name] = function() end end

--- The functions by name, as they are until somebody replaces them.
_M.originals = originals

--- Whether somebody has replaced a function that the gateway goes through.
function _M.is_replaced(name)
    return (of_requests[name] or of_vms[name]) and require("apisix")[name] ~= originals[name]
end

--- Calls what stands for a function of a VM's start or end now. Its original does `run`, once.
function _M.go_through(name, run)
    pending[name][0] = run
    require("apisix")[name]()
    pending[name][0] = nil
end

local function nothing() end

-- The function of `moongate.run` as the way through the replacement to it.
local function detour(name, phase, run)
    local apisix, waiting = require("apisix"), pending[name]
    return function(plan, at, pause)
        if not ctxs[at] then begin(at, plan.scope) end
        local reached, code, body, is_json = false, nil, nil, nil
        local function original()
            if phase == "rewrite" or plan[phase] then code, body, is_json = run(plan, at, pause) end
            -- Not where it has raised, whoever catches that, and not before it has come back.
            reached = true
        end
        waiting[at] = original
        apisix[name]()
        waiting[at] = nil
        -- One of the plugins that have not run may be what keeps strangers out.
        if not reached and phase == "rewrite" then
            error(name .. " was replaced by a function that has not called the original, or not to its end", 0)
        end
        return code, body, is_json
    end
end

--- Has `run` (`moongate.run`) take the way through what is replaced now: the phases that every request has from here on, by name.
function _M.install(run)
    local through = {}
    for name, phase in pairs(of_requests) do
        if _M.is_replaced(name) then
            run[phase] = detour(name, phase, run[phase])
            through[phase] = true
        end
    end
    return through
end

--- Calls what stands for the start of a VM, before plugins are loaded. `with_streams`: the gateway serves streams, too.
function _M.start(with_streams)
    if _M.is_replaced("http_init") then _M.go_through("http_init", nothing) end
    if with_streams and _M.is_replaced("stream_init") then _M.go_through("stream_init", nothing) end
end

return _M
