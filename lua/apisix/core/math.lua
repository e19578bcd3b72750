--- `core.math`.
local _M = setmetatable({}, { __index = math })

--- The greatest common divisor.
function _M.gcd(a, b)
    while b ~= 0 do
        a, b = b, a % b
    end
    return a
end

return _M
