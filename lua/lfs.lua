--- `lfs`: files and directories (LuaFileSystem 1.8's manual). Not open to uploaded functions. Functions return `nil, err, errno`.
--
-- `chdir` moves the whole gateway: all its workers are one process.

require("moongate.chunk").refuse_in_sandbox("lfs")

local ffi = require("ffi")
local native = require("moongate.native").lfs

local error, io, setmetatable, tostring, type = error, io, setmetatable, tostring, type

pcall(ffi.cdef, "int fileno(void *);")

local _M = { _VERSION = "LuaFileSystem 1.8.0" }

local function attributes(path, request, follow)
    local all, err, code = native.attributes(path, follow)
    if not all then return nil, "cannot obtain information from file '" .. path .. "': " .. err, code end
    if request == nil then return all end
    if type(request) == "table" then
        for name, value in pairs(all) do request[name] = value end
        return request
    end
    if all[request] == nil and request ~= "target" then error("invalid attribute name '" .. tostring(request) .. "'", 3) end
    return all[request]
end

--- @param path string @param request string?: one attribute's name; or table, to be filled
-- @return a table of dev, ino, mode, nlink, uid, gid, rdev, access, modification, change, size, permissions, blocks, blksize
function _M.attributes(path, request)
    local result, err, code = attributes(path, request, true)
    return result, err, code
end

--- As `attributes`, of a link itself: with `target`.
function _M.symlinkattributes(path, request)
    local result, err, code = attributes(path, request, false)
    return result, err, code
end

--- Changes the working directory of the whole process. @return true
function _M.chdir(path)
    local ok, err, code = native.chdir(path)
    if not ok then return nil, "Unable to change working directory to '" .. path .. "'\n" .. err .. "\n", code end
    return true
end

_M.currentdir, _M.mkdir, _M.rmdir, _M.touch = native.currentdir, native.mkdir, native.rmdir, native.touch

local dir_mt = { __index = {} }

--- The next name, or nil.
function dir_mt.__index:next()
    local names = self.names
    if not names then error("closed directory", 2) end
    self.at = self.at + 1
    local name = names[self.at]
    if not name then self.names = nil end
    return name
end

function dir_mt.__index:close()
    self.names = nil
end

--- for name in lfs.dir(path): raises when it cannot be read.
function _M.dir(path)
    local names, err = native.list(path)
    if not names then error("cannot open " .. path .. ": " .. err, 2) end
    return dir_mt.__index.next, setmetatable({ names = names, at = 0 }, dir_mt)
end

local function descriptor(file, name)
    if io.type(file) ~= "file" then error(name .. ": not a file", 3) end
    return ffi.C.fileno(file)
end

--- Locks a region of an open file. @param mode "r" or "w" @return true
function _M.lock(file, mode, start, length)
    return native.lock(descriptor(file, "lock"), mode, start, length)
end

--- Frees a region. @return true
function _M.unlock(file, start, length)
    return native.lock(descriptor(file, "unlock"), "u", start, length)
end

--- There is one mode here. @return true, "binary"
function _M.setmode(file, mode)
    descriptor(file, "setmode")
    if mode ~= "binary" and mode ~= "text" then error("bad argument #2 to 'setmode' (invalid option '" .. tostring(mode) .. "')", 2) end
    return true, "binary"
end

--- @param symlink boolean?: a symbolic link instead of a hard one @return true
function _M.link(old, new, symlink)
    return native.link(old, new, symlink)
end

local lock_mt = { __index = {} }

--- Gives the directory's lock back.
function lock_mt.__index:free()
    if self.path then os.remove(self.path) end
    self.path = nil
    return true
end

--- Makes `lockfile.lfs` in a directory. @param seconds_stale number?: an older lock is taken over @return an object with `free`
function _M.lock_dir(path, seconds_stale)
    local name = path .. "/lockfile.lfs"
    local ok, err, code = native.link("lock", name, true)
    if not ok and seconds_stale then
        local made = native.attributes(name, false)
        if made and os.time() - made.modification > seconds_stale then
            os.remove(name)
            ok, err, code = native.link("lock", name, true)
        end
    end
    if not ok then return nil, err, code end
    return setmetatable({ path = name }, lock_mt)
end

return _M
