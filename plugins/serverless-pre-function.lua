--- Runs Lua functions of the route before other plugins.
return require("apisix.utils.serverless")("serverless-pre-function", 10000)
