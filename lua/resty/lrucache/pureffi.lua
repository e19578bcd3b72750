--- The same cache: LuaJIT tables serve as well here.

return require("resty.lrucache")
