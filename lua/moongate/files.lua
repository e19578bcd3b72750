--- Relative names of files, as under nginx: those of the working directory. Where that has no such file, or no such directory for one
-- that is made, the prefix is asked, so that a plugin finds `conf/x` wherever the gateway was started.

local prefix = require("moongate.native").prefix
local byte, type = string.byte, type
local raw_open, raw_lines = io.open, io.lines

local ENOENT, SLASH = 2, byte("/")

local function below_prefix(name)
    return type(name) == "string" and prefix ~= "" and byte(name, 1) ~= SLASH and prefix .. "/" .. name or nil
end

--- Opens `name`, or else what is below the prefix. Errors are those of `name` itself.
function io.open(name, ...)
    local file, err, code = raw_open(name, ...)
    local other = code == ENOENT and below_prefix(name)
    if not other then return file, err, code end
    file = raw_open(other, ...)
    if file then return file end
    return nil, err, code
end

local function is_there(name)
    local file = raw_open(name)
    return file and file:close()
end

--- Reads the lines of `name`, or else of what is below the prefix.
function io.lines(name, ...)
    local other = below_prefix(name)
    if other and not is_there(name) and is_there(other) then return raw_lines(other, ...) end
    -- No argument at all is standard input, nil is an error of its own.
    if name == nil then return raw_lines() end
    return raw_lines(name, ...)
end

return {}
