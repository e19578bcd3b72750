--- sha512 in pieces (lua-resty-string).

return require("moongate.digest")("sha512")
