--- `resty.jwt-validators`: what a claim must be (lua-resty-jwt's README).
--
-- A validator is `function(value, claim, jwt_json)`; it returns true (or nothing) for a good claim, false for a bad one, or raises
-- the reason as a text. Each `x` has an `opt_x`, which accepts a claim that is not there.

local cjson = require("cjson.safe")

local error, ipairs, select, tostring, type = error, ipairs, select, tostring, type
local concat, format = table.concat, string.format

local _M = { _VERSION = "0.2.3" }

local leeway = 0
local function clock() return ngx.time() end

--- Seconds of difference between clocks that are forgiven: 0 by default.
function _M.set_system_leeway(seconds)
    if type(seconds) ~= "number" or seconds < 0 then error("leeway must be a non-negative number", 2) end
    leeway = seconds
end

--- Where the time comes from. @param f function: gives seconds since the epoch
function _M.set_system_clock(f)
    if type(f) ~= "function" then error("clock must be a function", 2) end
    clock = f
end

local function needs(value, kind, what)
    if type(value) ~= kind then error(format("Cannot create validator for %s: a %s is needed.", what, kind), 3) end
end

-- Makes `name` and `opt_name` of a maker of checks. A check gets (value, claim, jwt_json) of a claim that is there.
local function define(name, make)
    _M["opt_" .. name] = function(...)
        local check = make(...)
        return function(value, claim, json)
            if value == nil then return true end
            return check(value, claim, json)
        end
    end
    _M[name] = function(...)
        local check = make(...)
        return function(value, claim, json)
            if value == nil then error(format("'%s' claim is required.", claim), 0) end
            return check(value, claim, json)
        end
    end
end

--- All of these validators, in this order.
function _M.chain(...)
    local n, all = select("#", ...), { ... }
    for i = 1, n do needs(all[i], "function", "chain") end
    return function(value, claim, json)
        for i = 1, n do
            if all[i](value, claim, json) == false then return false end
        end
        return true
    end
end

--- The claim must be there, and pass `next_validator` when one is given.
function _M.required(next_validator)
    if next_validator ~= nil then needs(next_validator, "function", "required") end
    return function(value, claim, json)
        if value == nil then error(format("'%s' claim is required.", claim), 0) end
        if next_validator then return next_validator(value, claim, json) end
        return true
    end
end

--- One of these claims must be there: for the claim `__jwt`.
function _M.require_one_of(claims)
    needs(claims, "table", "require_one_of")
    if #claims == 0 then error("Cannot create validator for require_one_of: claims are needed.", 2) end
    return function(value, _, json)
        local payload = type(value) == "table" and value.payload
        if type(payload) ~= "table" then
            local object = cjson.decode(json)
            payload = type(object) == "table" and object.payload
        end
        for _, name in ipairs(claims) do
            if type(payload) == "table" and payload[name] ~= nil then return true end
        end
        error("Missing one of claims - [ " .. concat(claims, ", ") .. " ].", 0)
    end
end

--- `check_function(value, wanted)` decides; with `check_type` the claim must be of that type.
define("check", function(wanted, check_function, _, check_type)
    needs(check_function, "function", "check")
    return function(value, claim)
        if check_type and type(value) ~= check_type then
            error(format("'%s' is malformed.  Expected to be a %s.", claim, check_type), 0)
        end
        return check_function(value, wanted) and true or false
    end
end)

define("equals", function(wanted)
    return function(value) return value == wanted end
end)

define("matches", function(pattern, options)
    needs(pattern, "string", "matches")
    return function(value, claim)
        if type(value) ~= "string" then error(format("'%s' is malformed.  Expected to be a string.", claim), 0) end
        return ngx.re.match(value, pattern, options) ~= nil
    end
end)

--- Passes when `check_function(value, one)` does for one of the list.
define("any_of", function(list, check_function)
    needs(list, "table", "any_of")
    needs(check_function, "function", "any_of")
    return function(value)
        for _, one in ipairs(list) do
            if check_function(value, one) then return true end
        end
        return false
    end
end)

define("equals_any_of", function(list)
    needs(list, "table", "equals_any_of")
    return function(value)
        for _, one in ipairs(list) do
            if value == one then return true end
        end
        return false
    end
end)

define("contains_any_of", function(list)
    needs(list, "table", "contains_any_of")
    return function(value, claim)
        if type(value) ~= "table" then error(format("'%s' is malformed.  Expected to be a table.", claim), 0) end
        for _, item in ipairs(value) do
            for _, one in ipairs(list) do
                if item == one then return true end
            end
        end
        return false
    end
end)

for name, compare in pairs({
    greater_than = function(a, b) return a > b end,
    greater_than_or_equal = function(a, b) return a >= b end,
    less_than = function(a, b) return a < b end,
    less_than_or_equal = function(a, b) return a <= b end,
}) do
    define(name, function(wanted)
        needs(wanted, "number", name)
        return function(value, claim)
            if type(value) ~= "number" then error(format("'%s' is malformed.  Expected to be a number.", claim), 0) end
            return compare(value, wanted)
        end
    end)
end

local function timestamp(value, claim)
    if type(value) ~= "number" or value < 0 then
        error(format("'%s' is malformed.  Expected to be a positive numeric value.", claim), 0)
    end
    return value
end

-- What is no time that http_time can write is written as it is.
local function shown(time)
    if time >= 1e12 then return tostring(time) end
    return ngx.http_time(time)
end

define("is_not_before", function()
    return function(value, claim)
        if timestamp(value, claim) - leeway <= clock() then return true end
        error(format("'%s' claim not valid until %s", claim, shown(value)), 0)
    end
end)

define("is_not_expired", function()
    return function(value, claim)
        if timestamp(value, claim) + leeway > clock() then return true end
        error(format("'%s' claim expired at %s", claim, shown(value)), 0)
    end
end)

define("is_at", function()
    return function(value, claim)
        local now = clock()
        if timestamp(value, claim) - leeway <= now and now <= value + leeway then return true end
        error(format("'%s' claim is only valid at %s", claim, shown(value)), 0)
    end
end)

return _M
