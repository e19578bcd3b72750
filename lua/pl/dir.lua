--- `pl.dir`: directories (Penlight's manual). Not open to uploaded functions.

require("moongate.chunk").refuse_in_sandbox("pl.dir")

local file, lfs, List, path = require("pl.file"), require("lfs"), require("pl.List"), require("pl.path")

local ipairs, pcall, sort = ipairs, pcall, table.sort

-- Directories inside of directories that a walk follows.
local MAX_DEPTH = 100

local _M = { copyfile = file.copy, movefile = file.move, rmdir = path.rmdir, mkdir = path.mkdir }

-- The Lua pattern of a file mask: `*` and `?`.
local function pattern_of(mask)
    return "^" .. mask:gsub("[%%%.%^%$%(%)%[%]%+%-]", "%%%0"):gsub("%*", ".*"):gsub("%?", ".") .. "$"
end

--- Whether a file's name is of a mask.
function _M.fnmatch(name, mask)
    return name:find(pattern_of(mask)) ~= nil
end

--- The names of a list that are of a mask.
function _M.filter(names, mask)
    local pattern, found = pattern_of(mask), List()
    for _, name in ipairs(names) do
        if name:find(pattern) then found:append(name) end
    end
    return found
end

local function listed(dir, wanted, mask)
    dir = dir or "."
    local ok, next_name, object = pcall(lfs.dir, dir)
    if not ok then return nil, next_name end
    local found, pattern = List(), mask and pattern_of(mask)
    for name in next_name, object do
        if name ~= "." and name ~= ".." and (not pattern or name:find(pattern)) then
            local full = path.join(dir, name)
            if wanted(full) then found:append(full) end
        end
    end
    sort(found)
    return found
end

--- The files of a directory, of a mask. @return list of paths; nil, err
function _M.getfiles(dir, mask)
    return listed(dir, path.isfile, mask)
end

function _M.getdirectories(dir)
    return listed(dir, path.isdir)
end

local function walk(dir, bottom_up, follow, depth, visit)
    local dirs, files = List(), List()
    for _, full in ipairs(listed(dir, path.exists) or {}) do
        local into = path.isdir(full) and (follow or not path.islink(full)) and dirs or files
        into:append(path.basename(full))
    end
    if not bottom_up then visit(dir, dirs, files) end
    if depth < MAX_DEPTH then
        for _, name in ipairs(dirs) do walk(path.join(dir, name), bottom_up, follow, depth + 1, visit) end
    end
    if bottom_up then visit(dir, dirs, files) end
end

--- for root, dirs, files in dir.walk(dir, bottom_up?, follow_links?)
function _M.walk(root, bottom_up, follow)
    local visits, i = {}, 0
    walk(root, bottom_up, follow, 0, function(...) visits[#visits + 1] = { ... } end)
    return function()
        i = i + 1
        if visits[i] then return visits[i][1], visits[i][2], visits[i][3] end
    end
end

--- All files below a directory, of a mask. @return list of paths
function _M.getallfiles(root, mask)
    local found = List()
    for dir, _, files in _M.walk(root or ".") do
        for _, name in ipairs(mask and _M.filter(files, mask) or files) do found:append(path.join(dir, name)) end
    end
    return found
end

--- Makes a directory and those above it. @return true; nil, err
function _M.makepath(name)
    name = path.normpath(name)
    if path.isdir(name) then return true end
    local above = path.dirname(name)
    if above ~= "" and not path.isdir(above) then
        local ok, err = _M.makepath(above)
        if not ok then return nil, err end
    end
    local ok, err = path.mkdir(name)
    if not ok and not path.isdir(name) then return nil, err end
    return true
end

--- Removes a directory with all that is in it; links are removed, not followed. @return true; nil, err
function _M.rmtree(root)
    if path.islink(root) then return nil, "will not follow symlink" end
    if not path.isdir(root) then return nil, "not a directory: " .. root end
    for dir, _, files in _M.walk(root, true) do
        for _, name in ipairs(files) do
            local ok, err = os.remove(path.join(dir, name))
            if not ok then return nil, err end
        end
        local ok, err = path.rmdir(dir)
        if not ok then return nil, err end
    end
    return true
end

--- Copies a tree. @param f function?: dir.copyfile or dir.movefile @return true; nil, err
function _M.clonetree(from, to, f)
    f = f or _M.copyfile
    local ok, err = _M.makepath(to)
    if not ok then return nil, err end
    for dir, dirs, files in _M.walk(from) do
        local target = path.normpath(path.join(to, path.relpath(dir, from)))
        for _, name in ipairs(dirs) do
            ok, err = _M.makepath(path.join(target, name))
            if not ok then return nil, err end
        end
        for _, name in ipairs(files) do
            ok, err = f(path.join(dir, name), path.join(target, name))
            if not ok then return nil, err end
        end
    end
    return true
end

return _M
