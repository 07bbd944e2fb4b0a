-- Makes wrk measure an echo server: what it sends is an HTTP response, so what comes back is one.
local size = tonumber(os.getenv("ECHO_SIZE"))
local close = os.getenv("ECHO_CLOSE") == "1"

-- The length of the body is written with as many digits as that of the whole, so that its own length is known.
local digits = #tostring(size)
local head = "HTTP/1.1 200 OK\r\n" .. (close and "Connection: close\r\n" or "") .. "Content-Length: %0" .. digits .. "d\r\n\r\n"
local body = size - #string.format(head, 0)
assert(body >= 0, "no message is as short as " .. size .. " bytes")
local echoed = string.format(head, body) .. string.rep("x", body)

-- wrk parses the first request to see whether it is one, and sends those after it as they are.
local checked = false
function request()
  if checked then return echoed end
  checked = true
  return wrk.format()
end

dofile(os.getenv("ECHO_REPORT"))
