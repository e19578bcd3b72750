--- `lua-utf8`: texts by characters (luautf8's README; Lua 5.3's manual, 6.5). What is no UTF-8 counts byte by byte.

local native = require("moongate.native").utf8

local byte, char, concat, error, floor, select, sub_bytes, tonumber, tostring, type =
    string.byte, string.char, table.concat, error, math.floor, select, string.sub, tonumber, tostring, type
local find_native, sub_native = native.find, native.sub

local _M = { charpattern = "[%z\1-\127\194-\244][\128-\191]*" }

--- The text of characters given by their numbers. Raises for a number that is no character's.
function _M.char(...)
    local parts = {}
    for i = 1, select("#", ...) do
        local code = (select(i, ...))
        if type(code) ~= "number" or code < 0 or code > 0x10FFFF then
            error("bad argument #" .. i .. " to 'char' (value out of range)", 2)
        end
        code = floor(code)
        if code < 0x80 then
            parts[i] = char(code)
        elseif code < 0x800 then
            parts[i] = char(0xC0 + floor(code / 64), 0x80 + code % 64)
        elseif code < 0x10000 then
            parts[i] = char(0xE0 + floor(code / 4096), 0x80 + floor(code / 64) % 64, 0x80 + code % 64)
        else
            parts[i] = char(0xF0 + floor(code / 262144), 0x80 + floor(code / 4096) % 64, 0x80 + floor(code / 64) % 64,
                0x80 + code % 64)
        end
    end
    return concat(parts)
end

-- Bytes of the character that starts at byte `at`, and its number; 1 and the byte for what is no UTF-8.
local function read(text, at)
    local a = byte(text, at)
    local n = a < 0x80 and 1 or a < 0xC2 and 0 or a < 0xE0 and 2 or a < 0xF0 and 3 or a < 0xF5 and 4 or 0
    if n <= 1 then return 1, a, n == 1 end
    local code = a % 2 ^ (7 - n)
    for i = 1, n - 1 do
        local b = byte(text, at + i)
        if not b or b < 0x80 or b > 0xBF then return 1, a, false end
        code = code * 64 + b % 64
    end
    if n == 3 and (code < 0x800 or code >= 0xD800 and code <= 0xDFFF) or n == 4 and (code < 0x10000 or code > 0x10FFFF) then
        return 1, a, false
    end
    return n, code, true
end

-- A place in bytes, from 1; negative: from the end.
local function place(i, len)
    return i < 0 and len + i + 1 or i
end

