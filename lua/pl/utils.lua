--- `pl.utils`: split, pack, choose, lambdas, checks (Penlight's manual). What reads files or runs programs is not there in uploaded
-- functions.

local chunk = require("moongate.chunk")
local compat = require("pl.compat")

local concat, error, find, gsub, pairs, select, setmetatable, sub, tostring, type =
    table.concat, error, string.find, string.gsub, pairs, select, setmetatable, string.sub, tostring, type

local _M = { _VERSION = "1.14.0", dir_separator = "/" }

--- Patterns that are often wanted.
_M.patterns = {
    FLOAT = "[%+%-%d]%d*%.?%d*[eE]?[%+%-]?%d*", INTEGER = "[+%-%d]%d*", IDEN = "[%a_][%w_]*", FILE = "[%a%.\\][:%][%w%._%-\\]*",
}

--- Metatables of what is a list, a map, an iterable.
_M.stdmt = { List = { _name = "List" }, Map = { _name = "Map" }, Set = { _name = "Set" }, MultiMap = { _name = "MultiMap" } }

for name, value in pairs(compat) do _M[name] = value end

--- `f`, which is asked once for each argument.
function _M.memoize(f)
    local cache = setmetatable({}, { __mode = "v" })
    return function(key)
        local value = cache[key]
        if value == nil then
            value = f(key)
            cache[key] = value
        end
        return value
    end
end

--- @return table with the values and their number `n`
function _M.pack(...)
    return { n = select("#", ...), ... }
end

--- The values of a table from i to j, `n` by default.
function _M.unpack(t, i, j)
    return unpack(t, i or 1, j or t.n or #t)
end

--- One of two values.
function _M.choose(condition, yes, no)
    if condition then return yes end
    return no
end

--- Pieces of a text. @param re string?: a pattern, white space by default @param plain boolean? @param n number?: at most so many
-- @return list
function _M.split(text, re, plain, n)
    local pieces, at = {}, 1
    if not re then
        re = "%s+"
        text = gsub(text, "^%s+", "")
        plain = false
    end
    if re == "" then return { text } end
    while true do
        local first, last = find(text, re, at, plain)
        if not first or last < first then
            local rest = sub(text, at)
            if rest ~= "" then pieces[#pieces + 1] = rest end
            break
        end
        pieces[#pieces + 1] = sub(text, at, first - 1)
        if n and #pieces == n then
            pieces[#pieces] = sub(text, at)
            break
        end
        at = last + 1
    end
    return setmetatable(pieces, _M.stdmt.List)
end

--- The pieces as values.
function _M.splitv(text, re, plain, n)
    return unpack(_M.split(text, re, plain, n))
end

--- A text with its pattern signs escaped.
function _M.escape(text)
    return (gsub(text, "([%-%.%+%[%]%(%)%$%^%%%?%*])", "%%%1"))
end

--- Copies all that a module has into a table, the globals by default, which uploaded functions have in common and leave alone.
-- @param t table or a module's name
function _M.import(t, into)
    if type(t) == "string" then t = chunk.globals().require(t) end
    if not into and chunk.sandboxed then error("bad argument #2 to 'import' (table expected, got no value)", 2) end
    into = into or chunk.globals()
    for name, value in pairs(t) do
        if into[name] == nil then into[name] = value end
    end
end

--- Whether a value is of a type, a class, or can be called ("callable").
function _M.is_type(value, kind)
    if type(kind) == "string" then return type(value) == kind end
    return getmetatable(value) == kind
end

--- Whether a value can be called.
function _M.is_callable(value)
    local mt = getmetatable(value)
    return type(value) == "function" or type(mt) == "table" and mt.__call ~= nil
end

--- The type's name: of files "file", of classes their own.
function _M.type(value)
    local mt = getmetatable(value)
    return type(mt) == "table" and mt._name or type(value)
end

--- Raises unless argument n is of a type. @param verify function?: must hold too @return the value
function _M.assert_arg(n, value, kind, verify, message, level)
    if type(value) ~= kind then
        error(("argument %d expected a '%s' got a '%s'"):format(n, kind, type(value)), level or 2)
    end
    if verify and not verify(value) then
        error(("argument %d: '%s' %s"):format(n, tostring(value), message or "is not valid"), level or 2)
    end
    return value
end

--- Raises unless argument n is a text. @return the text
function _M.assert_string(n, value)
    return _M.assert_arg(n, value, "string", nil, nil, 3)
end

--- A table whose values are its keys.
function _M.enum(...)
    local first, all = (...), { ... }
    local made = {}
    if type(first) == "table" then
        for key, value in pairs(first) do
            if type(key) == "number" then made[value] = value else made[key] = value end
        end
    else
        for i = 1, #all do made[all[i]] = all[i] end
    end
    return setmetatable(made, {
        __index = function(_, key) error(("'%s' is not a valid value"):format(tostring(key)), 2) end,
        __call = function(self, key)
            local value = rawget(self, key)
            if value == nil then return nil, ("'%s' is not a valid value"):format(tostring(key)) end
            return value
        end,
    })
end

local operators = {
    ["+"] = function(a, b) return a + b end, ["-"] = function(a, b) return a - b end, ["*"] = function(a, b) return a * b end,
    ["/"] = function(a, b) return a / b end, ["%"] = function(a, b) return a % b end, ["^"] = function(a, b) return a ^ b end,
    [".."] = function(a, b) return a .. b end, ["()"] = function(f, ...) return f(...) end, ["[]"] = function(t, key) return t[key] end,
    ["<"] = function(a, b) return a < b end, ["<="] = function(a, b) return a <= b end, [">"] = function(a, b) return a > b end,
    [">="] = function(a, b) return a >= b end, ["=="] = function(a, b) return a == b end, ["~="] = function(a, b) return a ~= b end,
    ["#"] = function(a) return #a end, ["and"] = function(a, b) return a and b end, ["or"] = function(a, b) return a or b end,
    ["{}"] = function(...) return { ... } end, ["~"] = function(a, b) return find(a, b) ~= nil end, [""] = function(...) return ... end,
    ["not"] = function(a) return not a end,
}

--- A function of a text: `|x,y| x + y`, or `_ + 1` with the argument as `_`. Raises for a bad text.
_M.string_lambda = _M.memoize(function(text)
    local args, body = text:match("^%s*|([%w_,%s]*)|(.+)$")
    if not args then
        if not find(text, "_", 1, true) then error("not a string lambda: " .. text, 3) end
        args, body = "_", text
    end
    local made, err = chunk.load("return function(" .. args .. ") return " .. body .. " end", "=lambda")
    if not made then error(err, 3) end
    return made()
end)

--- A function of a function, an operator's name or a lambda. Raises for what is none.
function _M.function_arg(n, f, message)
    if type(f) == "function" then return f end
    if type(f) == "string" then return operators[f] or _M.string_lambda(f) end
    if _M.is_callable(f) then return f end
    error(("argument %d: %s"):format(n, message or "must be callable"), 3)
end

--- `f` with its first argument given.
function _M.bind1(f, first)
    f = _M.function_arg(1, f)
    return function(...) return f(first, ...) end
end

--- `f` with its second argument given.
function _M.bind2(f, second)
    f = _M.function_arg(1, f)
    return function(first, ...) return f(first, second, ...) end
end

--- for i, value in utils.npairs(t, from?, to?, step?): also the nils of a list with `n`
function _M.npairs(t, from, to, step)
    local i = (from or 1) - (step or 1)
    to, step = to or t.n or #t, step or 1
    return function()
        i = i + step
        if i <= to then return i, t[i] end
    end
end

--- for i, value in utils.kpairs(t): keys that are not numbers of a list
function _M.kpairs(t)
    local key
    return function()
        local value
        repeat key, value = next(t, key) until key == nil or type(key) ~= "number"
        return key, value
    end
end

local mode = "default"

--- What `raise` does. @param new string: "default" (nil, err) or "error"
function _M.on_error(new)
    mode = new
end

--- @return nil, err; or raises, as `on_error` says
function _M.raise(err)
    if mode == "error" then error(err, 2) end
    return nil, err
end

--- Text of the arguments in a format. @param format string
function _M.printf(format, ...)
    print(format:format(...))
end

--- The items of a list as texts. @return into
function _M.array_tostring(t, into)
    into = into or {}
    for i = 1, #t do into[i] = tostring(t[i]) end
    return into
end

--- A text for a shell. @param argument string or table of them
function _M.quote_arg(argument)
    if type(argument) == "table" then
        local all = {}
        for i = 1, #argument do all[i] = _M.quote_arg(argument[i]) end
        return concat(all, " ")
    end
    if argument == "" or find(argument, '[^a-zA-Z0-9_@%+=:,./-]') then
        return "'" .. gsub(argument, "'", "'\\''") .. "'"
    end
    return argument
end

if chunk.sandboxed then return _M end

--- The text of a file. @param binary boolean? @return string; nil, err
function _M.readfile(path, binary)
    local file, err = io.open(path, "r" .. (binary and "b" or ""))
    if not file then return _M.raise(err) end
    local text, why = file:read("*a")
    file:close()
    if not text then return _M.raise(path .. ": " .. tostring(why)) end
    return text
end

--- The lines of a file. @return list; nil, err
function _M.readlines(path)
    local file, err = io.open(path, "r")
    if not file then return _M.raise(err) end
    local lines = {}
    for line in file:lines() do lines[#lines + 1] = line end
    file:close()
    return lines
end

--- Writes a file. @return true; nil, err
function _M.writefile(path, text, binary)
    local file, err = io.open(path, "w" .. (binary and "b" or ""))
    if not file then return _M.raise(err) end
    local ok, why = file:write(text)
    file:close()
    if not ok then return _M.raise(path .. ": " .. tostring(why)) end
    return true
end

--- Runs a command and gives what it says. It holds up the worker: `resty.shell` does not.
-- @return success, exit code, stdout, stderr
function _M.executeex(command)
    local out, err = os.tmpname(), os.tmpname()
    local ok, code = compat.execute(command .. " > " .. _M.quote_arg(out) .. " 2> " .. _M.quote_arg(err))
    local stdout, stderr = _M.readfile(out, true), _M.readfile(err, true)
    os.remove(out)
    os.remove(err)
    return ok, code, stdout or "", stderr or ""
end

return _M
