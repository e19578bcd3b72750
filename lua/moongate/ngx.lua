--- Completes the global `ngx` with what is better said in Lua: facades over FFI that the JIT compiles.

local re = require("moongate.re")

ngx.re = { match = re.match, find = re.find, gmatch = re.gmatch, sub = re.sub, gsub = re.gsub }
