--- `pl.pretty`: tables as Lua text and back (Penlight's manual).

local chunk = require("moongate.chunk")
local utils = require("pl.utils")

local concat, error, find, floor, pairs, rep, sort, tostring, type =
    table.concat, error, string.find, math.floor, pairs, string.rep, table.sort, tostring, type

local _M = {}

local keywords = {}
for word in ("and break do else elseif end false for function goto if in local nil not or repeat return then true until while")
    :gmatch("%a+") do
    keywords[word] = true
end

local function is_name(key)
    return type(key) == "string" and find(key, "^[%a_][%w_]*$") ~= nil and not keywords[key]
end

local function quoted(text)
    return ('"%s"'):format(text:gsub('[%c"\\]', function(c)
        local short = { ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t", ['"'] = '\\"', ["\\"] = "\\\\" }
        return short[c] or ("\\%03d"):format(c:byte())
    end))
end

local function number(value)
    if value ~= value then return "0/0" end
    if value == math.huge then return "1/0" end
    if value == -math.huge then return "-1/0" end
    return floor(value) == value and math.abs(value) < 1e15 and ("%d"):format(value) or ("%.17g"):format(value)
end

--- A value as Lua text. Cycles and what has no text are written as `<cycle>` and as tostring has them.
-- @param t any @param space string?: for each level, two blanks by default; "": one line @param not_clever boolean?: keys are all
--   written in brackets
-- @return string
function _M.write(t, space, not_clever)
    if type(t) ~= "table" then return type(t) == "string" and quoted(t) or tostring(t) end
    space = space or "  "
    local line = space == "" and "" or "\n"
    local open = {}
    local function text(value, level)
        if type(value) == "string" then return quoted(value) end
        if type(value) == "number" then return number(value) end
        if type(value) ~= "table" then return tostring(value) end
        if open[value] then return "<cycle>" end
        open[value] = true
        local pad, parts, n = rep(space, level), {}, #value
        for i = 1, n do parts[i] = pad .. text(value[i], level + 1) end
        local keys = {}
        for key in pairs(value) do
            if type(key) ~= "number" or key < 1 or key > n or floor(key) ~= key then keys[#keys + 1] = key end
        end
        sort(keys, function(a, b)
            if type(a) == type(b) and type(a) == "number" then return a < b end
            return tostring(a) < tostring(b)
        end)
        for _, key in ipairs(keys) do
            local name = is_name(key) and not not_clever and key or "[" .. text(key, level + 1) .. "]"
            parts[#parts + 1] = pad .. name .. (line == "" and "=" or " = ") .. text(value[key], level + 1)
        end
        open[value] = nil
        if #parts == 0 then return "{" .. line .. rep(space, level - 1) .. "}" end
        return "{" .. line .. concat(parts, "," .. line) .. line .. rep(space, level - 1) .. "}"
    end
    return text(t, 1)
end

--- Writes a value to a file, or to the log. Files are not open to uploaded functions. @return true; nil, err
function _M.dump(t, path)
    if not path then
        print(_M.write(t))
        return true
    end
    if not utils.writefile then return nil, "files are not open to functions" end
    return utils.writefile(path, _M.write(t))
end

--- A value that `write` wrote, or any table without calls and functions. @return table; nil, err
function _M.read(text)
    if type(text) ~= "string" then error("argument 1 expected a 'string' got a '" .. type(text) .. "'", 2) end
    if not find(text, "^%s*{") then return nil, "not a Lua table" end
    -- Outside of quotes nothing may be called.
    local bare = text:gsub("\\.", ""):gsub("%b\"\"", '""'):gsub("%b''", "''"):gsub("%[%[.-%]%]", '""')
    if find(bare, "[%w_\"'%]})]%s*[%({\"']") and find(bare, "[%w_%])]%s*[%(\"']") or find(bare, "[^%w_]function[^%w_]")
        or find(bare, "for%s") or find(bare, "[%.:]%s*[%a_]") then
        return nil, "cannot have functions in table definition"
    end
    local made, err = chunk.load("return " .. text, "=pretty", {})
    if not made then return nil, err end
    local ok, value = pcall(made)
    if not ok then return nil, value end
    return value
end

--- The globals that a text of `name = value` lines makes. @param env table? @param paranoid boolean?: no loops, no functions
-- @return table; nil, err
function _M.load(text, env, paranoid)
    env = env or {}
    if paranoid then
        for word in text:gmatch("[%a_][%w_]*") do
            if word == "for" or word == "while" or word == "repeat" or word == "function" or word == "goto" then
                return nil, "looping not allowed"
            end
        end
    end
    local made, err = chunk.load(text, "=tmp", env)
    if not made then return nil, err end
    local ok, why = pcall(made)
    if not ok then return nil, why end
    return env
end

local units = { { 1e9, "G" }, { 1e6, "M" }, { 1e3, "K" } }

--- A number for people: kind "M" for bytes in KiB and so on, "N" for thousands, "T" with commas.
function _M.number(value, kind, precision)
    local format = "%." .. (precision or 1) .. "f%s"
    if kind == "T" then
        local text = ("%d"):format(value)
        local done
        repeat text, done = text:gsub("^(-?%d+)(%d%d%d)", "%1,%2") until done == 0
        return text
    end
    if kind == "M" then
        for i, name in ipairs({ "GiB", "MiB", "KiB" }) do
            local size = 1024 ^ (4 - i)
            if value >= size then return format:format(value / size, name) end
        end
        return ("%dB"):format(value)
    end
    for _, unit in ipairs(units) do
        if value >= unit[1] then return format:format(value / unit[1], unit[2]) end
    end
    return tostring(value)
end

return setmetatable(_M, { __call = function(_, t) return _M.dump(t) end })
