--- sha224 in pieces (lua-resty-string).

return require("moongate.digest")("sha224")
