--- What a thread of `ngx.run_worker_thread` does for each task: src/lua/ngx/worker_thread.rs calls it.

local error, format, pcall, type = error, string.format, pcall, type

local function run(module, name, ...)
    local loaded = require(module)
    local f = type(loaded) == "table" and loaded[name]
    if type(f) ~= "function" then error(format("module '%s' has no function '%s'", module, name), 0) end
    return f(...)
end

return { run = function(...) return pcall(run, ...) end }
