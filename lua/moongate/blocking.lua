--- Tells who holds a worker: file and process functions of Lua's own wait in the kernel, and nothing else of the worker runs
-- meanwhile. Each call is measured, and one that takes too long is a line of error.log with the place that called.

local now = require("moongate.native").fast.now
local phase = require("moongate.native").fast.phase

local debug, ipairs = debug, ipairs
local format = string.format

-- Seconds: ten times what a read from the page cache takes at its worst, a tenth of what users notice.
local LIMIT = 0.01

local function report(name, began)
    local held = now() - began
    -- At the start of a VM nobody waits.
    if held < LIMIT or phase() == 0 then return end
    -- Above this: `done`, the wrapper is gone by its tail call.
    local caller = debug.getinfo(3, "Sl")
    local where = caller and format("%s:%d", caller.short_src, caller.currentline) or "?"
    ngx.log(ngx.WARN, format("%s held the worker for %d ms; called at %s", name, held * 1000, where))
end

local function done(name, began, ...)
    report(name, began)
    return ...
end

local function measured(name, f)
    return function(...)
        local began = now()
        return done(name, began, f(...))
    end
end

local function measure(module, prefix, names)
    for _, name in ipairs(names) do
        if module[name] then module[name] = measured(prefix .. name, module[name]) end
    end
end

measure(io, "io.", { "open", "popen", "read", "write", "close", "flush" })
measure(os, "os.", { "execute", "rename", "remove", "tmpname" })
-- The methods of files.
measure(debug.getmetatable(io.stdout).__index, "file:", { "read", "write", "close", "flush", "seek" })

return { measured = measured }
