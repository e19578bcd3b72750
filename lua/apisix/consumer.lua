--- `apisix.consumer`: who a key belongs to, and attaching that consumer to the request.
--
-- Look-ups go to an index that the gateway keeps for every string field of an auth plugin's conf, so a hundred thousand
-- consumers cost what ten do. A consumer's table is made once per VM and version.
local native = require("moongate.native").apisix
local fast = require("moongate.native").fast
local secret = require("apisix.secret")
local ipairs, ngx, setmetatable, type = ipairs, ngx, setmetatable, type
local now = ngx.now

local consumers_version, attach_kept = fast.consumers_version, fast.attach_kept
local set_header = ngx.req.set_header

local _M = {}

-- What `attach_consumer` is given along with a consumer; one table, for its version is that of all consumers.
local conf_face = { conf_version = 0 }

-- Consumers that a VM remembers. At the bound it starts anew, at a cost of one decode per consumer in use.
local MAX_CONSUMERS = 10000

-- The shape that plugins know: the consumer's object, its names, and the conf of the auth plugin it was found by.
local function shape(consumer, username, revision, auth_conf, credential_id)
    consumer.consumer_name = consumer.username or username
    consumer.id = consumer.id or username
    consumer.modifiedIndex = revision
    consumer.auth_conf = auth_conf
    consumer.credential_id = credential_id
    consumer.custom_id = consumer.labels and consumer.labels.custom_id
    return consumer
end

-- Seconds after which references are looked at anew: a key that its manager has replaced is refused from then on.
local REFRESH_SECS = 60

-- plugin -> field -> value -> the reference that stands for it, of one version of the consumers, and until when.
local meant, meant_version, meant_until = {}, nil, nil

local function build(plugin_name, field, value)
    local consumer, username, revision, auth_conf, credential_id = native.consumer(plugin_name, field, value)
    if not consumer then
        return nil
    end
    local loaded = require("apisix.plugin").get(plugin_name)
    if loaded and loaded.check_schema then
        -- Fills the defaults of the consumer's conf.
        loaded.check_schema(auth_conf, require("apisix.core.schema").TYPE_CONSUMER)
    end
    if secret.has_secret_ref(auth_conf) then
        meant_until = meant_until or now() + REFRESH_SECS
        secret.fetch_in_place(auth_conf)
        if secret.has_secret_ref(auth_conf) then
            -- The text of a reference is known to all who may read confs: it must not pass for the password that it names.
            return nil
        end
    end
    return shape(consumer, username, revision, auth_conf, credential_id)
end

-- plugin -> field -> value -> consumer, of one version of the consumers: what a request costs is three table reads.
local found, found_count, found_version = {}, 0, nil

-- consumer -> the number by which the gateway attaches it. Anew with each version: what an older one found has none.
local kept = {}

local function forget()
    found, found_count, kept = {}, 0, {}
    native.forget_consumers()
end

local function remember(plugin_name, field, value, consumer)
    if found_count >= MAX_CONSUMERS then
        forget()
    end
    kept[consumer] = native.keep_consumer(consumer.consumer_name, consumer.credential_id, consumer.custom_id)
    local by_field = found[plugin_name] or {}
    found[plugin_name] = by_field
    local by_value = by_field[field] or {}
    by_field[field] = by_value
    by_value[value] = consumer
    found_count = found_count + 1
end

local function recall(plugin_name, field, value)
    local version = consumers_version()
    if version ~= found_version or meant_until and now() >= meant_until then
        forget()
        meant, meant_until = {}, nil
        found_version = version
        conf_face.conf_version = version
        return nil
    end
    local by_field = found[plugin_name]
    local by_value = by_field and by_field[field]
    return by_value and by_value[value]
end

