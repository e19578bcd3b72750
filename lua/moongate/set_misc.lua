--- `ndk.set_var`: what lua-nginx-module reaches of nginx's set_misc module (its README). A value that cannot be decoded is empty.

local native = require("moongate.native")

local ngx = ngx
local error, setmetatable, tostring = error, setmetatable, tostring
local byte, char, concat, format, rep = string.byte, string.char, table.concat, string.format, string.rep
local floor = math.floor
local crypto = native.crypto

-- `set_base32_alphabet`'s default: RFC 4648's "extended hex", in lower case.
local ALPHABET = "0123456789abcdefghijklmnopqrstuv"

local base32_values = {}
for i = 1, #ALPHABET do base32_values[byte(ALPHABET, i)] = i - 1 end

local function encode_base32(text)
    local out, bits, value = {}, 0, 0
    for i = 1, #text do
        value, bits = value * 256 + byte(text, i), bits + 8
        while bits >= 5 do
            bits = bits - 5
            local top = floor(value / 2 ^ bits)
            out[#out + 1] = byte(ALPHABET, top + 1)
            value = value - top * 2 ^ bits
        end
    end
    if bits > 0 then out[#out + 1] = byte(ALPHABET, value * 2 ^ (5 - bits) + 1) end
    for i = 1, #out do out[i] = char(out[i]) end
    return concat(out) .. rep("=", -#out % 8)
end

local function decode_base32(text)
    local out, bits, value = {}, 0, 0
    for i = 1, #text do
        local b = byte(text, i)
        if b == 61 then break end
        local digit = base32_values[b]
        if not digit then return "" end
        value, bits = value * 32 + digit, bits + 5
        if bits >= 8 then
            bits = bits - 8
            local top = floor(value / 2 ^ bits)
            out[#out + 1] = char(top)
            value = value - top * 2 ^ bits
        end
    end
    return concat(out)
end

local json_escapes = { ['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t" }

local function quote_json(text)
    if text == "" then return "null" end
    local quoted = text:gsub('[%z\1-\31"\\\127]', function(c)
        return json_escapes[c] or format("\\u%04x", byte(c))
    end)
    return '"' .. quoted .. '"'
end

local directives = {
    set_escape_uri = ngx.escape_uri, set_unescape_uri = ngx.unescape_uri, set_quote_sql_str = ngx.quote_sql_str,
    set_quote_pgsql_str = native.quote_pgsql,
    set_quote_json_str = quote_json,
    set_md5 = ngx.md5,
    set_sha1 = function(text) return crypto.hex(ngx.sha1_bin(text)) end,
    set_encode_base64 = ngx.encode_base64,
    set_decode_base64 = function(text) return ngx.decode_base64(text) or "" end,
    set_encode_base32 = encode_base32, set_decode_base32 = decode_base32,
    set_encode_hex = crypto.hex,
    set_decode_hex = function(text) return crypto.unhex(text) or "" end,
}

-- Directives take text.
local functions = {}
for name, f in pairs(directives) do
    functions[name] = function(value) return f(value == nil and "" or tostring(value)) end
end

return {
    set_var = setmetatable({}, {
        __index = function(_, name)
            local f = functions[name]
            if not f then
                error('ndk.set_var: directive "' .. tostring(name) .. '" not found or does not use ndk_set_var_value', 2)
            end
            return f
        end,
        __newindex = function() error("not allowed", 2) end,
        __metatable = false,
    }),
}
