--- lua-resty-openssl (its README): bn, cipher, digest, hmac, kdf, mac, pkey, rand, version, x509, without OpenSSL.

local _M = { _VERSION = "1.5.1" }

local parts = { "bn", "cipher", "digest", "hmac", "kdf", "mac", "pkey", "rand", "version", "x509" }

--- Puts all parts into the module. @return the module
function _M.load_modules()
    for _, name in ipairs(parts) do _M[name] = require("resty.openssl." .. name) end
    return _M
end

--- The modules' own names; with luaossl's there is nothing more.
function _M.luaossl_compat() end

--- There are no providers to ask; what is here works.
function _M.set_fips_mode(on)
    if on then return nil, "FIPS mode is not supported" end
    return true
end

function _M.get_fips_mode()
    return false
end

return setmetatable(_M, {
    __index = function(_, name)
        for _, part in ipairs(parts) do
            if part == name then return require("resty.openssl." .. name) end
        end
    end,
})
