--- lua-resty-expr: `new(rule)` compiles `{ {"arg_name", "==", "json"}, "OR", … }`; `expr:eval(ctx.var)`.

local ipmatcher = require("resty.ipmatcher")
local re_find = ngx.re.find

local ipairs, pcall, setmetatable, tonumber, tostring, type = ipairs, pcall, setmetatable, tonumber, tostring, type

local _M = { _VERSION = "1.3.2" }
local mt = { __index = _M }

local function same(l, r)
    if type(r) == "number" then
        l = tonumber(l)
    elseif type(l) ~= type(r) then
        l, r = tostring(l), tostring(r)
    end
    return l == r
end

local function ordered(compare)
    return function(l, r)
        if type(r) == "number" or type(l) == "number" then
            l, r = tonumber(l), tonumber(r)
            if not l or not r then return false end
        elseif type(l) ~= "string" or type(r) ~= "string" then
            return false
        end
        return compare(l, r)
    end
end

local function matches(options)
    return function(l, r)
        if l == nil then return false end
        if type(l) == "table" then
            for _, v in ipairs(l) do
                if re_find(tostring(v), r, options) then return true end
            end
            return false
        end
        return re_find(tostring(l), r, options) ~= nil
    end
end

local function contains(list, value)
    if type(list) ~= "table" then return false end
    for _, item in ipairs(list) do
        if same(value, item) then return true end
    end
    return false
end

local ops = {
    ["=="] = function(l, r) return l ~= nil and same(l, r) end,
    ["~="] = function(l, r) return l == nil or not same(l, r) end,
    [">"] = ordered(function(l, r) return l > r end),
    [">="] = ordered(function(l, r) return l >= r end),
    ["<"] = ordered(function(l, r) return l < r end),
    ["<="] = ordered(function(l, r) return l <= r end),
    ["~~"] = matches("jou"),
    ["~*"] = matches("joui"),
    ["in"] = function(l, r)
        if type(l) ~= "table" then return l ~= nil and contains(r, l) end
        for _, v in ipairs(l) do
            if contains(r, v) then return true end
        end
        return false
    end,
    ["has"] = function(l, r) return contains(l, r) end,
    ["ipmatch"] = function(l, r) return l ~= nil and r:match(l) == true end,
}

local logic = { AND = true, OR = true, ["!AND"] = true, ["!OR"] = true }

local compile

local function compile_condition(rule)
    local name, op, value = rule[1], rule[2], rule[3]
    local negate = false
    if op == "!" then
        negate, op, value = true, rule[3], rule[4]
    end
    if type(name) ~= "string" then return nil, "the variable's name must be a string" end
    local test = ops[op]
    if not test then return nil, "invalid operator '" .. tostring(op) .. "'" end
    if op == "ipmatch" then
        local matcher, err = ipmatcher.new(type(value) == "table" and value or { value })
        if not matcher then return nil, err end
        value = matcher
    elseif op == "~~" or op == "~*" then
        if type(value) ~= "string" then return nil, "the pattern must be a string" end
        local _, _, err = re_find("", value, "jou")
        if err then return nil, err end
    elseif op == "in" and type(value) ~= "table" then
        return nil, "the right side of 'in' must be an array"
    end
    return function(vars)
        local ok = test(vars[name], value)
        if negate then return not ok end
        return ok
    end
end

local function compile_list(list, from, op)
    local tests = {}
    for i = from, #list do
        local test, err = compile(list[i])
        if not test then return nil, err end
        tests[#tests + 1] = test
    end
    local any, negate = op == "OR" or op == "!OR", op:sub(1, 1) == "!"
    return function(vars)
        local result = not any
        for i = 1, #tests do
            if tests[i](vars) == any then
                result = any
                break
            end
        end
        if negate then return not result end
        return result
    end
end

function compile(rule)
    if type(rule) ~= "table" then return nil, "rule should be a table" end
    local first = rule[1]
    if type(first) == "string" and logic[first] then
        if #rule < 2 then return nil, "rule too short" end
        return compile_list(rule, 2, first)
    end
    if type(first) == "table" or first == nil then return compile_list(rule, 1, "AND") end
    return compile_condition(rule)
end

--- expr, err = new(rule)
function _M.new(rule)
    if type(rule) ~= "table" then return nil, "missing argument rule" end
    local test, err = compile(rule)
    if not test then return nil, err end
    return setmetatable({ test = test }, mt)
end

--- result, err = expr:eval(vars)
function _M:eval(vars)
    local ok, result = pcall(self.test, vars or ngx.var)
    if not ok then return nil, result end
    return result
end

return _M
