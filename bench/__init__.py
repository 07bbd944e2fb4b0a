"""What meshlocal costs, measured: latency, throughput, memory, and what local-first gives. See README.md."""
