--- `pl.stringx`: texts, as Python has them (Penlight's manual). Places are counted from 1.

local utils = require("pl.utils")
local List = require("pl.List")

local find, gsub, pairs, rep, sub, type = string.find, string.gsub, pairs, string.rep, string.sub, type

local _M = {}

-- Pattern signs are plain characters here.
local function each(text, from, step)
    local at = from
    return function()
        at = at + step
        if at >= 1 and at <= #text then return sub(text, at, at) end
    end
end

for name, pattern in pairs({ isalpha = "^%a+$", isdigit = "^%d+$", isalnum = "^%w+$", isspace = "^%s+$", islower = "^[%l%s]+$",
    isupper = "^[%u%s]+$" }) do
    _M[name] = function(text)
        return find(text, pattern) ~= nil
    end
end

local function any_of(affix, matches)
    if type(affix) == "string" then return matches(affix) end
    for i = 1, #affix do
        if matches(affix[i]) then return true end
    end
    return false
end

--- Whether a text starts with another, or one of a list.
function _M.startswith(text, prefix)
    return any_of(prefix, function(p) return sub(text, 1, #p) == p end)
end

function _M.endswith(text, suffix)
    return any_of(suffix, function(s) return s == "" or #s <= #text and sub(text, -#s) == s end)
end

--- Puts the items of a list together.
function _M.join(separator, list)
    return table.concat(list, separator)
end

--- The lines of a text. @param keep_ends boolean? @return list
function _M.splitlines(text, keep_ends)
    local lines, at = List(), 1
    while at <= #text do
        local first, last = find(text, "\r?[\n\r]", at)
        if not first then
            lines:append(sub(text, at))
            break
        end
        lines:append(sub(text, at, keep_ends and last or first - 1))
        at = last + 1
    end
    return lines
end

--- The pieces of a text between white space or a plain separator. @param n number?: at most so many cuts @return list
function _M.split(text, separator, n)
    local pieces, at = List(), 1
    local plain = separator ~= nil and separator ~= ""
    if not plain then
        text = gsub(text, "^%s+", "")
        if not n then text = gsub(text, "%s+$", "") end
        if text == "" then return pieces end
    end
    while not n or #pieces < n do
        local first, last = find(text, plain and separator or "%s+", at, plain)
        if not first then break end
        pieces:append(sub(text, at, first - 1))
        at = last + 1
    end
    return pieces:append(sub(text, at))
end

--- Tabs as spaces. @param n number?: 8 by default
function _M.expandtabs(text, n)
    n = n or 8
    return (gsub(text, "([^\r\n]*)", function(line)
        local out, column = {}, 0
        for piece, tab in line:gmatch("([^\t]*)(\t?)") do
            out[#out + 1] = piece
            column = column + #piece
            if tab ~= "" then
                local fill = n - column % n
                out[#out + 1] = rep(" ", fill)
                column = column + fill
            end
        end
        return table.concat(out)
    end))
end

--- The place of a text in another. @return number or nil
function _M.lfind(text, wanted, first, last)
    local at, stop = find(text, wanted, first, true)
    if at and (not last or stop <= last) then return at end
end

function _M.rfind(text, wanted, first, last)
    local found, at = nil, (first or 1) - 1
    while true do
        local start, stop = find(text, wanted, at + 1, true)
        if not start or last and stop > last then return found end
        found, at = start, start
        if start > #text then return found end
    end
end

--- A text with another in place of a third, n times at most.
function _M.replace(text, old, new, n)
    return (gsub(text, utils.escape(old), (gsub(new, "%%", "%%%%")), n))
end

--- How often a text is in another. @param overlap boolean?
function _M.count(text, wanted, overlap)
    if wanted == "" then return #text + 1 end
    local n, at = 0, 1
    while true do
        local first, last = find(text, wanted, at, true)
        if not first then return n end
        n, at = n + 1, overlap and first + 1 or last + 1
    end
end

local function filled(text, width, fill, left, right)
    fill = fill or " "
    local n = width - #text
    if n <= 0 then return text end
    local before = left and (right and math.floor(n / 2) or n) or 0
    return rep(fill, before) .. text .. rep(fill, n - before)
end

function _M.ljust(text, width, fill)
    return filled(text, width, fill, false, true)
end

function _M.rjust(text, width, fill)
    return filled(text, width, fill, true, false)
end

function _M.center(text, width, fill)
    return filled(text, width, fill, true, true)
end

local function stripped(text, left, right, chars)
    local class = chars and "[" .. gsub(chars, "[%^%]%-%%]", "%%%0") .. "]" or "%s"
    if left then text = gsub(text, "^" .. class .. "+", "") end
    if right then
        local last = #text
        while last > 0 and find(text, "^" .. class, last) do last = last - 1 end
        text = sub(text, 1, last)
    end
    return text
end

--- Without white space, or these characters, at the start / end / both.
function _M.lstrip(text, chars)
    return stripped(text, true, false, chars)
end

function _M.rstrip(text, chars)
    return stripped(text, false, true, chars)
end

function _M.strip(text, chars)
    return stripped(text, true, true, chars)
end

local function parted(text, first, last)
    return sub(text, 1, first - 1), sub(text, first, last), sub(text, last + 1)
end

--- before, separator, after
function _M.partition(text, separator)
    local first, last = find(text, separator, 1, true)
    if not first then return text, "", "" end
    return parted(text, first, last)
end

function _M.rpartition(text, separator)
    local first = _M.rfind(text, separator)
    if not first then return "", "", text end
    return parted(text, first, first + #separator - 1)
end

--- The ith character, "" when there is none.
function _M.at(text, i)
    return sub(text, i, i)
end

--- Words with a capital each.
function _M.title(text)
    return (gsub(text, "(%S)(%S*)", function(first, rest) return first:upper() .. rest:lower() end))
end

--- A text of at most so many characters, with "..." for what is left out. @param tail boolean?: the end is kept
function _M.shorten(text, width, tail)
    if #text <= width then return text end
    if width < 3 then return rep(".", width) end
    if tail then return "..." .. sub(text, #text - width + 4) end
    return sub(text, 1, width - 3) .. "..."
end

--- A text in quotes as Lua reads it.
function _M.quote_string(text)
    local eq = text:match("^\n") or find(text, "\n") or find(text, '"')
    if not eq then return '"' .. gsub(text, "\\", "\\\\") .. '"' end
    local signs = ""
    while find(text .. "]", "]" .. signs .. "]", 1, true) do signs = signs .. "=" end
    return "[" .. signs .. "[" .. (sub(text, 1, 1) == "\n" and "\n" or "") .. text .. "]" .. signs .. "]"
end

--- Lines with so many spaces in front.
function _M.indent(text, n, char)
    local fill = rep(char or " ", n)
    return (gsub(text, "([^\n]+)", fill .. "%1"))
end

--- Lines without the white space that all have in front.
function _M.dedent(text)
    local least
    for space, more in text:gmatch("([ \t]*)([^\n]*)\n?") do
        if more ~= "" and (not least or #space < #least) then least = space end
    end
    if not least or least == "" then return text end
    return (gsub("\n" .. text, "\n" .. utils.escape(least), "\n"):sub(2))
end

--- Lines of words of at most so many characters. @return list
function _M.wrap(text, width)
    local lines, line = List(), ""
    width = width or 70
    for word in text:gmatch("%S+") do
        if line == "" then
            line = word
        elseif #line + 1 + #word <= width then
            line = line .. " " .. word
        else
            lines:append(line)
            line = word
        end
    end
    if line ~= "" then lines:append(line) end
    return lines
end

function _M.fill(text, width)
    return _M.wrap(text, width):concat("\n") .. "\n"
end

--- A function that puts values in for `$name` and `${name}`: `Template(text)`; its `substitute(t)` raises for what is missing,
-- `safe_substitute(t)` leaves it.
function _M.Template(text)
    local function put(t, safe)
        return (gsub(gsub(text, "%$(%$)", "\1"), "%$(%{?)([%w_]+)(}?)", function(open, name, close)
            local value = type(t) == "function" and t(name) or type(t) ~= "function" and t[name] or nil
            if value == nil then
                if not safe then error("not present in table " .. name, 0) end
                return nil
            end
            return tostring(value) .. (open == "" and close or "")
        end):gsub("\1", "$"))
    end
    return { substitute = function(_, t) return put(t, false) end, safe_substitute = function(_, t) return put(t, true) end }
end

--- for character in stringx.iter(text)
function _M.iter(text)
    return each(text, 0, 1)
end

--- Puts these functions among the methods of texts. Not in uploaded functions, whose texts are everybody's.
function _M.import()
    if require("moongate.chunk").sandboxed then error("texts are everybody's", 2) end
    utils.import(_M, string)
end

return _M
