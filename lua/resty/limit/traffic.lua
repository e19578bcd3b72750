--- `resty.limit.traffic`: several limiters as one (lua-resty-limit-traffic's README). Never waits.

local max = math.max

local _M = { _VERSION = "0.09" }

--- Asks all limiters; only when each lets the request pass it counts for any of them.
-- @param limiters table: objects with `incoming` and `uncommit`
-- @param keys table: the key for each
-- @param states table?: gets the second result of each
-- @return the longest delay in seconds; nil, "rejected" or another error
function _M.combine(limiters, keys, states)
    local n = #limiters
    for i = 1, n - 1 do
        local delay, err = limiters[i]:incoming(keys[i], false)
        if not delay then return nil, err end
    end
    -- Others may have come between the question and the count: what was counted is taken back then.
    local longest = 0
    for i = n, 1, -1 do
        local delay, state = limiters[i]:incoming(keys[i], true)
        if not delay then
            for j = i + 1, n do
                local limiter = limiters[j]
                if not limiter.is_committed or limiter:is_committed() then
                    local ok, err = limiter:uncommit(keys[j])
                    if not ok then return nil, err end
                end
            end
            return nil, state
        end
        longest = max(longest, delay)
        if states then states[i] = state end
    end
    return longest
end

return _M
