--- `pl.path`: names of files (Penlight's manual). Not open to uploaded functions.

require("moongate.chunk").refuse_in_sandbox("pl.path")

local lfs = require("lfs")

local find, gsub, ipairs, match, select, sub = string.find, string.gsub, ipairs, string.match, select, string.sub

local _M = {
    is_windows = false, sep = "/", dirsep = ":", dir = lfs.dir, mkdir = lfs.mkdir, rmdir = lfs.rmdir, chdir = lfs.chdir,
    currentdir = lfs.currentdir, attrib = lfs.attributes, link_attrib = lfs.symlinkattributes,
}

function _M.isdir(name)
    return lfs.attributes(name, "mode") == "directory"
end

function _M.isfile(name)
    return lfs.attributes(name, "mode") == "file"
end

function _M.islink(name)
    return lfs.symlinkattributes(name, "mode") == "link"
end

function _M.getsize(name)
    return (lfs.attributes(name, "size"))
end

--- The name when there is such a file or directory, or nil.
function _M.exists(name)
    return lfs.attributes(name, "mode") ~= nil and name or nil
end

function _M.getatime(name)
    return (lfs.attributes(name, "access"))
end

function _M.getmtime(name)
    return (lfs.attributes(name, "modification"))
end

function _M.getctime(name)
    return (lfs.attributes(name, "change"))
end

--- directory, name
function _M.splitpath(name)
    local dir, base = match(name, "^(.*)/([^/]*)$")
    if not dir then return "", name end
    return dir, base
end

--- name, extension with its dot
function _M.splitext(name)
    local stem, extension = match(name, "^(.-[^/.][^/]-)(%.[^./]*)$")
    if not stem then stem, extension = match(name, "^(.*[^/])(%.[^./]*)$") end
    if not stem then return name, "" end
    return stem, extension
end

function _M.isabs(name)
    return sub(name, 1, 1) == "/"
end

--- Parts put together; an absolute one starts again.
function _M.join(first, ...)
    local all = first
    for i = 1, select("#", ...) do
        local part = (select(i, ...))
        if _M.isabs(part) then
            all = part
        elseif all == "" or sub(all, -1) == "/" then
            all = all .. part
        else
            all = all .. "/" .. part
        end
    end
    return all
end

--- A name without `.`, `..` and double slashes.
function _M.normpath(name)
    local parts, absolute = {}, _M.isabs(name)
    for part in name:gmatch("[^/]+") do
        if part == ".." and #parts > 0 and parts[#parts] ~= ".." then
            parts[#parts] = nil
        elseif part ~= "." and not (part == ".." and absolute) then
            parts[#parts + 1] = part
        end
    end
    local all = (absolute and "/" or "") .. table.concat(parts, "/")
    return all == "" and "." or all
end

--- From the working directory, or from `from`.
function _M.abspath(name, from)
    name = gsub(name, "(.)/+$", "%1")
    if not _M.isabs(name) then name = _M.join(from or lfs.currentdir(), name) end
    return _M.normpath(name)
end

function _M.normcase(name)
    return name
end

function _M.dirname(name)
    return (_M.splitpath(name))
end

function _M.basename(name)
    return (select(2, _M.splitpath(name)))
end

function _M.extension(name)
    return (select(2, _M.splitext(name)))
end

--- A name as seen from a directory.
function _M.relpath(name, from)
    local function parts_of(path)
        local parts = {}
        for part in _M.abspath(path):gmatch("[^/]+") do parts[#parts + 1] = part end
        return parts
    end
    local to, start, same = parts_of(name), parts_of(from or lfs.currentdir()), 0
    while same < #to and to[same + 1] == start[same + 1] do same = same + 1 end
    local parts = {}
    for _ = same + 1, #start do parts[#parts + 1] = ".." end
    for i = same + 1, #to do parts[#parts + 1] = to[i] end
    return #parts == 0 and "." or table.concat(parts, "/")
end

--- The longest directory that two names have in common.
function _M.common_prefix(a, b)
    local common = {}
    local other = b:gmatch("[^/]+")
    for part in a:gmatch("[^/]+") do
        if other() ~= part then break end
        common[#common + 1] = part
    end
    return (_M.isabs(a) and "/" or "") .. table.concat(common, "/")
end

--- `~` is the home directory.
function _M.expanduser(name)
    if not find(name, "^~") then return name end
    local home = os.getenv("HOME")
    if not home then return nil, "HOME is not set" end
    return home .. sub(name, 2)
end

function _M.tmpname()
    return os.tmpname()
end

--- The file of a module on `package.path`. @return path; nil, err
function _M.package_path(module)
    local name = gsub(module, "%.", "/")
    for _, pattern in ipairs({ package.path, package.cpath }) do
        for template in pattern:gmatch("[^;]+") do
            local path = gsub(template, "?", (gsub(name, "%%", "%%%%")))
            if _M.isfile(path) then return path end
        end
    end
    return nil, "cannot find module on path"
end

return _M
