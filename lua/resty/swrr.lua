--- `resty.swrr`: smooth weighted round robin (lua-resty-balancer's README), which `resty.roundrobin` is here as well.

return require("resty.roundrobin")
