--- Compiles Lua text for libraries: uploaded functions get no more by way of a library than they have themselves.

local native = require("moongate.native")
local loadstring, setfenv = loadstring, setfenv

local _M = {}

local sandboxed = native.purpose == "functions"

--- Whether this VM runs uploaded functions: no files, processes or FFI for them.
_M.sandboxed = sandboxed

--- The globals of who calls: the sandbox's or the VM's.
function _M.globals()
    return sandboxed and require("moongate.functions").globals() or _G
end

--- Compiles text, never bytecode.
-- @param text string @param name string?: of the chunk @param env table?: its globals
-- @return function; nil, err
function _M.load(text, name, env)
    if text:byte(1) == 27 then return nil, "bytecode is refused" end
    local f, err = loadstring(text, name)
    if not f then return nil, err end
    return setfenv(f, env or _M.globals())
end

--- Raises in a VM of uploaded functions. @param what string: what is refused
function _M.refuse_in_sandbox(what)
    if sandboxed then error("module '" .. what .. "' is not open to functions", 3) end
end

return _M
