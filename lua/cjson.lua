--- JSON: errors are raised. The implementation is native (src/lua/host/cjson.rs).

return require("moongate.native").cjson.new()
