--- `core.etcd`: the store of the gateway's configuration: etcd, or the embedded one, with the same results.
--
-- Keys are relative to the prefix of `deployment.etcd` (`/routes/1`), values are Lua values that are stored as JSON. A call waits
-- for the store (rewrite, access, content, timers, `init`); what it wrote is served when it returns. Results are those of etcd's
-- HTTP API as APISIX shows them: `res.status` (200; 201 made; 404 not there), `res.headers["X-Etcd-Index"]` (the store's
-- revision), `res.body.node` = `{ key, value, createdIndex, modifiedIndex }` with the whole key. What cannot be done gives nil and the
-- reason. Uploaded functions have no `core.etcd`.
local cjson = require("cjson.safe")
local log = require("apisix.core.log")
local config_local = require("apisix.core.config_local")
local native = require("moongate.native").store
require("moongate.chunk").refuse_in_sandbox("apisix.core.etcd")

local error, format, ipairs, setmetatable, tonumber, tostring, type =
    error, string.format, ipairs, setmetatable, tonumber, tostring, type

local _M = {}

-- Tries of a `push` that others' writes get in the way of.
local PUSH_TRIES = 16

local DATA_PLANE = "Data plane role should not write to etcd. This operation will be deprecated in future releases."

local function deployment()
    return config_local.local_conf().deployment or {}
end

--- The prefix of every key: `/apisix`.
local function prefix()
    local etcd = deployment().etcd
    local text = etcd and etcd.prefix
    return ((text or "/apisix"):gsub("/+$", ""))
end

local function warn_of_data_plane()
    if deployment().role == "data_plane" then
        log.warn(DATA_PLANE)
    end
end

-- A key begins with a slash here whether or not it was given one.
local function relative(key)
    if type(key) ~= "string" then
        error("the key of an etcd call must be a string, got " .. type(key), 3)
    end
    return key:sub(1, 1) == "/" and key or "/" .. key
end

local function decoded(text)
    local value = cjson.decode(text)
    if value == nil then
        return text
    end
    return value
end

local function kv_of(entry, start)
    return {
        key = start .. entry.key,
        value = decoded(entry.value),
        create_revision = tostring(entry.created),
        mod_revision = tostring(entry.modified),
    }
end

local function response(revision)
    return { status = 200, headers = {}, body = { header = { revision = tostring(revision) } } }
end

