--- `apisix.discovery.dns.schema`: what `discovery.dns` of config.yaml may say (discovery/dns.md).
return {
    type = "object",
    properties = {
        servers = {
            type = "array",
            minItems = 1,
            items = { type = "string", minLength = 1 },
        },
        resolv_conf = { type = "string", minLength = 1 },
        order = {
            type = "array",
            minItems = 1,
            maxItems = 5,
            uniqueItems = true,
            items = { enum = { "last", "SRV", "A", "AAAA", "CNAME" } },
        },
    },
    oneOf = { { required = { "servers" } }, { required = { "resolv_conf" } } },
}
