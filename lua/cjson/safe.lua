--- JSON: `encode` and `decode` return nil and the error.

return require("moongate.native").cjson.new_safe()
