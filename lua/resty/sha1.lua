--- sha1 in pieces (lua-resty-string).

return require("moongate.digest")("sha1")
