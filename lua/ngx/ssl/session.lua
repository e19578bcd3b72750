--- `require("ngx.ssl.session")` (lua-resty-core): sessions that scripts keep, for `ssl_session_fetch_by_lua*` and
-- `ssl_session_store_by_lua*`.

local native = require("moongate.native").ssl

local _M = { version = "0.1.28" }

--- What the session is called that the client offers, or that was made. Works in both phases. @return bytes; nil, err
_M.get_session_id = native.session_id

--- The session that was made, secrets included, in the gateway's own form. Works in `ssl_session_store_by_lua*`. @return bytes; nil, err
_M.get_serialized_session = native.session

--- Has the connection go on with a session, when it fits. Works in `ssl_session_fetch_by_lua*`. @return true; nil, err
_M.set_serialized_session = native.set_session

return _M