-- What etcd itself answers for one key, or for all that begin with it.
local function read(key, is_dir)
    local start = prefix()
    local ask = is_dir and native.list or native.get
    local found, revision = ask(key)
    if found == nil then
        return nil, revision
    end
    local res = response(revision)
    local kvs = {}
    if is_dir then
        for i, entry in ipairs(found) do
            kvs[i] = kv_of(entry, start)
        end
    elseif found then
        kvs[1] = kv_of(found, start)
    end
    if #kvs > 0 then
        res.body.kvs = kvs
        res.body.count = tostring(#kvs)
    end
    return res
end

local function node_of(kv)
    return {
        key = kv.key,
        value = kv.value,
        createdIndex = tonumber(kv.create_revision),
        modifiedIndex = tonumber(kv.mod_revision),
    }
end

local function refused(body)
    if body.error == "etcdserver: user name is empty" then
        return "insufficient credentials code: 401"
    end
    if body.error == "etcdserver: permission denied" then
        return "etcd forbidden code: 403"
    end
end

local function set_revision(res)
    local header = res.body.header
    if not header or not header.revision then
        return nil, "etcd response missing header.revision"
    end
    res.headers["X-Etcd-Index"] = header.revision
    return true
end

local function not_found(res)
    res.status = 404
    res.reason = "Not found"
    res.body = { message = "Key not found", header = res.body.header }
    return res
end

--- Gives the answer of etcd's `range` the form of `get`'s results.
-- @param res table: `{ headers, body = { header = { revision }, kvs } }`, which is changed
-- @param real_key string: the whole key that was asked for
-- @param is_dir boolean: whether all keys were asked for that begin with it
-- @param formatter function?: is given the answer and makes the result
-- @return table; nil, err
function _M.get_format(res, real_key, is_dir, formatter)
    local why = refused(res.body)
    if why then
        return nil, why
    end
    local ok, err = set_revision(res)
    if not ok then
        return nil, err
    end
    local kvs = res.body.kvs
    if not kvs then
        return not_found(res)
    end
    if formatter then
        return formatter(res)
    end
    res.body.action = "get"
    res.body.kvs = nil
    if not is_dir then
        res.body.node = node_of(kvs[1])
        return res
    end
    local nodes = {}
    for _, kv in ipairs(kvs) do
        -- A key that is the directory itself is none of what is in it.
        if kv.key:sub(-1) ~= "/" and kv.value ~= nil then
            nodes[#nodes + 1] = node_of(kv)
        end
    end
    local admin = deployment().admin
    if admin and admin.admin_api_version == "v2" then
        res.body.node = { key = real_key, dir = true, nodes = nodes }
    else
        res.body.list = setmetatable(nodes, cjson.array_mt)
        res.body.total = #nodes
    end
    return res
end

--- Gives an event of etcd's `watch` the form of `get`'s results: one node per change, without a value where the key is gone.
-- @param res table: `{ result = { header = { revision }, events = { { type, kv } } } }`
-- @return table
function _M.watch_format(res)
    local nodes = {}
    for i, event in ipairs(res.result.events or {}) do
        local node = node_of(event.kv)
        if event.type == "DELETE" then
            node.value = nil
        end
        nodes[i] = node
    end
    return { status = 200, headers = { ["X-Etcd-Index"] = res.result.header.revision }, body = { node = nodes } }
end

--- One key, or all that begin with it.
-- @param key string @param is_dir boolean?: all keys that begin with `key`: `res.body.list`, an array of nodes, and `res.body.total`
-- @return table; nil, err
function _M.get(key, is_dir)
    key = relative(key)
    local res, err = read(key, is_dir)
    if not res then
        return nil, err
    end
    return _M.get_format(res, prefix() .. key, is_dir)
end

-- The result of a write.
local function written(key, value, revision, previous, lease)
    local res = response(revision)
    res.headers["X-Etcd-Index"] = res.body.header.revision
    res.body.action = "set"
    res.body.node = {
        key = prefix() .. key,
        value = value,
        createdIndex = previous and previous.created or revision,
        modifiedIndex = revision,
    }
    if not previous then
        res.status, res.reason = 201, "Created"
    end
    res.body.lease_id = lease
    return res
end

local function write(key, value, ttl, modified)
    local text, encode_err = cjson.encode(value)
    if not text then
        return nil, encode_err
    end
    local revision, previous, lease = native.put(key, text, modified, ttl)
    if not revision then
        -- The third result says that somebody else has written.
        return nil, previous, lease
    end
    return written(key, value, revision, previous, lease)
end

--- Writes a key, as the Admin API does but unchecked: what is no valid object of its kind is not served.
-- @param key string @param value any: what JSON can say @param ttl number?: seconds after which the key goes; `keepalive` takes
-- `res.body.lease_id` to give it as many again
-- @return table; nil, err
function _M.set(key, value, ttl)
    warn_of_data_plane()
    local res, err = write(relative(key), value, ttl)
    return res, err
end

--- Writes a key unless it was changed.
-- @param mod_revision number|string: the `modifiedIndex` that it must have; 0 or nil: it must not exist
-- @return table; nil, "value changed before overwritten"; nil, err
function _M.atomic_set(key, value, ttl, mod_revision)
    warn_of_data_plane()
    local res, err, conflict = write(relative(key), value, ttl, tonumber(mod_revision) or 0)
    if conflict then
        return nil, "value changed before overwritten"
    end
    return res, err
end

--- Writes under a key of its own in the directory `key`; a table gets it as its `id`.
-- @param key string: `/routes` @param value any @param ttl number?
-- @return table: `res.body.action` is "create"; nil, err
function _M.push(key, value, ttl)
    warn_of_data_plane()
    key = relative(key)
    for _ = 1, PUSH_TRIES do
        local found, revision = native.get(key)
        if found == nil then
            return nil, revision
        end
        local id = format("%020d", revision + 1)
        if type(value) == "table" then
            value.id = id
        end
        local res, err, conflict = write(key .. "/" .. id, value, ttl, 0)
        if res then
            res.body.action = "create"
            return res
        end
        if not conflict then
            return nil, err
        end
    end
    return nil, "value changed before overwritten"
end

local function deleted(key, found, revision)
    local res = response(revision)
    res.headers["X-Etcd-Index"] = res.body.header.revision
    if not found then
        return not_found(res)
    end
    res.body.action = "delete"
    res.body.deleted = "1"
    res.body.node = {}
    res.body.key = prefix() .. key
    return res
end

--- Takes a key away. @return table: 404 when there is none; nil, err
function _M.delete(key)
    warn_of_data_plane()
    key = relative(key)
    local found, revision = native.delete(key)
    if found == nil then
        return nil, revision
    end
    return deleted(key, found, revision)
end

-- Each key by itself: what others write meanwhile stays.
local function remove_all(key)
    local entries, revision = native.list(key)
    if not entries then
        return nil, revision
    end
    local count = 0
    for _, entry in ipairs(entries) do
        local found, at = native.delete(entry.key)
        if found == nil then
            return nil, at
        end
        revision, count = at, count + (found and 1 or 0)
    end
    local res = deleted(key, count > 0, revision)
    res.body.deleted = tostring(count)
    return res
end

--- Takes a key away.
-- @param key string @param opts table?: `prefix = true`: all keys that begin with it
-- @return table: `res.body.deleted` keys; 404 when there was none; nil, err
function _M.rmdir(key, opts)
    warn_of_data_plane()
    key = relative(key)
    if opts and opts.prefix then
        return remove_all(key)
    end
    return _M.delete(key)
end

--- Gives what `set` wrote with a `ttl` that time again.
-- @param id string|number: the `lease_id` of `set` @return table: `res.body.result` = `{ ID, TTL }`, or `res.body.error` when it is
-- gone; nil, err
function _M.keepalive(id)
    warn_of_data_plane()
    local secs, err = native.keep_alive(tostring(id))
    if secs == nil then
        return nil, err
    end
    if not secs then
        return nil, "lease not found: " .. tostring(id)
    end
    return { status = 200, headers = {}, body = { result = { ID = tostring(id), TTL = tostring(secs) } } }
end

-- The client that `new` gives: whole keys, and etcd's own answers with decoded values.
local Client = {}
Client.__index = Client

-- The part of a whole key that the store knows; keys beside the prefix belong to others.
local function within(key)
    local start = prefix()
    if type(key) ~= "string" or key:sub(1, #start + 1) ~= start .. "/" then
        return nil, "key " .. tostring(key) .. " is not under the prefix " .. start
    end
    return key:sub(#start + 1)
end

-- etcd's answer to a write.
local function raw(res, err)
    if not res then
        return nil, err
    end
    local body = { header = res.body.header, deleted = res.body.deleted }
    return { status = 200, headers = res.headers, body = body }
end

local function client_write(key, value, opts, modified)
    warn_of_data_plane()
    local own, err = within(key)
    if not own then
        return nil, err
    end
    local res, write_err, conflict = write(own, value, opts and opts.ttl, modified)
    if conflict then
        local answer = response(0)
        answer.body.succeeded = false
        return answer
    end
    res, err = raw(res, write_err)
    if res and modified then
        res.body.succeeded = true
    end
    return res, err
end

local function client_read(key, is_dir)
    local own, err = within(key)
    if not own then
        return nil, err
    end
    return read(own, is_dir)
end

--- One key. @return table: `res.body.kvs`; nil, err
function Client.get(_, key)
    return client_read(key, false)
end

--- All keys that begin with `key`. @return table: `res.body.kvs`; nil, err
function Client.readdir(_, key)
    return client_read(key, true)
end

--- Writes a key. @param opts table?: `ttl`, seconds @return table; nil, err
function Client.set(_, key, value, opts)
    return client_write(key, value, opts)
end

--- Writes a key that does not exist. @return table: `res.body.succeeded`; nil, err
function Client.setnx(_, key, value, opts)
    return client_write(key, value, opts, 0)
end

--- Writes a key that exists. @return table: `res.body.succeeded`; nil, err
function Client.setx(self, key, value, opts)
    local found, err = self:get(key)
    if not found then
        warn_of_data_plane()
        return nil, err
    end
    local kv = found.body.kvs and found.body.kvs[1]
    -- No key has this revision.
    return client_write(key, value, opts, kv and tonumber(kv.mod_revision) or -1)
end

--- Takes a key away. @return table: `res.body.deleted`; nil, err
function Client.delete(_, key)
    local own, err = within(key)
    if not own then
        warn_of_data_plane()
        return nil, err
    end
    return raw(_M.delete(own))
end

--- Takes a key away, or with `opts.prefix` all that begin with it. @return table: `res.body.deleted`; nil, err
function Client.rmdir(_, key, opts)
    local own, err = within(key)
    if not own then
        warn_of_data_plane()
        return nil, err
    end
    return raw(_M.rmdir(own, opts))
end

--- The store has no lease without a key. @return nil, err
function Client.grant()
    warn_of_data_plane()
    return nil, "a lease is made with its key: set(key, value, { ttl = seconds })"
end

--- A lease ends with its key. @return nil, err
function Client.revoke()
    warn_of_data_plane()
    return nil, "a lease ends with its key: delete the key"
end

--- As `core.etcd.keepalive`.
function Client.keepalive(_, id)
    return _M.keepalive(id)
end

--- The version of the server that stores. @return table: `res.body.etcdserver`; nil, err
function Client.version()
    local version, err = native.version()
    if not version then
        return nil, err
    end
    return { status = 200, headers = {}, body = { etcdserver = version, etcdcluster = version } }
end

--- A client of whole keys (`/apisix/routes/1`), and the prefix.
-- @return table, string
function _M.new()
    return setmetatable({}, Client), prefix()
end

_M.new_without_proxy = _M.new
_M.get_etcd_syncer = _M.new

--- The version of the server that stores, by a client of `new` or none. @return table: `res.body.etcdserver`; nil, err
function _M.server_version()
    return Client.version()
end

return _M
