--- sha256 in pieces (lua-resty-string).

return require("moongate.digest")("sha256")