--- Characters between bytes i and j. @return number; nil, place of the first bad byte
function _M.len(text, i, j, lax)
    i, j = place(i or 1, #text), place(j or -1, #text)
    local n, bad = native.len(sub_bytes(text, i, j), lax)
    if not n then return nil, bad + i - 1 end
    return n
end

--- The numbers of the characters that start between bytes i and j. Raises for what is no UTF-8.
function _M.codepoint(text, i, j, lax)
    i = place(i or 1, #text)
    j = place(j or i, #text)
    if i < 1 or j > #text then error("bad argument #2 to 'codepoint' (out of range)", 2) end
    local codes, at = {}, i
    while at <= j do
        local n, code, good = read(text, at)
        if not good and not lax then error("invalid UTF-8 code", 2) end
        codes[#codes + 1] = code
        at = at + n
    end
    return unpack(codes)
end

--- for place, code in utf8.codes(text): raises for what is no UTF-8.
function _M.codes(text, lax)
    local at = 1
    return function()
        if at > #text then return nil end
        local n, code, good = read(text, at)
        if not good and not lax then error("invalid UTF-8 code", 2) end
        local here = at
        at = at + n
        return here, code
    end
end

local function is_part(text, at)
    local b = byte(text, at)
    return b and b >= 0x80 and b <= 0xBF
end

--- The byte where the nth character counted from byte i starts. @return number; nil when there is none
function _M.offset(text, n, i)
    i = place(i or (n > 0 and 1 or #text + 1), #text)
    if i < 1 or i > #text + 1 then error("bad argument #3 to 'offset' (position out of range)", 2) end
    if n == 0 then
        while i > 1 and is_part(text, i) do i = i - 1 end
        return i
    end
    if is_part(text, i) then error("initial position is a continuation byte", 2) end
    while n < 0 and i > 1 do
        repeat i = i - 1 until i == 1 or not is_part(text, i)
        n = n + 1
    end
    if n < 0 then return nil end
    if n > 0 then
        n = n - 1
        while n > 0 and i <= #text do
            repeat i = i + 1 until not is_part(text, i)
            n = n - 1
        end
        if n > 0 then return nil end
    end
    return i
end

--- Characters i to j; negative: from the end.
function _M.sub(text, i, j)
    return sub_native(text, i or 1, j or -1)
end

--- The numbers of characters i to j.
function _M.byte(text, i, j)
    i = i or 1
    return _M.codepoint(sub_native(text, i, j or i), 1, -1, true)
end

for _, name in ipairs({ "lower", "upper", "title", "fold", "reverse" }) do
    --- Also of a character given by its number.
    _M[name] = function(text)
        if type(text) == "number" then return (_M.codepoint(native.change(_M.char(text), name))) end
        return native.change(text, name)
    end
end

--- Compares without regard to capitals. @return -1, 0 or 1
function _M.ncasecmp(a, b)
    a, b = native.change(a, "fold"), native.change(b, "fold")
    return a == b and 0 or a < b and -1 or 1
end

--- Columns on a terminal. @param ambiguous number?: 2: characters of ambiguous width are wide
function _M.width(text, ambiguous)
    if type(text) == "number" then text = _M.char(text) end
    return native.width(text, ambiguous == 2 or ambiguous == true)
end

--- The character at a column. @return its place in characters, the offset inside of it, its width
function _M.widthindex(text, column, ambiguous)
    local index, left = 0, column
    for _, code in _M.codes(text, true) do
        index = index + 1
        local width = _M.width(code, ambiguous)
        if left <= width then return index, left, width end
        left = left - width
    end
    return index + 1, left, 0
end

--- Puts a text before the nth character, at the end by default.
function _M.insert(text, n, new)
    if new == nil then return text .. n end
    local count = native.len(text, true)
    if n < 0 then n = count + n + 1 end
    return sub_native(text, 1, n - 1) .. new .. (n <= count and sub_native(text, n, -1) or "")
end

--- The text without characters i to j, the last by default.
function _M.remove(text, i, j)
    local count = native.len(text, true)
    i = place(i or -1, count)
    j = place(j or (i == count and i or -1), count)
    if i > j then return text end
    return (i > 1 and sub_native(text, 1, i - 1) or "") .. (j < count and sub_native(text, j + 1, -1) or "")
end

--- The next character behind the one at byte `at` (none: the first), or `n` further. @return its byte and number; nil at the end
function _M.next(text, at, n)
    if at == nil then
        at, n = 1, n or 0
    else
        n = n or 1
    end
    if at < 1 then return nil end
    local i = at
    while n > 0 do
        if i > #text then return nil end
        i = i + read(text, i)
        n = n - 1
    end
    while n < 0 do
        if i <= 1 then return nil end
        repeat i = i - 1 until i == 1 or not is_part(text, i)
        n = n + 1
    end
    if i > #text then return nil end
    local _, code = read(text, i)
    return i, code
end

--- As `next`, counted from the start (from the end when the place is not positive).
function _M.charpos(text, at, n)
    at, n = at or 1, n or 0
    if at <= 0 then at = #text + at + 1 end
    if n > 0 and at == 1 then n = n - 1 end
    return _M.next(text, at, n)
end

--- `%ddd`, `%{ddd}`, `%uddd`, `%xhhhh`, `%x{hhhh}` are characters by number, decimal or hexadecimal. Raises for what is no character.
function _M.escape(text)
    return (text:gsub("%%(x?u?)({?)(%w*)(}?)", function(kind, open, digits, close)
        local wanted = digits:match(kind:find("x") and "^%x+" or "^%d+")
        if not wanted then return nil end
        if open ~= "" and (close == "" or #wanted ~= #digits) then error("invalid escape", 3) end
        local code = tonumber(wanted, kind:find("x") and 16 or 10)
        return _M.char(code) .. digits:sub(#wanted + 1) .. (open == "" and close or "")
    end))
end

--- Whether a text is UTF-8.
function _M.isvalid(text)
    return native.len(text) ~= nil
end

--- The place of the first byte that is no UTF-8, from byte i on. @return number or nil
function _M.invalidoffset(text, i)
    i = place(i or 1, #text)
    local n, bad = native.len(sub_bytes(text, i))
    if n then return nil end
    return bad + i - 1
end

--- A text without what is no UTF-8. @param replacement string?: U+FFFD by default @return text, whether it was good
function _M.clean(text, replacement)
    return native.clean(text, replacement or "\239\191\189")
end

--- @return whether a text is in normal form C
function _M.isnfc(text)
    local made, same = native.nfc(text)
    return made ~= nil and same
end

--- A text in normal form C. Raises for what is no UTF-8. @return text, whether it was so
function _M.normalize_nfc(text)
    local made, same = native.nfc(text)
    if not made then error("string is not UTF-8", 2) end
    return made, same
end

-- Patterns: as in string, by characters -----------------------------------------------------------------------------

local function start(text, init)
    init = init or 1
    if init < 0 then init = math.max(native.len(text, true) + init + 1, 1) end
    return math.max(init, 1) - 1
end

--- first, last, captures… = utf8.find(text, pattern, init?, plain?)
function _M.find(text, pattern, init, plain)
    return find_native(text, pattern, start(text, init), plain, true)
end

local function captured(text, first, last, ...)
    if not first then return nil end
    if select("#", ...) == 0 then return sub_native(text, first, last) end
    return ...
end

--- captures… = utf8.match(text, pattern, init?): the whole match when there are none
function _M.match(text, pattern, init)
    return captured(text, find_native(text, pattern, start(text, init), false, true))
end

--- for captures… in utf8.gmatch(text, pattern)
function _M.gmatch(text, pattern)
    local at = 0
    local function step(first, last, ...)
        if not first then
            at = nil
            return nil
        end
        at = last >= first and last or last + 1
        return captured(text, first, last, ...)
    end
    return function()
        if not at then return nil end
        return step(find_native(text, pattern, at, false, false))
    end
end

local function replacement(new, text, first, last, ...)
    local whole = sub_native(text, first, last)
    local kind = type(new)
    if kind == "function" or kind == "table" then
        local key = select("#", ...) == 0 and whole or (...)
        local value
        if kind == "table" then
            value = new[key]
        elseif select("#", ...) == 0 then
            value = new(whole)
        else
            value = new(...)
        end
        if not value then return whole end
        if type(value) ~= "string" and type(value) ~= "number" then
            error("invalid replacement value (a " .. type(value) .. ")", 0)
        end
        return tostring(value)
    end
    local captures = { n = select("#", ...), ... }
    return (tostring(new):gsub("%%(.)", function(sign)
        if sign == "%" then return "%" end
        local n = tonumber(sign) or error("invalid use of '%' in replacement string", 0)
        if n == 0 or n == 1 and captures.n == 0 then return whole end
        if n > captures.n then error("invalid capture index", 0) end
        return tostring(captures[n])
    end))
end

--- text, count = utf8.gsub(text, pattern, replacement: string, table or function, max?)
function _M.gsub(text, pattern, new, max)
    local kind = type(new)
    if kind ~= "string" and kind ~= "number" and kind ~= "table" and kind ~= "function" then
        error("bad argument #3 to 'gsub' (string/function/table expected, got " .. kind .. ")", 2)
    end
    local out, count, at = {}, 0, 0
    local len, anchored = native.len(text, true), byte(pattern, 1) == 94
    local function step(first, last, ...)
        if not first then return false end
        count = count + 1
        if first > at + 1 then out[#out + 1] = sub_native(text, at + 1, first - 1) end
        out[#out + 1] = replacement(new, text, first, last, ...)
        if last < first then
            if first <= len then out[#out + 1] = sub_native(text, first, first) end
            last = first
        end
        at = last
        return at <= len and not anchored
    end
    while not max or count < max do
        if not step(find_native(text, pattern, at, false, true)) then break end
        if at > len then break end
    end
    if at < len then out[#out + 1] = sub_native(text, at + 1, -1) end
    return concat(out), count
end

return _M
