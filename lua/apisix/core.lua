--- `apisix.core`: the library that plugins are written against (plugin-develop.md).
local log = require("apisix.core.log")

-- Looking these up on first use keeps a VM that runs few plugins small.
local lazy = {
    base64 = "apisix.core.base64",
    config = "apisix.core.config",
    config_util = "apisix.core.config_util",
    data_encryption = "apisix.core.data_encryption",
    dns_client = "apisix.core.dns.client",
    etcd = "apisix.core.etcd",
    event = "apisix.core.event",
    profile = "apisix.core.profile",
    pubsub = "apisix.core.pubsub",
}

local core = {
    version = require("apisix.core.version"),
    log = log,
    config_local = require("apisix.core.config_local"),
    table = require("apisix.core.table"),
    string = require("apisix.core.string"),
    json = require("apisix.core.json"),
    ctx = require("apisix.core.ctx"),
    schema = require("apisix.core.schema"),
    lrucache = require("apisix.core.lrucache"),
    request = require("apisix.core.request"),
    response = require("apisix.core.response"),
    ip = require("apisix.core.ip"),
    id = require("apisix.core.id"),
    io = require("apisix.core.io"),
    os = require("apisix.core.os"),
    env = require("apisix.core.env"),
    math = require("apisix.core.math"),
    timer = require("apisix.core.timer"),
    utils = require("apisix.core.utils"),
    resolver = require("apisix.core.resolver"),
    tablepool = require("tablepool"),
    empty_tab = require("apisix.core.table").empty_tab,
}

return setmetatable(core, {
    __index = function(self, name)
        local path = lazy[name]
        if not path then
            return nil
        end
        local module = require(path)
        rawset(self, name, module)
        return module
    end,
})
