--- Signatures with Ed25519 (RFC 8032, 5.1) by a password, as MariaDB's client_ed25519 makes them: SHA-512 of the password
-- stands where the RFC expands a seed.
--
-- Only for what is signed once per connection: it takes some tens of milliseconds. Nothing branches on a secret's bits.

local bit = require("bit")
local crypto = require("moongate.native").crypto

local band, floor, rshift = bit.band, math.floor, bit.rshift
local byte, char, concat, rep, sub = string.byte, string.char, table.concat, string.rep, string.sub

local _M = {}

-- Numbers mod 2^255 - 19: 16 limbs of 16 bits, the lowest first. Between operations limbs may be a little more, or less
-- than 0: a product brings them back.

local function from_hex(text)
    local limbs = {}
    for i = 1, 16 do limbs[i] = tonumber(sub(text, 65 - 4 * i, 68 - 4 * i), 16) end
    return limbs
end

local ZERO = from_hex(rep("0", 64))
local ONE = from_hex(rep("0", 63) .. "1")
local PRIME = from_hex("7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffed")
-- Twice d, of the curve's equation.
local D2 = from_hex("2406d9dc56dffce7198e80f2eef3d13000e0149a8283b156ebd69b9426b2f159")
-- The base point.
local BASE_X = from_hex("216936d3cd6e53fec0a4e231fdd6dc5c692cc7609525a7b2c9562d608f25d51a")
local BASE_Y = from_hex("6666666666666666666666666666666666666666666666666666666666666658")
-- Its order.
local ORDER = from_hex("1000000000000000000000000000000014def9dea2f79cd65812631a5cf5d3ed")

local function add(a, b)
    local out = {}
    for i = 1, 16 do out[i] = a[i] + b[i] end
    return out
end

local function subtract(a, b)
    local out = {}
    for i = 1, 16 do out[i] = a[i] - b[i] end
    return out
end

-- Brings limbs into their range; 2^256 is 38.
local function carry(a)
    local over = 0
    for i = 1, 16 do
        local value = a[i] + over
        over = floor(value / 0x10000)
        a[i] = value - over * 0x10000
    end
    a[1] = a[1] + 38 * over
end

local function multiply(a, b)
    local t = {}
    for i = 1, 31 do t[i] = 0 end
    for i = 1, 16 do
        local ai = a[i]
        for j = 1, 16 do t[i + j - 1] = t[i + j - 1] + ai * b[j] end
    end
    local out = {}
    for i = 1, 15 do out[i] = t[i] + 38 * t[i + 16] end
    out[16] = t[16]
    carry(out)
    carry(out)
    return out
end

-- 1 / a, as a^(p - 2): all bits of the exponent are 1 but those of 2 and 4.
local function invert(a)
    local out = a
    for i = 253, 0, -1 do
        out = multiply(out, out)
        if i ~= 2 and i ~= 4 then out = multiply(out, a) end
    end
    return out
end

-- a - m with its borrow: 1 when a is less.
local function take(a, m)
    local out, borrow = {}, 0
    for i = 1, 16 do
        local d = a[i] - m[i] - borrow
        borrow = d < 0 and 1 or 0
        out[i] = d + borrow * 0x10000
    end
    return out, borrow
end

local function pick(which, a, b)
    local out = {}
    for i = 1, 16 do out[i] = a[i] * (1 - which) + b[i] * which end
    return out
end

-- The one number from 0 to p - 1.
local function canonical(a)
    local out = add(a, ZERO)
    for _ = 1, 3 do carry(out) end
    for _ = 1, 2 do
        local less, borrow = take(out, PRIME)
        out = pick(borrow, less, out)
    end
    return out
end

local function to_bytes(limbs)
    local out = {}
    for i = 1, 16 do out[i] = char(limbs[i] % 0x100, floor(limbs[i] / 0x100)) end
    return concat(out)
end

-- Points: { X, Y, Z, T } with x = X/Z, y = Y/Z, x y = T/Z (RFC 8032, 5.1.4). The sum is right for equal points, too.

local BASE = { BASE_X, BASE_Y, ONE, multiply(BASE_X, BASE_Y) }
local NEUTRAL = { ZERO, ONE, ONE, ZERO }

local function sum(p, q)
    local a = multiply(subtract(p[2], p[1]), subtract(q[2], q[1]))
    local b = multiply(add(p[2], p[1]), add(q[2], q[1]))
    local c = multiply(multiply(p[4], D2), q[4])
    local d = multiply(p[3], q[3])
    d = add(d, d)
    local e, f, g, h = subtract(b, a), subtract(d, c), add(d, c), add(b, a)
    return { multiply(e, f), multiply(g, h), multiply(f, g), multiply(e, h) }
end

-- The base point, as often as the 32 bytes say.
local function times_base(scalar)
    local point = NEUTRAL
    for i = 255, 0, -1 do
        point = sum(point, point)
        local more = sum(point, BASE)
        local which = band(rshift(byte(scalar, floor(i / 8) + 1), i % 8), 1)
        local chosen = {}
        for n = 1, 4 do chosen[n] = pick(which, point[n], more[n]) end
        point = chosen
    end
    return point
end

local function encode(point)
    local inverse = invert(point[3])
    local x, y = canonical(multiply(point[1], inverse)), canonical(multiply(point[2], inverse))
    y[16] = y[16] + (x[1] % 2) * 0x8000
    return to_bytes(y)
end

-- Numbers mod the order of the base point ------------------------------------------------------------------------------

-- The rest of a number of bytes, the lowest first.
local function reduce(bytes)
    local rest = ZERO
    for i = #bytes * 8 - 1, 0, -1 do
        local over = band(rshift(byte(bytes, floor(i / 8) + 1), i % 8), 1)
        local doubled = {}
        for n = 1, 16 do
            local value = rest[n] * 2 + over
            over = floor(value / 0x10000)
            doubled[n] = value - over * 0x10000
        end
        local less, borrow = take(doubled, ORDER)
        rest = pick(borrow, less, doubled)
    end
    return rest
end

-- a + b * c, as bytes.
local function combine(a, b, c)
    local t = {}
    for i = 1, 33 do t[i] = a[i] or 0 end
    for i = 1, 16 do
        for j = 1, 16 do t[i + j - 1] = t[i + j - 1] + b[i] * c[j] end
    end
    local out, over = {}, 0
    for i = 1, 33 do
        local value = t[i] + over
        over = floor(value / 0x10000)
        value = value - over * 0x10000
        out[i] = char(value % 0x100, floor(value / 0x100))
    end
    return concat(out)
end

--- The signature, 64 bytes, of a message by a password.
function _M.sign(password, message)
    local expanded = crypto.digest("sha512", password)
    local first, last = byte(expanded, 1), byte(expanded, 32)
    local secret = char(first - first % 8) .. sub(expanded, 2, 31) .. char(last % 0x40 + 0x40)
    local public = encode(times_base(secret))
    local nonce = reduce(crypto.digest("sha512", sub(expanded, 33) .. message))
    local commitment = encode(times_base(to_bytes(nonce)))
    local challenge = reduce(crypto.digest("sha512", commitment .. public .. message))
    return commitment .. to_bytes(reduce(combine(nonce, challenge, reduce(secret))))
end

return _M
