--- `pl.compat`: one Lua for all versions (Penlight's manual). In uploaded functions `load` has their globals; what runs programs,
-- reads files or looks into functions' environments is not there.

local chunk = require("moongate.chunk")

local _M = { lua51 = true, jit = true, jit52 = true, is_windows = false, dir_separator = "/" }

--- Compiles text. @param mode string?: "t" @param env table? @return function; nil, err
function _M.load(text, name, mode, env)
    if mode == "b" then return nil, "attempt to load a text chunk (mode is 'b')" end
    if type(text) == "function" then
        local parts = {}
        for part in text do
            if part == "" then break end
            parts[#parts + 1] = part
        end
        text = table.concat(parts)
    end
    return chunk.load(text, name, env)
end

_M.unpack = unpack

--- Says that something is old: in the log.
function _M.warn(...)
    ngx.log(ngx.WARN, ...)
end

if chunk.sandboxed then return _M end

_M.setfenv, _M.getfenv, _M.package_searchpath = setfenv, getfenv, package.searchpath

--- Runs a command. It holds up the worker: `resty.shell` does not. @return true or nil, exit code
function _M.execute(command)
    local ok, kind, code = os.execute(command)
    if type(ok) == "number" then return ok == 0, ok end
    return ok, code, kind
end

return _M
