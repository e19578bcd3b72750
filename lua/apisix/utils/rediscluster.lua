--- `apisix.utils.rediscluster`: a client of the Redis Cluster of a plugin's conf (`apisix.utils.redis-schema`). Waits.
local rediscluster = require("resty.rediscluster")
local core = require("apisix.core")
local concat = table.concat
local ipairs = ipairs

local _M = {}

local function nodes_of(conf)
    local out = {}
    for i, address in ipairs(conf.redis_cluster_nodes) do
        local host, port = core.utils.parse_addr(address)
        if not host or not port then
            return nil, "failed to parse redis cluster node " .. address .. ": it is no host:port"
        end
        out[i] = { ip = host, port = port }
    end
    return out
end

--- A client of resty.rediscluster; nil and the reason.
function _M.new(conf)
    local nodes, err = nodes_of(conf)
    if not nodes then
        return nil, err
    end
    local client
    client, err = rediscluster:new({
        -- Two clusters that somebody gave the same name are not one.
        name = conf.redis_cluster_name .. "@" .. concat(conf.redis_cluster_nodes, ","),
        serv_list = nodes,
        auth = conf.redis_password,
        connect_timeout = conf.redis_timeout,
        read_timeout = conf.redis_timeout,
        send_timeout = conf.redis_timeout,
        keepalive_timeout = conf.redis_keepalive_timeout,
        keepalive_cons = conf.redis_keepalive_pool,
        connect_opts = { ssl = conf.redis_cluster_ssl, ssl_verify = conf.redis_cluster_ssl_verify },
    })
    if not client then
        return nil, err
    end
    return client
end

return _M
