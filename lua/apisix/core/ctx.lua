--- `core.ctx`: the plugins' context. The gateway makes it; `ctx.var` reads and writes variables.
--
-- What `ngx.var` does not let be written (`ctx.var.remote_addr = "…"`) stays with `ctx.var`, for the rest of the request; nil takes it
-- away again. A name that is no string raises "invalid argument, expect string value". `ctx.var["post_arg.x"]` of a JSON body is a
-- boolean, number, string or table, as the body has it: an array where the path has a star.
local error, type = error, type
local IN_FUNCTIONS = require("moongate.native").purpose == "functions"

local _M = {}

--- Gives `ctx` its `var`. The contexts that the gateway makes have it already.
function _M.set_vars_meta(ctx)
    if not ctx.var then
        ctx.var = require("moongate.ctx").var(ctx)
    end
    return ctx
end

--- Returns what `set_vars_meta` took: nothing here, where a context's tables are reused as a whole.
function _M.release_vars() end

--- Adds a variable to `ctx.var`: `getter(ctx)` gives its value. `opts.no_cacheable`: it is asked for each time.
function _M.register_var(name, getter, opts)
    if IN_FUNCTIONS then
        error("register_var is not open to functions: it would serve all of them", 2)
    end
    if type(getter) ~= "function" then
        error("the getter of registered var should be a function", 2)
    end
    require("moongate.ctx").register_var(name, getter, opts)
end

return _M
