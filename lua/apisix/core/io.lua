--- `core.io`: small files.
local open = io.open

-- Larger than any configuration file or key; a mistaken path must not fill the VM.
local MAX_BYTES = 64 * 1024 * 1024

local _M = setmetatable({}, { __index = io })

--- The file's content, or nil and the reason.
function _M.get_file(path)
    local file, err = open(path, "rb")
    if not file then
        return nil, "failed to open file: " .. path .. ", error info: " .. err
    end
    local text = file:read(MAX_BYTES + 1)
    file:close()
    -- Half a file is no file: a key or a list that was cut could pass for a whole one.
    if text and #text > MAX_BYTES then
        return nil, "failed to read file: " .. path .. ", it is longer than " .. MAX_BYTES .. " bytes"
    end
    return text or ""
end

return _M
