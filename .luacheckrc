-- What nginx's Lua gives a script: LuaJIT's globals and `ngx`.
std = "ngx_lua"
max_line_length = 140
exclude_files = { "target/" }

-- A method keeps its place for `self` also where it does not need it.
self = false

-- These make the globals that others only read.
files["lua/moongate"] = { globals = { "ngx", "table", "coroutine", "string", "io" } }
