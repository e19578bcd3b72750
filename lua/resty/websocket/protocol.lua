--- WebSocket frames over a stream socket, with the public interface of lua-resty-websocket (its README, v0.14); RFC 6455, 5.
--
-- Lengths from the wire are bounded by the caller before anything of that length is read.

local bit = require("bit")
local ffi = require("ffi")
local crypto = require("moongate.native").crypto

local band, bor, bxor, floor = bit.band, bit.bor, bit.bxor, math.floor
local tostring, type = tostring, type
local byte, char, sub = string.byte, string.char, string.sub
local copy, new, ffi_string = ffi.copy, ffi.new, ffi.string

-- Bytes of a payload when the caller does not say.
local MAX_PAYLOAD = 65535
-- Bytes of a control frame's payload.
local MAX_CONTROL = 125

local _M = { _VERSION = "0.14" }

local types = { [0] = "continuation", [1] = "text", [2] = "binary", [8] = "close", [9] = "ping", [10] = "pong" }

-- Masking -----------------------------------------------------------------------------------------------------------

-- Words of 32 bits; one buffer for what is usual.
local WORDS = 4096
local words, mask_word = new("int32_t[?]", WORDS), new("int32_t[1]")

-- The data with every byte xor'ed with the mask's, again and again.
local function masked(data, mask)
    local size = #data
    if size == 0 then return data end
    local n = floor((size + 3) / 4)
    local buffer = n <= WORDS and words or new("int32_t[?]", n)
    copy(buffer, data, size)
    copy(mask_word, mask, 4)
    local word = mask_word[0]
    for i = 0, n - 1 do buffer[i] = bxor(buffer[i], word) end
    return ffi_string(buffer, size)
end

-- Receiving ---------------------------------------------------------------------------------------------------------

local function receive_length(sock, short)
    if short < 126 then return short end
    local bytes = short == 126 and 2 or 8
    local data, err = sock:receive(bytes)
    if not data then return nil, "failed to receive the " .. bytes .. " byte payload length: " .. err end
    if bytes == 8 then
        -- The high half would be more than a worker has.
        if sub(data, 1, 4) ~= "\0\0\0\0" then return nil, "payload len too large" end
        data = sub(data, 5)
    end
    local length = 0
    for i = 1, #data do length = length * 0x100 + byte(data, i) end
    return length
end

local function receive_payload(sock, length, is_masked)
    local mask, data, err
    if is_masked then
        mask, err = sock:receive(4)
        if not mask then return nil, "failed to receive the masking key: " .. err end
    end
    if length == 0 then return "" end
    data, err = sock:receive(length)
    if not data then return nil, "failed to read payload: " .. err end
    return mask and masked(data, mask) or data
end

--- recv_frame(sock, max_payload_len = 65535, force_masking = false): the payload, its type ("continuation", "text", "binary",
-- "close", "ping", "pong"), and "again" when more of the message follows. Of a close frame: the message, "close", the
-- status code if there is one. nil, nil and what went wrong; then true when nothing of a frame had come in time.
function _M.recv_frame(sock, max_payload_len, force_masking)
    local head, err, partial = sock:receive(2)
    if not head then
        local idle = err == "timeout" and (partial == nil or partial == "")
        return nil, nil, "failed to receive the first 2 bytes: " .. err, idle
    end
    local first, second = byte(head, 1, 2)
    if band(first, 0x70) ~= 0 then return nil, nil, "bad RSV1, RSV2, or RSV3 bits" end
    local fin, opcode = first >= 0x80, band(first, 0x0f)
    local typ = types[opcode]
    if not typ then
        return nil, nil, opcode < 8 and "reserved non-control frames" or "reserved control frames"
    end
    local is_masked, length = second >= 0x80, band(second, 0x7f)
    if force_masking and not is_masked then return nil, nil, "frame unmasked" end
    if opcode >= 8 then
        if length > MAX_CONTROL then return nil, nil, "too long payload for control frame" end
        if not fin then return nil, nil, "fragmented control frame" end
    end
    length, err = receive_length(sock, length)
    if not length then return nil, nil, err end
    if length > (max_payload_len or MAX_PAYLOAD) then return nil, nil, "exceeding max payload len" end
    local data
    data, err = receive_payload(sock, length, is_masked)
    if not data then return nil, nil, err end
    if opcode == 8 then
        if length == 0 then return "", typ end
        if length < 2 then return nil, nil, "close frame with a body must carry a 2-byte status code" end
        local high, low = byte(data, 1, 2)
        return sub(data, 3), typ, high * 0x100 + low
    end
    if not fin then return data, typ, "again" end
    return data, typ
end

-- Sending -----------------------------------------------------------------------------------------------------------

--- build_frame(fin, opcode, payload_len, payload, masking): the bytes of a frame; nil and why not.
function _M.build_frame(fin, opcode, payload_len, payload, masking)
    if type(opcode) ~= "number" or opcode < 0 or opcode > 0x0f then return nil, "bad opcode" end
    local first = bor(fin and 0x80 or 0, opcode)
    local bit_of_mask = masking and 0x80 or 0
    local head
    if payload_len < 126 then
        head = char(first, bor(bit_of_mask, payload_len))
    elseif payload_len <= 0xffff then
        head = char(first, bor(bit_of_mask, 126), floor(payload_len / 0x100), payload_len % 0x100)
    elseif payload_len <= 0x7fffffff then
        head = char(first, bor(bit_of_mask, 127), 0, 0, 0, 0, floor(payload_len / 0x1000000),
            floor(payload_len / 0x10000) % 0x100, floor(payload_len / 0x100) % 0x100, payload_len % 0x100)
    else
        return nil, "payload too big"
    end
    if not masking then return head .. payload end
    local mask = crypto.random(4)
    return head .. mask .. masked(payload, mask)
end

--- send_frame(sock, fin, opcode, payload, max_payload_len = 65535, masking): the bytes sent; nil and what went wrong.
function _M.send_frame(sock, fin, opcode, payload, max_payload_len, masking)
    if payload == nil then
        payload = ""
    elseif type(payload) ~= "string" then
        payload = tostring(payload)
    end
    local length = #payload
    if length > (max_payload_len or MAX_PAYLOAD) then return nil, "payload too big" end
    if type(opcode) == "number" and opcode >= 8 then
        if length > MAX_CONTROL then return nil, "too much payload for control frame" end
        if not fin then return nil, "fragmented control frame" end
    end
    local frame, err = _M.build_frame(fin, opcode, length, payload, masking)
    if not frame then return nil, "failed to build frame: " .. err end
    local bytes
    bytes, err = sock:send(frame)
    -- The second value tells apart what was not sent at all.
    if not bytes then return nil, "failed to send frame: " .. err, true end
    return bytes
end

return _M
