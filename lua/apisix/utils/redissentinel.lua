--- `apisix.utils.redissentinel`: a connection to the Redis that Sentinels watch, of a plugin's conf: `redis_sentinels` (array of
-- `{ host, port }`), `redis_master_name`, `redis_role` (`master` or `slave`), `sentinel_username`, `sentinel_password`,
-- `redis_username`, `redis_password`, `redis_database`, `redis_connect_timeout`, `redis_read_timeout` (milliseconds). Waits.
--
-- By Redis' "Guidelines for Redis clients with support for Redis Sentinel": Sentinels are asked in their order, and a new
-- connection is asked for its role.
local redis = require("resty.redis")
local lrucache = require("resty.lrucache")
local core = require("apisix.core")
local connection = require("apisix.utils.redis")
local md5 = ngx.md5
local concat = table.concat
local random = math.random
local find = string.find
local ipairs, tonumber, tostring, type = ipairs, tonumber, tostring, type

local _M = {}

-- Where the Redis of a conf is, so that not every request asks a Sentinel. A failure forgets it at once; a second is what a
-- failover may go unseen that breaks no connection.
local MAX_ADDRESSES, ADDRESS_TTL = 256, 1
local addresses = lrucache.new(MAX_ADDRESSES)

-- Idle connections per server and worker; the conf has no say in it.
local POOL_SIZE = 100
local DEFAULT_KEEPALIVE = 60000

local function client(conf)
    local red = redis:new()
    local connect, io = conf.redis_connect_timeout or 1000, conf.redis_read_timeout or 1000
    red:set_timeouts(connect, io, io)
    return red
end

local function id_of(conf)
    local parts = { conf.redis_master_name, conf.redis_role or "master" }
    for _, sentinel in ipairs(conf.redis_sentinels) do
        parts[#parts + 1] = sentinel.host .. ":" .. sentinel.port
    end
    return concat(parts, "#")
end

local function pool_of(host, port, username, password, database)
    return host .. ":" .. port .. "#" .. (database or 0) .. "#" .. (username or "") .. "#" .. (password and md5(password) or "")
        .. "#by sentinel"
end

local function keep(red, conf)
    local ok, err = red:set_keepalive(conf.redis_keepalive_timeout or DEFAULT_KEEPALIVE, POOL_SIZE)
    if not ok then
        core.log.info("failed to keep a connection of Redis: ", err)
    end
end

local function ask_for_master(red, conf)
    local reply, err = red:sentinel("get-master-addr-by-name", conf.redis_master_name)
    if type(reply) ~= "table" then
        return nil, err or "no master is known as " .. conf.redis_master_name
    end
    return { host = reply[1], port = tonumber(reply[2]) }
end

-- A replica that answers, another one each time.
local function ask_for_replica(red, conf)
    local reply, err = red:sentinel("replicas", conf.redis_master_name)
    if type(reply) ~= "table" then
        return nil, err
    end
    local healthy = {}
    for _, fields in ipairs(reply) do
        local replica = red:array_to_hash(fields)
        if not find(replica.flags or "", "down") and not find(replica.flags or "", "disconnected") then
            healthy[#healthy + 1] = { host = replica.ip, port = tonumber(replica.port) }
        end
    end
    if #healthy == 0 then
        return nil, "no replica of " .. conf.redis_master_name .. " is up"
    end
    return healthy[random(#healthy)]
end

-- What one Sentinel says: the address; or nil, why, and whether it was reached at all.
local function ask(sentinel, conf)
    local red = client(conf)
    local username, password = conf.sentinel_username, conf.sentinel_password
    local ok, err = red:connect(sentinel.host, sentinel.port,
        { pool = pool_of(sentinel.host, sentinel.port, username, password) })
    if not ok then
        return nil, err, false
    end
    if red:get_reused_times() == 0 then
        ok, err = connection.log_in(red, username, password)
        if not ok then
            red:close()
            return nil, err, true
        end
    end
    local address
    address, err = (conf.redis_role == "slave" and ask_for_replica or ask_for_master)(red, conf)
    if not address then
        red:close()
        return nil, err, true
    end
    keep(red, conf)
    return address
end

local function locate(conf)
    local unreached, refusal = {}, false
    for _, sentinel in ipairs(conf.redis_sentinels) do
        local address, err, reached = ask(sentinel, conf)
        if address then
            return address
        end
        if reached then
            refusal = refusal or err
        else
            unreached[#unreached + 1] = tostring(err)
        end
    end
    return nil, refusal or "no hosts available, previous_errors: " .. concat(unreached, ", ")
end

-- A Sentinel may be late to know of a failover: what it takes for the master says itself whether it is.
local function check_role(red, conf)
    local reply, err = red:role()
    if type(reply) ~= "table" then
        return nil, err
    end
    local wanted = conf.redis_role or "master"
    if reply[1] ~= wanted then
        return nil, "the server is a " .. tostring(reply[1]) .. ", not a " .. wanted
    end
    return true
end

local function prepare(red, conf)
    local ok, err = connection.log_in(red, conf.redis_username, conf.redis_password)
    if not ok then
        return nil, err
    end
    ok, err = check_role(red, conf)
    if not ok then
        return nil, err
    end
    return connection.select(red, conf)
end

local function connect(conf, address)
    local red = client(conf)
    local pool = pool_of(address.host, address.port, conf.redis_username, conf.redis_password, conf.redis_database)
    local ok, err = red:connect(address.host, address.port, { pool = pool })
    if not ok then
        return nil, err
    end
    return connection.ready(red, conf, prepare)
end

--- A connected client of lua-resty-redis, logged in, at its database, in its role; nil and the reason. Give it back with
-- `red:set_keepalive(conf.redis_keepalive_timeout)`, or close it and call `forget(conf)` when it failed.
function _M.new(conf)
    local id = id_of(conf)
    local address = addresses:get(id)
    if not address then
        local err
        address, err = locate(conf)
        if not address then
            return nil, "redis connection failed, err: " .. tostring(err)
        end
        addresses:set(id, address, ADDRESS_TTL)
    end
    local red, err = connect(conf, address)
    if not red then
        addresses:delete(id)
        return nil, "redis connection failed, err: " .. tostring(err)
    end
    return red
end

--- Forgets where the Redis of a conf is: the next `new` asks the Sentinels. Does not wait.
function _M.forget(conf)
    addresses:delete(id_of(conf))
end

return _M
