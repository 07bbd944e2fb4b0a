-- No two requests of wrk's have the same head, as where each one is traced.
local count = 0
function request()
  count = count + 1
  return wrk.format("GET", "/" .. count, {["x-request-id"] = string.format("%032x", count)})
end

dofile(os.getenv("HEADS_REPORT"))
