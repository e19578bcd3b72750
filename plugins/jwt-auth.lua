--- Identifies the consumer by a JSON Web Token (RFC 7519) in a header, the query or a cookie.
local core = require("apisix.core")
local auth = require("apisix.utils.auth")
local consumer_mod = require("apisix.consumer")
local jwt = require("moongate.native").jwt
local ngx_decode = ngx.decode_base64
local ngx_time = ngx.time
local sub, gsub, lower = string.sub, string.gsub, string.lower
local ipairs, type, pcall = ipairs, type, pcall

local name = "jwt-auth"
local schemas = core.schema.of_plugin(name)

local _M = {
    version = 0.1,
    priority = 2510,
    type = "auth",
    name = name,
    schema = schemas.schema,
    consumer_schema = schemas.consumer_schema,
}

-- Claims that are checked when the conf names none.
local DEFAULT_CLAIMS = { "exp", "nbf" }

local function check_consumer(conf)
    local ok, err = core.schema.check(_M.consumer_schema, conf)
    if not ok then
        return false, err
    end
    local is_hmac = sub(conf.algorithm, 1, 2) == "HS"
    if is_hmac and not conf.secret then
        return false, "property \"secret\" is required when using HS based algorithms"
    end
    if conf.base64_secret and conf.secret and not ngx_decode(conf.secret) then
        return false, "base64_secret required but the secret is not in base64 format"
    end
    if not is_hmac and not conf.public_key then
        return false, "missing valid public key"
    end
    return true
end

function _M.check_schema(conf, schema_type)
    if schema_type == core.schema.TYPE_CONSUMER then
        return check_consumer(conf)
    end
    return core.schema.check(_M.schema, conf)
end

local function without_scheme(value)
    local scheme = lower(sub(value, 1, 7))
    return scheme == "bearer " and sub(value, 8) or value
end

local function from_header(conf, ctx)
    local value = core.request.header(ctx, conf.header)
    if not value then
        return nil
    end
    if conf.hide_credentials then
        core.request.set_header(ctx, conf.header, nil)
    end
    return without_scheme(value)
end

local function from_query(conf, ctx)
    local args = core.request.get_uri_args(ctx)
    local value = args[conf.query]
    value = type(value) == "table" and value[1] or value
    -- `?jwt` without a value is true.
    if type(value) ~= "string" then
        return nil
    end
    if conf.hide_credentials then
        args[conf.query] = nil
        core.request.set_uri_args(ctx, args)
    end
    return value
end

local function hide_cookie(conf, ctx)
    local kept = {}
    for pair in (core.request.header(ctx, "Cookie") or ""):gmatch("[^;]+") do
        pair = gsub(pair, "^%s+", "")
        if pair:match("^[^=]*") ~= conf.cookie then
            kept[#kept + 1] = pair
        end
    end
    core.request.set_header(ctx, "Cookie", kept[1] and table.concat(kept, "; ") or nil)
end

local function from_cookie(conf, ctx)
    local value = ctx.var["cookie_" .. conf.cookie]
    if not value then
        return nil
    end
    if conf.hide_credentials then
        hide_cookie(conf, ctx)
    end
    return value
end

local function fetch_token(conf, ctx)
    return from_header(conf, ctx) or from_query(conf, ctx) or from_cookie(conf, ctx)
end

local function decode_part(text)
    local padded = gsub(gsub(text, "-", "+"), "_", "/") .. string.rep("=", -#text % 4)
    return ngx_decode(padded)
end

local function decode_json(text)
    local bytes = decode_part(text)
    local value = bytes and core.json.decode(bytes)
    return type(value) == "table" and value or nil
end

-- { header, payload, signature, signed }, or nil and what is wrong.
local function parse(token)
    local head, payload, signature = token:match("^([^.]*)%.([^.]*)%.([^.]*)$")
    if not head then
        return nil, "invalid jwt string"
    end
    local parsed = { header = decode_json(head) }
    if not parsed.header then
        return nil, "invalid header: " .. head
    end
    parsed.payload = decode_json(payload)
    if not parsed.payload then
        return nil, "invalid payload: " .. payload
    end
    -- One that is no base64url is as wrong as any other that does not fit.
    parsed.signature = decode_part(signature) or ""
    parsed.raw_signature = signature
    parsed.signed = head .. "." .. payload
    return parsed
end

local function verification_key(conf)
    if sub(conf.algorithm, 1, 2) ~= "HS" then
        return conf.public_key
    end
    return conf.base64_secret and ngx_decode(conf.secret) or conf.secret
end

-- True, or false and which claim does not hold now.
local function check_claims(claims, payload, leeway)
    local now = ngx_time()
    for _, claim in ipairs(claims) do
        local value = payload[claim]
        if value ~= nil and type(value) ~= "number" then
            return false, "'" .. claim .. "' is malformed.  Expected to be a positive numeric value."
        end
        if claim == "exp" and value and value + leeway <= now then
            return false, "'exp' claim expired at " .. ngx.http_time(value)
        end
        if claim == "nbf" and value and value - leeway > now then
            return false, "'nbf' claim not valid until " .. ngx.http_time(value)
        end
    end
    return true
end

local function verify(conf, parsed, consumer_conf)
    if parsed.header.alg ~= consumer_conf.algorithm then
        return false, "algorithm mismatch, expected " .. consumer_conf.algorithm
    end
    local ran, ok, err =
        pcall(jwt.verify, consumer_conf.algorithm, verification_key(consumer_conf), parsed.signed, parsed.signature)
    if not ran or not ok then
        return false, (ran and err or ok) or "signature mismatch: " .. parsed.raw_signature
    end
    -- An empty list names no claims; it does not make expired tokens good.
    local claims = conf.claims_to_verify
    if not claims or #claims == 0 then
        claims = DEFAULT_CLAIMS
    end
    return check_claims(claims, parsed.payload, consumer_conf.lifetime_grace_period or 0)
end

local function identify(conf, ctx)
    local token = fetch_token(conf, ctx)
    if not token then
        return nil, nil, "Missing JWT token in request"
    end
    local parsed, err = parse(token)
    if not parsed then
        core.log.warn("JWT token invalid: ", err)
        return nil, nil, "JWT token invalid"
    end
    local key = parsed.payload[conf.key_claim_name]
    if not key then
        return nil, nil, "missing user key in JWT token"
    end
    local consumer, consumer_conf = consumer_mod.find_consumer(name, "key", key)
    if not consumer then
        core.log.warn("failed to find consumer: invalid user key in JWT token")
        return nil, nil, "Invalid user key in JWT token"
    end
    local ok, reason = verify(conf, parsed, consumer.auth_conf)
    if not ok then
        core.log.warn("failed to verify jwt: ", reason)
        return nil, nil, "failed to verify jwt"
    end
    if conf.store_in_ctx then
        ctx.jwt_auth_payload = parsed.payload
    end
    return consumer, consumer_conf
end

function _M.rewrite(conf, ctx)
    local consumer, consumer_conf, err = identify(conf, ctx)
    if not consumer and conf.anonymous_consumer then
        consumer, consumer_conf, err = consumer_mod.get_anonymous_consumer(conf.anonymous_consumer)
        if not consumer then
            core.response.set_header("WWW-Authenticate", 'Bearer realm="' .. conf.realm .. '"')
            return auth.refuse_anonymous(err)
        end
    end
    if not consumer then
        core.response.set_header("WWW-Authenticate", 'Bearer realm="' .. conf.realm .. '"')
        return 401, { message = err }
    end
    consumer_mod.attach_consumer(ctx, consumer, consumer_conf)
end

return _M
