--- `core.utils`: small things that plugins share.
local ngx = ngx
local type = type
local tonumber = tonumber
local tostring = tostring
local pairs = pairs
local sub = string.sub
local find = string.find
local byte = string.byte
local concat = table.concat

local bit = require("bit")
local bor, bxor = bit.bor, bit.bxor
local re_gmatch = ngx.re.gmatch
local native = require("moongate.native").apisix

local _M = {
}

local COLON, OPEN, DOLLAR, LBRACE, BACKSLASH = byte(":"), byte("["), byte("$"), byte("{"), byte("\\")

--- `host`, `host:port`, `[v6]:port` → host (brackets stay), port as a number or nil. An IPv6 address without brackets has
-- no port.
function _M.parse_addr(addr)
    if byte(addr, 1) == OPEN then
        local close = find(addr, "]", 1, true)
        if not close then
            return addr, nil
        end
        return sub(addr, 1, close), tonumber(sub(addr, close + 2))
    end
    local colon = find(addr, ":", 1, true)
    if not colon then
        return addr, nil
    end
    if find(addr, ":", colon + 1, true) then
        return addr, nil
    end
    return sub(addr, 1, colon - 1), tonumber(sub(addr, colon + 1))
end

--- The directory of a path.
function _M.dirname(path)
    return path:match("^(.*)/[^/]*$") or "."
end

--- A version-4 UUID.
function _M.uuid()
    return require("resty.jit-uuid").generate_v4()
end

--- The machine's name.
function _M.gethostname()
    return native.hostname()
end

--- Sleeps `secs`; parks the request.
function _M.sleep(secs)
    return ngx.sleep(secs)
end

--- Whether the text is `{…}` or `$name`: holds variables.
function _M.has_vars(text)
    return type(text) == "string" and find(text, "$", 1, true) ~= nil
end

-- A template is parsed once: literal texts and variable names in turn. Bounded: a conf's texts are few, but a plugin
-- may feed it request data.
local MAX_TEMPLATES = 4096
local templates, template_count = {}, 0

local NAME = "^[%w_]+"

