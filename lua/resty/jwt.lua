--- `resty.jwt`: JSON Web Tokens (lua-resty-jwt's README; RFC 7515, 7516, 7518).
--
-- Signed ones: HS, RS, PS 256 to 512, ES256, ES384, ES512, EdDSA. Encrypted ones: `dir` and RSA-OAEP-256 with A128CBC-HS256, A192CBC-HS384,
-- A256CBC-HS512. A public key or certificate is never taken as the secret of an HS signature.

local cjson = require("cjson.safe")
local base64 = require("ngx.base64")
local native = require("moongate.native")
local validators = require("resty.jwt-validators")

local crypto, sign_text, verify_text, pkey = native.crypto, native.jwt.sign, native.jwt.verify, native.pkey
local error, ipairs, pairs, pcall, select, setmetatable, tostring, type =
    error, ipairs, pairs, pcall, select, setmetatable, tostring, type
local format = string.format
local encode64, decode64 = base64.encode_base64url, base64.decode_base64url

-- A longer token is refused unread: headers of a request are shorter.
local MAX_TOKEN = 1024 * 1024

local _M = { _VERSION = "0.2.3", alg_whitelist = nil }
local mt = { __index = _M }

--- The algorithms that `verify` accepts. @param algs table?: name -> anything; nil: all
function _M:set_alg_whitelist(algs)
    self.alg_whitelist = algs
end

--- How a payload that is a table becomes text: cjson by default. @param f function(table): text
function _M:set_payload_encoder(f)
    if type(f) ~= "function" then error("payload encoder must be function", 2) end
    self.payload_encoder = f
end

--- How a payload is read. @param f function(text): table
function _M:set_payload_decoder(f)
    if type(f) ~= "function" then error("payload decoder must be function", 2) end
    self.payload_decoder = f
end

--- An own set of settings: the module itself is one as well. @return object
function _M.new()
    return setmetatable({}, mt)
end

local function fail(reason)
    error({ reason = reason }, 0)
end

-- Encrypted tokens ------------------------------------------------------------------------------------------------

-- Content encryptions: bytes of each half of the key, the digest.
local contents = {
    ["A128CBC-HS256"] = { 16, "sha256" }, ["A192CBC-HS384"] = { 24, "sha384" }, ["A256CBC-HS512"] = { 32, "sha512" },
}

local function big_endian_bits(text)
    local bits = #text * 8
    local out = {}
    for i = 8, 1, -1 do
        out[i] = string.char(bits % 256)
        bits = math.floor(bits / 256)
    end
    return table.concat(out)
end

-- RFC 7518, 5.2.2.1.
local function tag_of(content, key, head, iv, text)
    local mac = crypto.hmac(content[2], key:sub(1, content[1]), head .. iv .. text .. big_endian_bits(head))
    return mac:sub(1, content[1])
end

local function encrypt(secret, header, payload)
    local content = contents[header.enc] or fail("unsupported payload encryption algorithm :" .. tostring(header.enc))
    local key, encrypted = secret, ""
    if header.alg == "RSA-OAEP-256" then
        key = crypto.random(content[1] * 2)
        local public, err = pkey.load(secret)
        if not public then fail("failed to read the public key: " .. err) end
        encrypted, err = pkey.encrypt(public, "oaep", "sha256", key)
        if not encrypted then fail("failed to encrypt the key: " .. err) end
    elseif #key ~= content[1] * 2 then
        fail("invalid key size: " .. #key)
    end
    local head, iv = encode64(cjson.encode(header)), crypto.random(16)
    local text = crypto.aes(true, "cbc", key:sub(content[1] + 1), iv, payload, true)
    return table.concat({ head, encode64(encrypted), encode64(iv), encode64(text),
        encode64(tag_of(content, key, head, iv, text)) }, ".")
end

local function decrypt(object, secret)
    local header, parts = object.header, object.internal
    local content = contents[header.enc]
    if not content then return nil, "unsupported payload encryption algorithm :" .. tostring(header.enc) end
    if type(secret) ~= "string" then return nil, "secret key is required" end
    local key = secret
    if header.alg == "RSA-OAEP-256" then
        local private, err = pkey.load(secret)
        if not private then return nil, err end
        key = pkey.decrypt(private, "oaep", "sha256", decode64(parts.key) or "")
    end
    local iv, text, tag = decode64(parts.iv), decode64(parts.cipher_text), decode64(parts.tag)
    if not key or #key ~= content[1] * 2 or not iv or #iv ~= 16 or not text or not tag then
        return nil, "failed to decrypt payload"
    end
    if not crypto.equal(tag_of(content, key, object.raw_header, iv, text), tag) then
        return nil, "signature mismatch: " .. parts.tag
    end
    return crypto.aes(false, "cbc", key:sub(content[1] + 1), iv, text, true)
end

local function is_encryption(alg)
    return alg == "dir" or alg == "RSA-OAEP-256"
end

-- Signing ---------------------------------------------------------------------------------------------------------

local signed_algs = { HS256 = true, HS384 = true, HS512 = true, RS256 = true, RS384 = true, RS512 = true, PS256 = true,
    PS384 = true, PS512 = true, ES256 = true, ES384 = true, ES512 = true, EdDSA = true }

--- A token. Raises `{ reason = text }`.
-- @param secret string: the secret or a private key as PEM (RSA-OAEP-256: the public key); or function(kid): that
-- @param object table: `header` (typ, alg, enc for encryption, …) and `payload` (a table, or a text as it is)
-- @return string
function _M:sign(secret, object)
    if type(object) ~= "table" or type(object.header) ~= "table" or object.payload == nil then
        fail("the jwt object must have a header and a payload")
    end
    local header, payload = object.header, object.payload
    local alg = header.alg
    if header.typ and type(header.typ) ~= "string" then fail("typ must be a string") end
    if type(secret) == "function" then secret = secret(header.kid) end
    if type(secret) ~= "string" then fail("the secret must be a string") end
    if type(payload) == "table" then
        local err
        payload, err = (self.payload_encoder or cjson.encode)(payload)
        if not payload then fail("failed to encode the payload: " .. tostring(err)) end
    end
    if is_encryption(alg) then return encrypt(secret, header, payload) end
    if not signed_algs[alg] then fail("unsupported alg: " .. tostring(alg)) end
    local text = encode64(cjson.encode(header)) .. "." .. encode64(payload)
    local signature, err = sign_text(alg, secret, text)
    if not signature then fail(err) end
    return text .. "." .. encode64(signature)
end

-- Reading ---------------------------------------------------------------------------------------------------------

local function split(token)
    local parts, n, from = {}, 0, 1
    while true do
        local dot = token:find(".", from, true)
        n = n + 1
        parts[n] = token:sub(from, (dot or 0) - 1)
        if not dot or n > 5 then return parts end
        from = dot + 1
    end
end

local function read(self, token, secret)
    if type(token) ~= "string" or #token > MAX_TOKEN then return nil, "invalid jwt string" end
    local parts = split(token)
    if #parts ~= 3 and #parts ~= 5 then return nil, "invalid jwt string" end
    local header = cjson.decode(decode64(parts[1]) or "")
    if type(header) ~= "table" then return nil, "invalid header: " .. parts[1] end
    local object = { raw_header = parts[1], header = header, verified = false, valid = true }
    if #parts == 5 then
        object.internal = { key = parts[2], iv = parts[3], cipher_text = parts[4], tag = parts[5] }
        object.signature = parts[5]
        if not is_encryption(header.alg) then return nil, "invalid alg: " .. tostring(header.alg) end
        if secret == nil then return object end
        local text, err = decrypt(object, secret)
        if not text then return nil, err or "failed to decrypt payload" end
        object.payload = (self.payload_decoder or cjson.decode)(text) or text
        object.internal.decrypted = true
        return object
    end
    if is_encryption(header.alg) then return nil, "invalid jwt string" end
    object.raw_payload, object.signature = parts[2], parts[3]
    local text = decode64(parts[2])
    object.payload = text and (self.payload_decoder or cjson.decode)(text)
    if not object.payload then return nil, "invalid payload: " .. parts[2] end
    return object
end

--- Reads a token without a look at its signature.
-- @param secret string?: decrypts an encrypted token
-- @return table: header, payload, signature, raw_header, raw_payload, valid, verified = false, reason when not valid
function _M:load_jwt(token, secret)
    local object, err = read(self, token, secret)
    return object or { valid = false, verified = false, reason = err }
end

-- Verifying -------------------------------------------------------------------------------------------------------

local legacy = { lifetime_grace_period = true, require_nbf_claim = true, require_exp_claim = true, valid_issuers = true }

local function is_legacy(options)
    local any = false
    for name in pairs(options) do
        if not legacy[name] then return false end
        any = true
    end
    return any
end

-- The older way to say what is checked: a table of options.
local function legacy_spec(options)
    local grace = options.lifetime_grace_period or 0
    if type(grace) ~= "number" or grace < 0 then
        error("'lifetime_grace_period' validation option is expected to be zero or a positive number of seconds.", 0)
    end
    local function time_check(compare, wanted, text)
        return function(value, claim)
            if value == nil then
                if wanted then error(format("'%s' claim is required.", claim), 0) end
                return true
            end
            if type(value) ~= "number" or value < 0 then
                error(format("'%s' is malformed.  Expected to be a positive numeric value.", claim), 0)
            end
            if compare(value) then return true end
            error(format(text, claim, value < 1e12 and ngx.http_time(value) or tostring(value)), 0)
        end
    end
    local spec = {
        nbf = time_check(function(at) return at - grace <= ngx.time() end, options.require_nbf_claim,
            "'%s' claim not valid until %s"),
        exp = time_check(function(at) return at + grace > ngx.time() end, options.require_exp_claim,
            "'%s' claim expired at %s"),
    }
    if options.valid_issuers then spec.iss = validators.equals_any_of(options.valid_issuers) end
    return spec
end

local function default_spec()
    return { exp = validators.opt_is_not_expired(), nbf = validators.opt_is_not_before() }
end

local function passes(object, spec)
    if type(spec) ~= "table" then return "Claim spec must be a table" end
    if is_legacy(spec) then
        local ok, made = pcall(legacy_spec, spec)
        if not ok then return tostring(made) end
        spec = made
    end
    local payload = type(object.payload) == "table" and object.payload or {}
    local json
    for claim, validator in pairs(spec) do
        if type(validator) ~= "function" then return format("Claim spec value must be a function - see jwt-validators.lua") end
        local value = payload[claim]
        if claim == "__jwt" then value = object end
        json = json or cjson.encode({ header = object.header, payload = object.payload }) or "{}"
        local ok, result = pcall(validator, value, claim, json)
        if not ok then return tostring(result) end
        if result == false then
            return claim == "__jwt" and "Claim '__jwt' returned failure"
                or format("Claim '%s' ('%s') returned failure", claim, tostring(value))
        end
    end
end

local function signature_error(self, secret, object)
    local alg = object.header.alg
    if self.alg_whitelist and not self.alg_whitelist[alg] then return "whitelist unsupported alg: " .. tostring(alg) end
    if object.internal then
        return not object.internal.decrypted and "failed to decrypt payload" or nil
    end
    if not signed_algs[alg] then return "unsupported alg: " .. tostring(alg) end
    if type(secret) == "function" then
        if object.header.kid == nil then return "kid header is required to look up the secret" end
        secret = secret(object.header.kid)
        if not secret then return "no secret for kid " .. tostring(object.header.kid) end
    end
    if type(secret) ~= "string" or secret == "" then return "secret is required" end
    if alg:sub(1, 2) == "HS" and (secret:find("-----BEGIN PUBLIC KEY", 1, true)
        or secret:find("-----BEGIN RSA PUBLIC KEY", 1, true) or secret:find("-----BEGIN CERTIFICATE", 1, true)) then
        return "a public key is no secret of " .. alg
    end
    local signature = decode64(object.signature)
    if not signature then return "failed to decode signature: " .. object.signature end
    local holds, err = verify_text(alg, secret, object.raw_header .. "." .. object.raw_payload, signature)
    if holds then return nil end
    return err or ("signature mismatch: " .. object.signature)
end

--- Checks the signature of a loaded token, then its claims.
-- @param secret string: the secret, or a public key or certificate as PEM; or function(kid): that
-- @param object table: of `load_jwt`
-- @param ... tables: claim -> validator; with none, `exp` and `nbf` are checked where they are
-- @return the object, with `verified` and, when not, `reason`
function _M:verify_jwt_obj(secret, object, ...)
    if not object.valid then return object end
    object.verified = false
    if object.internal and not object.internal.decrypted then
        local loaded, err = decrypt(object, type(secret) == "function" and secret(object.header.kid) or secret)
        if loaded then
            object.payload = (self.payload_decoder or cjson.decode)(loaded) or loaded
            object.internal.decrypted = true
        else
            object.reason = err or "failed to decrypt payload"
            return object
        end
    end
    local reason = signature_error(self, secret, object)
    if not reason then
        local n = select("#", ...)
        if n == 0 then
            reason = passes(object, default_spec())
        else
            for _, spec in ipairs({ ... }) do
                reason = passes(object, spec)
                if reason then break end
            end
        end
    end
    object.reason = reason or "everything is awesome~ :p"
    object.verified = reason == nil
    return object
end

--- `load_jwt` and `verify_jwt_obj` in one. @return table as theirs
function _M:verify(secret, token, ...)
    local key = secret
    if type(secret) == "function" then key = nil end
    local object = self:load_jwt(token, key)
    if not object.valid then
        return { verified = false, valid = false, reason = object.reason }
    end
    return self:verify_jwt_obj(secret, object, ...)
end

--- Certificates in the token (x5c, x5u) are not followed: the key is the caller's to choose.
function _M:set_trusted_certs_file()
    return nil, "not supported"
end

function _M:set_x5u_content_retriever()
    return nil, "not supported"
end

return _M
