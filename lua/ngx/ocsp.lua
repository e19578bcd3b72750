--- `require("ngx.ocsp")` (lua-resty-core's ocsp.md): what the issuer of a certificate says of it. Chains are certificates in DER, one
-- behind the other, the owner's first and its issuer's second (`ngx.ssl.cert_pem_to_der`), of at most 1 MB, as are responses.

local native = require("moongate.native")
local base = require("resty.core.base")

local ocsp = native.ocsp

local _M = { version = base.version }

-- The length that an argument allows; without it the one of lua-resty-core's buffer, 4 KB unless a script has set it.
local function limit(max)
    return max or base.get_string_buf_size and base.get_string_buf_size() or 4096
end

--- The address to ask at. @return string; string, "truncated" when it is longer than `max_len`; nil when the certificate has
-- none; nil, err
function _M.get_ocsp_responder_from_der_chain(chain, max_len)
    local url, err = ocsp.responder(chain)
    max_len = limit(max_len)
    if url and #url > max_len then
        return url:sub(1, max_len), "truncated"
    end
    return url, err
end

--- What to send there, by POST. @return bytes; nil, err
function _M.create_ocsp_request(chain, max_len)
    local request, err = ocsp.request(chain)
    max_len = limit(max_len)
    if request and #request > max_len then
        return nil, "output buffer too small: " .. #request .. " > " .. max_len
    end
    return request, err
end

--- Whether the issuer, or whom it has named for that, says now that the certificate is good. @return true, and the time in seconds
-- at which more will be known, or nil without one; nil, err, of at most `max_err_len` bytes
function _M.validate_ocsp_response(response, chain, max_err_len)
    local ok, next_update_or_err = ocsp.validate(response, chain)
    if not ok then
        return nil, next_update_or_err:sub(1, limit(max_err_len))
    end
    return true, next_update_or_err
end

--- Sends the response along in this handshake. @return true; true, "no status req" when the client has not asked; nil, err
_M.set_ocsp_status_resp = native.ssl.set_ocsp

return _M
