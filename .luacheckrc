-- What nginx's Lua gives a script: LuaJIT's globals and a writable `ngx`.
std = "ngx_lua"
max_line_length = 140
exclude_files = { "target/" }
