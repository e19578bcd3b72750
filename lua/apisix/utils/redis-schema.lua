--- `apisix.utils.redis-schema`: what a plugin's conf says of its Redis, for `if`/`then` on its `policy`.
--
-- `schema.redis` and `schema["redis-cluster"]`: `{ properties, required }`. They are shared: copy before you add to them.
local _M = {}

local MS = { type = "integer", minimum = 1, default = 1000 }

_M.schema = {
    redis = {
        properties = {
            redis_host = { type = "string", minLength = 2 },
            redis_port = { type = "integer", minimum = 1, default = 6379 },
            redis_username = { type = "string", minLength = 1 },
            redis_password = { type = "string", minLength = 0 },
            redis_database = { type = "integer", minimum = 0, default = 0 },
            redis_timeout = MS,
            redis_ssl = { type = "boolean", default = false },
            redis_ssl_verify = { type = "boolean", default = false },
            redis_keepalive_timeout = { type = "integer", minimum = 1000, default = 10000 },
            redis_keepalive_pool = { type = "integer", minimum = 1, default = 100 },
        },
        required = { "redis_host" },
    },
    ["redis-cluster"] = {
        properties = {
            redis_cluster_nodes = {
                type = "array",
                minItems = 1,
                items = { type = "string", minLength = 2, maxLength = 100 },
            },
            redis_password = { type = "string", minLength = 0 },
            redis_timeout = MS,
            redis_cluster_name = { type = "string" },
            redis_cluster_ssl = { type = "boolean", default = false },
            redis_cluster_ssl_verify = { type = "boolean", default = false },
            redis_keepalive_timeout = { type = "integer", minimum = 1000, default = 10000 },
            redis_keepalive_pool = { type = "integer", minimum = 1, default = 100 },
        },
        required = { "redis_cluster_nodes", "redis_cluster_name" },
    },
}

return _M
