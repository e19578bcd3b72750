--- `pl.file`: whole files (Penlight's manual). Not open to uploaded functions.

require("moongate.chunk").refuse_in_sandbox("pl.file")

local path, utils = require("pl.path"), require("pl.utils")

local _M = { read = utils.readfile, write = utils.writefile, access_time = path.getatime, creation_time = path.getctime,
    modified_time = path.getmtime }

--- @return true; nil, err
function _M.delete(name)
    local ok, err = os.remove(name)
    if not ok then return nil, err end
    return true
end

--- Copies a file; into a directory under its own name. @param keep boolean?: false: nothing that is there is written over
-- @return true; false, err
function _M.copy(source, target, keep)
    if path.isdir(target) then target = path.join(target, path.basename(source)) end
    if keep == false and path.exists(target) then return false, "file exists: " .. target end
    local text, err = utils.readfile(source, true)
    if not text then return false, err end
    local ok, why = utils.writefile(target, text, true)
    if not ok then return false, why end
    return true
end

--- Moves a file, also to another device. @return true; false, err
function _M.move(source, target)
    if path.isdir(target) then target = path.join(target, path.basename(source)) end
    if os.rename(source, target) then return true end
    local ok, err = _M.copy(source, target)
    if not ok then return false, err end
    return _M.delete(source)
end

return _M
