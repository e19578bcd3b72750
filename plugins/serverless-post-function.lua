--- Runs Lua functions of the route after other plugins.
return require("apisix.utils.serverless")("serverless-post-function", -2000)
