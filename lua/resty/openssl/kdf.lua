--- lua-resty-openssl's kdf (its README): PBKDF2 and HKDF. scrypt and PKCS12KDF are not there.

local crypto = require("moongate.native").crypto
local plain_name = require("resty.openssl.digest").plain_name

local _M = { _VERSION = "1.5.1", PBKDF2 = 69, HKDF = 1036, SCRYPT = 973 }

--- Bytes made of a secret.
-- @param options table: type (kdf.PBKDF2 or kdf.HKDF), outlen, md (a digest, sha1 by default), salt; pass, pbkdf2_iter; hkdf_key,
--   hkdf_info
-- @return bytes; nil, err
function _M.derive(options)
    local digest, salt = plain_name(options.md or "sha1"), options.salt or ""
    if type(options.outlen) ~= "number" then return nil, "kdf.derive: expect a number as \"outlen\"" end
    if options.type == _M.PBKDF2 then
        return crypto.pbkdf2(digest, options.pass or "", salt, options.pbkdf2_iter or 1, options.outlen)
    elseif options.type == _M.HKDF then
        return crypto.hkdf(digest, options.hkdf_key or "", salt, options.hkdf_info or "", options.outlen)
    end
    return nil, "kdf.derive: unsupported type"
end

return _M
