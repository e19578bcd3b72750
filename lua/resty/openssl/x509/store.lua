--- lua-resty-openssl's x509.store (its README): authorities for `sock:settrustedstore`, which takes `store.ctx`.

local ssl = require("moongate.native").ssl
local x509 = require("resty.openssl.x509")

local error, getmetatable, rawset, setmetatable = error, getmetatable, rawset, setmetatable
local concat = table.concat

local _M = { _VERSION = "1.5.1" }

-- Bytes of PEM that one may hold: what the host reads at once. The public authorities have some 200 KB.
local MAX_BYTES = 256 * 1024

local mt = {
    __index = function(self, name)
        if name ~= "ctx" then return _M[name] end
        local ctx = ssl.chain(concat(self.certificates))
        -- Without one, a socket would trust whom the configuration trusts.
        if not ctx then error("x509.store: it is empty", 2) end
        rawset(self, "ctx", ctx)
        return ctx
    end,
}

--- @return store
function _M.new()
    return setmetatable({ certificates = {}, bytes = 0 }, mt)
end

function _M.istype(object)
    return getmetatable(object) == mt
end

--- @param certificate x509 @return true; nil, err
function _M:add(certificate)
    if not x509.istype(certificate) then return nil, "x509.store:add: expect a x509 instance at #1" end
    local pem = certificate:to_PEM()
    if self.bytes + #pem > MAX_BYTES then return nil, "x509.store:add: a store holds " .. MAX_BYTES .. " bytes" end
    self.certificates[#self.certificates + 1], self.bytes = pem, self.bytes + #pem
    rawset(self, "ctx", nil)
    return true
end

return _M
