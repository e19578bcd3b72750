--- RSA encryption with a public key, for small public exponents: RSAES-OAEP of RFC 8017 with SHA-1 and an empty label.
--
-- Only for what is encrypted once per connection: 2048 bits take some milliseconds.

local bit = require("bit")
local crypto = require("moongate.native").crypto

local band, bxor, floor = bit.band, bit.bxor, math.floor
local byte, char, concat, rep, sub = string.byte, string.char, table.concat, string.rep, string.sub
local sha1 = ngx.sha1_bin

-- Bits of a modulus: less is broken, more takes a worker's time.
local MIN_BITS, MAX_BITS = 1024, 4096
-- A public exponent: the usual one is 65537.
local MAX_EXPONENT = 0xffffffff
-- Bytes of a digest.
local HASH = 20

local _M = {}

-- Keys --------------------------------------------------------------------------------------------------------------

-- What a DER element with this tag holds, and where it ends; nil when there is none.
local function element(der, at, tag)
    local found, size = byte(der, at, at + 1)
    if found ~= tag or not size then return nil end
    at = at + 2
    if size > 0x80 and size <= 0x82 then
        local bytes = size - 0x80
        size = 0
        for i = at, at + bytes - 1 do size = size * 0x100 + (byte(der, i) or 0) end
        at = at + bytes
    elseif size >= 0x80 then
        return nil
    end
    if at + size - 1 > #der then return nil end
    return sub(der, at, at + size - 1), at + size
end

-- Modulus and exponent, as bytes, of a SubjectPublicKeyInfo; nil when it is none.
local function parse_key(pem)
    local base64 = pem:match("^%s*%-%-%-%-%-BEGIN PUBLIC KEY%-%-%-%-%-([%w+/=%s]+)%-%-%-%-%-END PUBLIC KEY")
    local der = base64 and ngx.decode_base64((base64:gsub("%s", "")))
    local info = der and element(der, 1, 0x30)
    if not info then return nil end
    local algorithm, at = element(info, 1, 0x30)
    -- rsaEncryption, 1.2.840.113549.1.1.1
    if not algorithm or element(algorithm, 1, 0x06) ~= "\42\134\72\134\247\13\1\1\1" then return nil end
    local bits = element(info, at, 0x03)
    if not bits or byte(bits) ~= 0 then return nil end
    local key = element(bits, 2, 0x30)
    if not key then return nil end
    local modulus, exponent
    modulus, at = element(key, 1, 0x02)
    if not modulus then return nil end
    exponent = element(key, at, 0x02)
    if not exponent then return nil end
    return (modulus:gsub("^%z+", "")), (exponent:gsub("^%z+", ""))
end

-- Numbers: limbs of 16 bits, the lowest first ------------------------------------------------------------------------

local function to_limbs(bytes, k)
    local limbs, at = {}, #bytes
    for i = 1, k do
        limbs[i] = (byte(bytes, at) or 0) + (at > 1 and byte(bytes, at - 1) or 0) * 0x100
        at = at - 2
        if at < 0 then at = 0 end
    end
    return limbs
end

local function to_bytes(limbs, size)
    local out = {}
    for i = 1, #limbs do
        out[#limbs - i + 1] = char(floor(limbs[i] / 0x100), limbs[i] % 0x100)
    end
    return sub(concat(out), -size)
end

-- a - m if that is not below 0. `top`: what of a lies above the limbs.
local function reduce(a, m, k, top)
    if top == 0 then
        local i = k
        while i > 0 and a[i] == m[i] do i = i - 1 end
        if i > 0 and a[i] < m[i] then return a end
    end
    local borrow = 0
    for i = 1, k do
        local d = a[i] - m[i] - borrow
        borrow = d < 0 and 1 or 0
        a[i] = d + borrow * 0x10000
    end
    return a
end

-- a * b / 2^(16 k) mod m (Montgomery). `inverse`: -1 / m mod 2^16.
local function product(a, b, m, k, inverse)
    local t, top = {}, 0
    for i = 1, k do t[i] = 0 end
    for i = 1, k do
        local ai = a[i]
        local u = ((t[1] + ai * b[1]) % 0x10000) * inverse % 0x10000
        local carry = floor((t[1] + ai * b[1] + u * m[1]) / 0x10000)
        for j = 2, k do
            local s = t[j] + ai * b[j] + u * m[j] + carry
            t[j - 1] = s % 0x10000
            carry = floor(s / 0x10000)
        end
        local s = top + carry
        t[k] = s % 0x10000
        top = floor(s / 0x10000)
    end
    return reduce(t, m, k, top)
end

-- base^exponent mod m, of an odd m.
local function power(base, exponent, m, k)
    -- Newton's way doubles the bits that are right: 3, 6, 12, 24.
    local inverse = m[1]
    for _ = 1, 4 do inverse = inverse * ((2 - m[1] * inverse) % 0x10000) % 0x10000 end
    inverse = (0x10000 - inverse) % 0x10000

    -- 2^(32 k) mod m, by doubling.
    local square = { 1 }
    for i = 2, k do square[i] = 0 end
    for _ = 1, 32 * k do
        local carry = 0
        for i = 1, k do
            local d = square[i] * 2 + carry
            carry = d >= 0x10000 and 1 or 0
            square[i] = band(d, 0xffff)
        end
        reduce(square, m, k, carry)
    end

    base = product(base, square, m, k, inverse)
    local result
    while exponent > 0 do
        if exponent % 2 == 1 then result = result and product(result, base, m, k, inverse) or base end
        exponent = floor(exponent / 2)
        if exponent > 0 then base = product(base, base, m, k, inverse) end
    end
    local one = { 1 }
    for i = 2, k do one[i] = 0 end
    return product(result, one, m, k, inverse)
end

-- Padding -----------------------------------------------------------------------------------------------------------

local function masked(data, seed)
    local out, mask = {}, {}
    for i = 0, floor((#data + HASH - 1) / HASH) - 1 do
        mask[i + 1] = sha1(seed .. char(0, 0, floor(i / 0x100), i % 0x100))
    end
    mask = concat(mask)
    for i = 1, #data do out[i] = char(bxor(byte(data, i), byte(mask, i))) end
    return concat(out)
end

--- The text, encrypted with the key in PEM; nil and why not.
function _M.encrypt_oaep(pem, text)
    local modulus, exponent = parse_key(pem)
    if not modulus then return nil, "malformed public key" end
    local size, e = #modulus, 0
    if size * 8 < MIN_BITS or size * 8 > MAX_BITS then return nil, "unsupported size of key" end
    for i = 1, #exponent do e = e * 0x100 + byte(exponent, i) end
    if byte(modulus, -1) % 2 == 0 or e < 3 or e > MAX_EXPONENT then return nil, "unsupported key" end
    if #text > size - 2 * HASH - 2 then return nil, "text too long for the key" end

    local data = sha1("") .. rep("\0", size - #text - 2 * HASH - 2) .. "\1" .. text
    local seed = crypto.random(HASH)
    data = masked(data, seed)
    seed = masked(seed, data)
    local k = floor((size + 1) / 2)
    local sealed = power(to_limbs("\0" .. seed .. data, k), e, to_limbs(modulus, k), k)
    return to_bytes(sealed, size)
end

return _M
