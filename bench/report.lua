-- wrk's figures for bench/load.py, on one line.
function done(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  local form = 'figures {"requests":%d,"us":%d,"errors":%d,"p50":%d,"p90":%d,"p99":%d}\n'
  io.write(string.format(form, summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(90), latency:percentile(99)))
end
