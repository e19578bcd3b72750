--- `require("ngx.ssl.clienthello")` (lua-resty-core): the client's first message, for `ssl_client_hello_by_lua*`. All functions raise
-- elsewhere.

local native = require("moongate.native").ssl

local _M = { version = "0.1.28" }

--- The name that the client asks for (SNI). @return string; nil without one
function _M.get_client_hello_server_name()
    -- Raises in other phases, as its neighbours do.
    native.hello_extension(0)
    return native.server_name()
end

--- The versions that the client lists, in its order. @return array of "TLSv1.3" and so on; nil when it lists none; nil, err
_M.get_supported_versions = native.hello_versions

--- Cipher suites by number, in the client's order, without those of RFC 8701. @return array; nil, err
_M.get_client_hello_ciphers = native.hello_ciphers

--- Extensions by number, in the client's order, without those of RFC 8701. @return array; nil, err
_M.get_client_hello_ext_present = native.hello_extensions

--- One extension. @param ext_type its number. @return bytes; nil when the client sends none; nil, err
_M.get_client_hello_ext = native.hello_extension

--- The versions that may be agreed on. @param protocols array of names; those that are not available are passed over.
-- @return true; nil, err
_M.set_protocols = native.set_protocols

return _M
