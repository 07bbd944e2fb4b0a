"""The admin server: health, metrics and views over HTTP, on loopback."""
