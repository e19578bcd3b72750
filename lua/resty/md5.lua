--- md5 in pieces (lua-resty-string).

return require("moongate.digest")("md5")
