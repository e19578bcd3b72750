--- `core.string`: Lua's string library, with plain searches. None of them waits; all phases.
local error = error
local setmetatable = setmetatable
local tostring = tostring
local type = type

local byte = string.byte
local find = string.find
local sub = string.sub
local lower = string.lower

local _M = setmetatable({}, { __index = string })

--- `find` without patterns; from `from` on.
function _M.find(haystack, needle, from)
    local first, last = find(haystack, needle, from or 1, true)
    return first, last
end

--- Whether `s` starts with `prefix`.
function _M.has_prefix(s, prefix)
    if type(s) ~= "string" or type(prefix) ~= "string" then
        error("unexpected type: s:" .. type(s) .. ", prefix:" .. type(prefix))
    end
    return sub(s, 1, #prefix) == prefix
end

--- Whether `s` ends with `suffix`.
function _M.has_suffix(s, suffix)
    if type(s) ~= "string" or type(suffix) ~= "string" then
        error("unexpected type: s:" .. type(s) .. ", suffix:" .. type(suffix))
    end
    return suffix == "" or sub(s, -#suffix) == suffix
end

--- The last index of the one-character text `char` in `s` at or before `from` (the end by default), or nil.
function _M.rfind_char(s, char, from)
    local b = byte(char)
    for i = from or #s, 1, -1 do
        if byte(s, i) == b then
            return i
        end
    end
    return nil
end

--- A Lua source on one line: without comments of lines, and with one blank for each run of blanks.
function _M.compress_script(s)
    s = s:gsub("%-%-[^\n]*\n", " ")
    return (s:gsub("%s+", " "))
end

--- `s` as a text, in lower case.
function _M.lower(s)
    return lower(tostring(s))
end

return _M
