--- `string.find`, `match`, `gmatch` and `gsub` whose work the watchdog can cut off (src/lua/host/pattern.rs): what uploaded functions
--- get under those names. Results and errors are those of LuaJIT's own. `gsub`'s function may wait.

local raw = require("moongate.native").pattern.find
local concat, sub, byte = table.concat, string.sub, string.byte
local error, floor, select, tonumber, tostring, type = error, math.floor, select, tonumber, tostring, type

local _M = {}

local PERCENT, ZERO, NINE = 37, 48, 57

local function kind_of(value, n, given)
    if value == nil and n > given then return "no value" end
    return type(value)
end

local function bad(n, name, text)
    error("bad argument #" .. n .. " to '" .. name .. "' (" .. text .. ")", 3)
end

-- Where to start, counted from 0; nil: behind the end.
local function start_of(init, len)
    init = floor(tonumber(init) or 1)
    if init < 0 then
        init = len + init + 1
    end
    if init < 1 then
        init = 1
    end
    return init <= len + 1 and init - 1 or nil
end

-- Text and pattern as strings; the number of the one that is none.
local function texts(s, p)
    local ks, kp = type(s), type(p)
    if ks ~= "string" then
        if ks ~= "number" then return 1 end
        s = tostring(s)
    end
    if kp ~= "string" then
        if kp ~= "number" then return 2 end
        p = tostring(p)
    end
    return nil, s, p
end

local function found_or_nil(first, ...)
    if first then return first, ... end
    return nil
end

--- string.find(s, pattern, init?, plain?) -> first, last, captures… | nil
function _M.find(...)
    local s, p, init, plain = ...
    local wrong
    wrong, s, p = texts(s, p)
    if wrong then bad(wrong, "find", "string expected, got " .. kind_of((select(wrong, ...)), wrong, select("#", ...))) end
    local from = start_of(init, #s)
    if not from then return nil end
    return found_or_nil(raw(s, p, from, plain or nil, true))
end

local function captured(s, first, last, ...)
    if not first then return nil end
    if select("#", ...) == 0 then return sub(s, first, last) end
    return ...
end

--- string.match(s, pattern, init?) -> captures… | the match | nil
function _M.match(...)
    local s, p, init = ...
    local wrong
    wrong, s, p = texts(s, p)
    if wrong then bad(wrong, "match", "string expected, got " .. kind_of((select(wrong, ...)), wrong, select("#", ...))) end
    local from = start_of(init, #s)
    if not from then return nil end
    return captured(s, raw(s, p, from, false, true))
end

--- string.gmatch(s, pattern) -> an iterator over matches
function _M.gmatch(...)
    local s, p = ...
    local wrong
    wrong, s, p = texts(s, p)
    if wrong then bad(wrong, "gmatch", "string expected, got " .. kind_of((select(wrong, ...)), wrong, select("#", ...))) end
    local from = 0
    local function next_match(first, last, ...)
        if not first then
            from = #s + 1
            return nil
        end
        -- An empty match is left by one byte, so that the next is another.
        from = last >= first and last or last + 1
        return captured(s, first, last, ...)
    end
    return function()
        if from > #s then return nil end
        return next_match(raw(s, p, from, false, false))
    end
end

-- A replacement text with its `%n` filled in.
local function expand(text, whole, ...)
    local n = select("#", ...)
    local out, done, at = {}, 1, 1
    while at <= #text do
        if byte(text, at) == PERCENT then
            out[#out + 1] = sub(text, done, at - 1)
            local digit = byte(text, at + 1)
            if digit and digit >= ZERO and digit <= NINE then
                local i = digit - ZERO
                if i == 0 or (i == 1 and n == 0) then
                    out[#out + 1] = whole
                elseif i <= n then
                    out[#out + 1] = tostring((select(i, ...)))
                else
                    error("invalid capture index", 4)
                end
                done = at + 2
            else
                done = at + 1
                if digit == nil then out[#out + 1] = "\0" end
            end
            at = at + 2
        else
            at = at + 1
        end
    end
    out[#out + 1] = sub(text, done)
    return concat(out)
end

local function replaced(repl, whole, ...)
    local kind = type(repl)
    if kind == "string" then return expand(repl, whole, ...) end
    local value
    if kind == "table" then
        value = repl[select("#", ...) > 0 and (...) or whole]
    elseif select("#", ...) > 0 then
        value = repl(...)
    else
        value = repl(whole)
    end
    if not value then return whole end
    local got = type(value)
    if got ~= "string" and got ~= "number" then
        error("invalid replacement value (a " .. got .. ")", 4)
    end
    return tostring(value)
end

--- string.gsub(s, pattern, repl, n?) -> text, how many: `repl` is a text with `%1`, a table or a function.
function _M.gsub(...)
    local s, p, repl, max = ...
    local wrong
    wrong, s, p = texts(s, p)
    if wrong then bad(wrong, "gsub", "string expected, got " .. kind_of((select(wrong, ...)), wrong, select("#", ...))) end
    local kind = type(repl)
    if kind == "number" then
        repl = tostring(repl)
    elseif kind ~= "string" and kind ~= "table" and kind ~= "function" then
        bad(3, "gsub", "string/function/table expected")
    end
    max = max and floor(tonumber(max)) or #s + 1
    local anchored = byte(p) == 94
    local out, n, from = {}, 0, 0
    local function one(first, last, ...)
        if not first then return false end
        n = n + 1
        out[#out + 1] = sub(s, from + 1, first - 1)
        out[#out + 1] = replaced(repl, sub(s, first, last), ...)
        if last >= first then
            from = last
        else
            -- An empty match: the byte behind it stays.
            out[#out + 1] = sub(s, first, first)
            from = first
        end
        return from <= #s and not anchored
    end
    while n < max do
        if not one(raw(s, p, from, false, true)) then break end
    end
    out[#out + 1] = sub(s, from + 1)
    return concat(out), n
end

return _M
