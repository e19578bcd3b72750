--- lua-resty-openssl's version (its README). There is no OpenSSL here: the numbers are those of the interface.

local text = "moongate (interface of OpenSSL 3.0.0)"

return {
    _VERSION = "1.5.1", version_num = 0x30000000, version_text = text, OPENSSL_3X = true, OPENSSL_30 = true, OPENSSL_11 = false,
    OPENSSL_111 = false, OPENSSL_11_OR_LATER = true, OPENSSL_111_OR_LATER = true, OPENSSL_10 = false, BORINGSSL = false,
    BORINGSSL_110 = false,
    --- @return string
    version = function() return text end,
    info = function() return text end,
    VERSION = 0, CFLAGS = 1, BUILT_ON = 2, PLATFORM = 3, DIR = 4,
}
