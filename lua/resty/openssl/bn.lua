--- lua-resty-openssl's bn (its README): whole numbers of up to 16384 bits. Primes are not made or tested.

local native = require("moongate.native").bn

local _M = { _VERSION = "1.5.1" }
local mt = { __index = _M }

local function wrap(number, err)
    if not number then return nil, "bn: " .. err end
    return setmetatable({ number = number }, mt)
end

--- @param value number, string or nothing for 0 @param base number?: 2 (bytes), 10 (the default for text), 16 @return bn; nil, err
function _M.new(value, base)
    if value == nil then value = 0 end
    if type(value) == "number" then
        if value % 1 ~= 0 then return nil, "bn.new: expect an integer" end
        return wrap(native.read(("%.0f"):format(value), 10))
    end
    if type(value) ~= "string" then return nil, "bn.new: expect nil, number or string at #1" end
    return wrap(native.read(value, base or 10))
end

function _M.istype(object)
    return getmetatable(object) == mt
end

--- The same number. @return bn
function _M.dup(other)
    return setmetatable({ number = other.number }, mt)
end

function _M.from_binary(bytes) return wrap(native.read(bytes, 2)) end
function _M.from_hex(text) return wrap(native.read(text, 16)) end
function _M.from_dec(text) return wrap(native.read(text, 10)) end

--- @param pad number?: at least so many bytes
function _M:to_binary(pad)
    local bytes = native.text(self.number, 2)
    if pad and #bytes < pad then bytes = ("\0"):rep(pad - #bytes) .. bytes end
    return bytes
end

function _M:to_hex() return native.text(self.number, 16) end
function _M:to_dec() return native.text(self.number, 10) end
mt.__tostring = _M.to_dec

--- @return a Lua number, which holds 53 bits
function _M:to_number() return tonumber(native.text(self.number, 10)) end
_M.tonumber = _M.to_number

-- Also plain numbers compute.
local function operand(value)
    if _M.istype(value) then return value.number end
    local number, err = _M.new(value)
    if not number then error(err, 3) end
    return number.number
end

local function operation(name)
    return function(a, b)
        local made, err = wrap(native.compute(name, operand(a), operand(b)))
        if not made then error(err, 2) end
        return made
    end
end

for name, method in pairs({ add = "__add", sub = "__sub", mul = "__mul", div = "__div", mod = "__mod" }) do
    _M[name] = operation(name)
    mt[method] = _M[name]
end
_M.idiv = _M.div
_M.gcd, _M.lshift, _M.rshift, _M.exp = operation("gcd"), operation("lshift"), operation("rshift"), operation("exp")
_M.pow = _M.exp
mt.__pow = _M.exp

function mt.__unm(a) return _M.sub(0, a) end
function _M.sqr(a) return _M.mul(a, a) end

local function modular(name, second)
    return function(a, b, m)
        if second then m, b = b, second end
        return wrap(native.compute(name, operand(a), operand(b), operand(m)))
    end
end

_M.mod_add, _M.mod_sub, _M.mod_mul, _M.mod_exp = modular("add"), modular("sub"), modular("mul"), modular("exp")
_M.mod_pow = _M.mod_exp
_M.mod_sqr = modular("exp", 2)
_M.mod_inverse = modular("inverse", 0)

local function compared(a, b) return native.compare(operand(a), operand(b)) end

function mt.__eq(a, b) return compared(a, b) == 0 end
function mt.__lt(a, b) return compared(a, b) < 0 end
function mt.__le(a, b) return compared(a, b) <= 0 end

function _M:is_zero() return compared(self, 0) == 0 end
function _M:is_one() return compared(self, 1) == 0 end
function _M:is_word(n) return compared(self, n) == 0 end
function _M:is_odd() return compared(_M.mod(self, 2), 0) ~= 0 end

return _M