local function parse_template(text)
    local parts, n = {}, 0
    local at, literal = 1, {}
    local len = #text
    while at <= len do
        local c = byte(text, at)
        if c == BACKSLASH and byte(text, at + 1) == DOLLAR then
            literal[#literal + 1] = "\\$"
            at = at + 2
        elseif c == DOLLAR then
            local braced = byte(text, at + 1) == LBRACE
            local name, default, stop
            if braced then
                stop = find(text, "}", at + 2, true)
                local inner = stop and sub(text, at + 2, stop - 1)
                local bar = inner and find(inner, "??", 1, true)
                if bar then
                    name = inner:sub(1, bar - 1):match("^%s*(.-)%s*$")
                    default = inner:sub(bar + 2):match("^%s*(.-)%s*$")
                else
                    name = inner and inner:match("^%s*(.-)%s*$")
                end
                if name and not name:match("^[%w_.%-]+$") then
                    name = nil
                end
            else
                name = text:match(NAME, at + 1)
                stop = name and at + #name
            end
            if name then
                n = n + 1
                parts[n] = { literal = concat(literal), name = name, default = default }
                literal = {}
                at = stop + 1
            else
                literal[#literal + 1] = "$"
                at = at + 1
            end
        else
            local next_at = find(text, "[$\\]", at + 1) or len + 1
            literal[#literal + 1] = sub(text, at, next_at - 1)
            at = next_at
        end
    end
    parts.tail = concat(literal)
    parts.n = n
    return parts
end

local function template(text)
    local parsed = templates[text]
    if not parsed then
        parsed = parse_template(text)
        if template_count >= MAX_TEMPLATES then
            templates, template_count = {}, 0
        end
        templates[text] = parsed
        template_count = template_count + 1
    end
    return parsed
end

--- Whether two texts are equal; how long it takes tells nothing of where they differ.
function _M.equal_in_constant_time(a, b)
    if type(a) ~= "string" or type(b) ~= "string" or #a ~= #b then
        return false
    end
    local difference = 0
    for i = 1, #a do
        difference = bor(difference, bxor(byte(a, i), byte(b, i)))
    end
    return difference == 0
end

--- The text that stands for a variable's value, for a key or a template: of a table its JSON, the same for equal ones; nil for
-- nil. Not in APISIX.
function _M.var_text(value)
    local kind = type(value)
    if kind == "string" or kind == "nil" then
        return value
    end
    return kind == "table" and require("apisix.core.json").stably_encode(value) or tostring(value)
end

--- Replaces `$name`, `${name}` and `${name ?? default}` by variables: the text, nil, and how many were found.
-- `\$` stays as it is. `escape(value)` is applied to each value.
function _M.resolve_var(text, vars, escape)
    if not text or not find(text, "$", 1, true) then
        return text, nil, 0
    end
    local parsed = template(text)
    local out, n, resolved = {}, 0, 0
    for i = 1, parsed.n do
        local part = parsed[i]
        local value = vars[part.name]
        if value == nil or value == "" and part.default then
            value = part.default or ""
        else
            resolved = resolved + 1
        end
        value = _M.var_text(value)
        out[n + 1] = part.literal
        out[n + 2] = escape and escape(value) or value
        n = n + 2
    end
    out[n + 1] = parsed.tail
    return concat(out, "", 1, n + 1), nil, resolved
end

--- Replaces `$1`, `$2`, `${1}` by what a regular expression captured: the text, nil, and how many were found.
function _M.resolve_var_with_captures(text, captures)
    if not text then
        return ""
    end
    local found = 0
    text = text:gsub("%$({?)(%d+)(}?)", function(open, i, close)
        if open ~= "" and close == "" then
            return nil
        end
        local value = captures[tonumber(i)]
        found = found + (value and 1 or 0)
        return (value or "") .. (open == "" and close or "")
    end)
    return text, nil, found
end

--- `a.b.c` → value inside nested tables.
function _M.get_path(tab, path)
    for name in path:gmatch("[^.]+") do
        if type(tab) ~= "table" then
            return nil
        end
        tab = tab[name]
    end
    return tab
end

--- Splits `/a/b?c=d` into path and query.
function _M.split_uri(uri)
    local question = find(uri, "?", 1, true)
    if not question then
        return uri, nil
    end
    return sub(uri, 1, question - 1), sub(uri, question + 1)
end

--- Warns of each of the fields of `conf` that is an http:// address, or an array with one.
function _M.check_https(fields, conf, plugin_name)
    local log = require("apisix.core.log")
    for _, field in pairs(fields) do
        local urls = conf[field]
        for _, url in pairs(type(urls) == "table" and urls or { urls }) do
            if type(url) == "string" and url:sub(1, 7) == "http://" then
                log.warn(
                    "Using ", plugin_name, " ", field, " with no TLS is a security risk"
                )
            end
        end
    end
end

--- Warns of each of the fields of `conf` that is false, such as `ssl_verify`.
function _M.check_tls_bool(fields, conf, plugin_name)
    local log = require("apisix.core.log")
    for _, field in pairs(fields) do
        if conf[field] == false then
            log.warn(
                "Keeping ", field, " disabled in ", plugin_name, " configuration is a security risk"
            )
        end
    end
end

local dns_client, servers

--- The DNS servers that `dns_parse` asks: an array of texts; config.yaml's or /etc/resolv.conf's until others are set.
function _M.get_resolver()
    if not servers then
        local apisix = require("apisix.core.config_local").local_conf().apisix
        servers = apisix and apisix.dns_resolver
        if not servers or #servers == 0 then
            servers = require("apisix.core.dns.client").system_servers()
        end
    end
    return servers
end

--- Has `dns_parse` of this VM ask these servers: an array of texts, with or without a port.
function _M.set_resolver(list)
    servers = list
    dns_client = require("apisix.core.dns.client").new({ nameservers = list })
end

--- The DNS record of a name: `{ name, address, type, class, ttl }`, an IPv6 address in brackets; with the selector
-- `core.dns.client.RETURN_ALL` an array of them. nil and the reason. Waits.
function _M.dns_parse(name, selector)
    if not dns_client then
        _M.set_resolver(_M.get_resolver())
    end
    return dns_client:resolve(name, selector)
end

--- A number from the system's source of randomness, to seed others with; nil and the reason.
function _M.get_seed_from_urandom()
    local bytes, err = require("moongate.native").crypto.random(8)
    if not bytes then
        return nil, err
    end
    local seed = 0
    for i = 1, #bytes do
        seed = 256 * seed + byte(bytes, i)
    end
    return seed
end

--- Whether `name` can be a header's name: visible ASCII without a colon.
function _M.validate_header_field(name)
    for i = 1, #name do
        local b = byte(name, i)
        if b <= 32 or b >= 127 or b == COLON then
            return false
        end
    end
    return true
end

--- Percent-encodes what a URI may not hold (RFC 3986); what is encoded and what delimits stays.
function _M.uri_safe_encode(uri)
    return (uri:gsub("[^%w%-%._~:/?#%[%]@!$&'()*+,;=%%]", function(c)
        return ("%%%02X"):format(byte(c))
    end))
end

--- Every match of `regex` in `text`, as an array.
function _M.match_all(text, regex)
    local out = {}
    local iterate, err = re_gmatch(text, regex, "jo")
    if not iterate then
        return nil, err
    end
    while true do
        local m = iterate()
        if not m then
            return out
        end
        out[#out + 1] = m[0]
    end
end

return _M
