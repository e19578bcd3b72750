--- `apisix.secret.aws`: AWS Secrets Manager (terminology/secret.md; AWS' API reference, GetSecretValue; Signature Version 4).
-- Waits.
local core = require("apisix.core")
local http = require("resty.http")
local crypto = require("moongate.native").crypto
local digest, hmac, hex = crypto.digest, crypto.hmac, crypto.hex
local os_date, time = os.date, ngx.time
local sub, type = string.sub, type

local _M = {}

--- JSON Schema of `/apisix/admin/secrets/aws/{id}`.
_M.schema = core.schema.of_secret_manager("aws")

-- For connecting, sending and each read. Requests wait for it.
local TIMEOUT_MS = 5000
local DEFAULT_REGION = "us-east-1"
local SERVICE = "secretsmanager"
local TARGET = "secretsmanager.GetSecretValue"
local CONTENT_TYPE = "application/x-amz-json-1.1"
-- Names that a key is tried as: each is a request to AWS.
local MAX_SEGMENTS = 16

-- A credential may stand in the environment.
local function plain(text)
    return text and (core.env.fetch_by_uri(text) or text)
end

local function signing_key(secret, day, region)
    local key = hmac("sha256", "AWS4" .. secret, day)
    key = hmac("sha256", key, region)
    key = hmac("sha256", key, SERVICE)
    return hmac("sha256", key, "aws4_request")
end

-- AWS' documentation, "Create a signed AWS API request": what is signed are these headers, in this order.
local function signed_headers(conf, host, path, body)
    local now = time()
    local stamp, day = os_date("!%Y%m%dT%H%M%SZ", now), os_date("!%Y%m%d", now)
    local region = conf.region or DEFAULT_REGION
    local token = plain(conf.session_token)
    local names = token and "content-type;host;x-amz-date;x-amz-security-token;x-amz-target"
        or "content-type;host;x-amz-date;x-amz-target"
    local canonical = "POST\n" .. path .. "\n\n"
        .. "content-type:" .. CONTENT_TYPE .. "\nhost:" .. host .. "\nx-amz-date:" .. stamp .. "\n"
        .. (token and "x-amz-security-token:" .. token .. "\n" or "")
        .. "x-amz-target:" .. TARGET .. "\n\n" .. names .. "\n" .. hex(digest("sha256", body))
    local scope = day .. "/" .. region .. "/" .. SERVICE .. "/aws4_request"
    local to_sign = "AWS4-HMAC-SHA256\n" .. stamp .. "\n" .. scope .. "\n" .. hex(digest("sha256", canonical))
    local signature = hex(hmac("sha256", signing_key(plain(conf.secret_access_key), day, region), to_sign))
    return {
        ["Host"] = host,
        ["Content-Type"] = CONTENT_TYPE,
        ["X-Amz-Date"] = stamp,
        ["X-Amz-Target"] = TARGET,
        ["X-Amz-Security-Token"] = token,
        ["Authorization"] = "AWS4-HMAC-SHA256 Credential=" .. plain(conf.access_key_id) .. "/" .. scope
            .. ", SignedHeaders=" .. names .. ", Signature=" .. signature,
    }
end

local function endpoint_of(conf)
    return conf.endpoint_url or "https://" .. SERVICE .. "." .. (conf.region or DEFAULT_REGION) .. ".amazonaws.com"
end

-- Whether an error is about the request rather than about now (AWS' API reference, "Common Error Types").
local function is_final(status, kind)
    return status >= 400 and status < 500 and status ~= 408 and status ~= 429
        and not (kind and (kind:find("Throttl", 1, true) or kind:find("LimitExceeded", 1, true)))
end

-- What the secret of that name holds; nil, why not, AWS' name for the error, and whether asking again is of no use.
local function read(conf, name)
    local client = http.new()
    client:set_timeout(TIMEOUT_MS)
    local endpoint = endpoint_of(conf)
    local parsed, err = client:parse_uri(endpoint)
    if not parsed then
        return nil, err
    end
    local scheme, host, port, path = parsed[1], parsed[2], parsed[3], parsed[4]
    local authority = port == (scheme == "https" and 443 or 80) and host or host .. ":" .. port
    path = path ~= "" and path or "/"
    local body = core.json.encode({ SecretId = name, VersionStage = "AWSCURRENT" })
    local response
    response, err = client:request_uri(endpoint, {
        method = "POST", path = path, body = body, headers = signed_headers(conf, authority, path, body),
    })
    if not response then
        return nil, "SecretsManager:getSecretValue() failed to connect to '" .. endpoint .. "': " .. err
    end
    local answer = core.json.decode(response.body)
    if response.status ~= 200 then
        local kind = type(answer) == "table" and type(answer.__type) == "string" and answer.__type or nil
        return nil, "SecretsManager:getSecretValue() was answered " .. response.status .. ": " .. (kind or "no error of AWS' API"),
            kind, is_final(response.status, kind)
    end
    if type(answer) ~= "table" or type(answer.SecretString) ~= "string" then
        return nil, "the secret " .. name .. " is no text", nil, type(answer) == "table"
    end
    return answer.SecretString
end

local function field_of(text, field)
    if not field then
        return text
    end
    local fields, err = core.json.decode(text)
    if type(fields) ~= "table" then
        return nil, "failed to decode result, err: " .. (err or "it is no object"), true
    end
    return fields[field]
end

local function is_unknown(kind)
    return kind and kind:find("ResourceNotFoundException", 1, true)
end

-- What the longest name that there is holds, and what of the key is left for a field; nil, nil, why not, and whether asking again is
-- of no use.
local function read_longest(conf, key)
    local name, field = key, nil
    local last
    for _ = 1, MAX_SEGMENTS do
        local text, err, kind, final = read(conf, name)
        if text or not is_unknown(kind) then
            return text, field, err, final
        end
        last = err
        local slash = core.string.rfind_char(name, "/")
        if not slash or slash == 1 then
            break
        end
        field = sub(key, slash + 1)
        name = sub(key, 1, slash - 1)
    end
    return nil, nil, last, true
end

--- The value of `key`: a secret's name, or its name and a field of its JSON after a slash; the longest name that exists is
-- taken. nil when the secret has no such field; nil and the reason, and true when that is AWS' last word.
function _M.get(conf, key)
    core.log.info("fetching data from aws for key: ", key)
    if sub(key, 1, 1) == "/" or key == "" then
        return nil, "can't find main key, key: " .. key, true
    end
    local text, field, err, final = read_longest(conf, key)
    if not text then
        return nil, "failed to retrieve data from aws secret manager: " .. err, final
    end
    return field_of(text, field)
end

return _M