-- The index knows what is written, so values behind references are looked up by the reference. The references are
-- resolved once per version and minute, by the first request that is not found otherwise.
local function reference_for(plugin_name, field, value)
    local version = consumers_version()
    if version ~= meant_version then
        meant, meant_version = {}, version
    end
    local by_field = meant[plugin_name] or {}
    meant[plugin_name] = by_field
    local by_value = by_field[field]
    if not by_value then
        by_value = {}
        for _, reference in ipairs(native.consumer_references(plugin_name, field)) do
            meant_until = meant_until or now() + REFRESH_SECS
            local resolved = secret.fetch_known(reference)
            if type(resolved) == "string" and resolved ~= "" then
                by_value[resolved] = reference
            end
        end
        by_field[field] = by_value
    end
    return by_value[value]
end

-- A reference is no credential: it stands in confs for all to read, and one that cannot be resolved admits nobody.
local function look_up(plugin_name, field, value)
    if secret.is_reference(value) then
        return nil
    end
    local consumer = build(plugin_name, field, value)
    if consumer then
        return consumer
    end
    local reference = reference_for(plugin_name, field, value)
    return reference and build(plugin_name, field, reference)
end

--- The consumer whose conf of `plugin_name` has `value` in `field`: the consumer, and `{ conf_version }` for
-- `attach_consumer`; nil when there is none.
function _M.find_consumer(plugin_name, field, value)
    if type(value) ~= "string" then
        return nil, nil, "the key is no string"
    end
    local recalled = recall(plugin_name, field, value)
    if recalled then
        return recalled, conf_face
    end
    local consumer = look_up(plugin_name, field, value)
    if not consumer then
        return nil, nil, "consumer not found"
    end
    remember(plugin_name, field, value, consumer)
    return consumer, conf_face
end

--- The consumer that stands for requests without credentials.
function _M.get_anonymous_consumer(username)
    local recalled = recall("", "username", username)
    if recalled then
        return recalled, conf_face
    end
    local object, revision = native.consumer_by_name(username)
    if not object then
        return nil, nil, "failed to get anonymous consumer " .. username
    end
    local consumer = shape(object, username, revision, {}, nil)
    remember("", "username", username, consumer)
    return consumer, conf_face
end

local kv_mt = {
    __index = function(self, value)
        return (_M.find_consumer(self._plugin, self._field, value))
    end,
}

--- A face over the index that reads like a table from key to consumer.
function _M.consumers_kv(plugin_name, _, field)
    return setmetatable({ _plugin = plugin_name, _field = field }, kv_mt)
end

--- What custom auth plugins ask for the version of the consumers they cached.
function _M.consumers_conf(plugin_name)
    return { conf_version = consumers_version(), nodes = _M.plugin(plugin_name).nodes }
end

--- Every consumer that has a conf of this plugin: `{ nodes = { consumer, … }, conf_version }`.
function _M.plugin(plugin_name)
    local version = consumers_version()
    local nodes = {}
    for _, entry in ipairs(native.consumers_with(plugin_name)) do
        nodes[#nodes + 1] = shape(entry.consumer, entry.username, entry.revision, entry.auth_conf, entry.credential_id)
    end
    return { nodes = nodes, len = #nodes, conf_version = version }
end

--- Every consumer: an array of items (`{ value, key, modifiedIndex }`) and its version. All phases.
function _M.consumers()
    return require("apisix.core").config.fetch_created_obj("/consumers")
end

local function attach_by_name(consumer)
    native.attach_consumer(consumer.consumer_name, consumer.credential_id)
    set_header("X-Consumer-Username", consumer.consumer_name)
    -- What the client says of itself does not count: nil removes it.
    set_header("X-Credential-Identifier", consumer.credential_id)
    set_header("X-Consumer-Custom-Id", consumer.custom_id)
end

--- Makes `consumer` the request's: its plugins join in, its headers go upstream, `ctx` and `$consumer_name` name it.
function _M.attach_consumer(ctx, consumer, conf)
    ctx.consumer = consumer
    ctx.consumer_name = consumer.consumer_name
    ctx.consumer_group_id = consumer.group_id
    ctx.consumer_ver = conf and conf.conf_version
    ctx.credential_id = consumer.credential_id
    ctx.headers = nil
    local number = kept[consumer]
    if not number or attach_kept(number) == 0 then
        attach_by_name(consumer)
    end
end

return _M
