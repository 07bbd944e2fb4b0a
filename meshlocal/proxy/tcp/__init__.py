"""tcp listeners: `connection` is one connection's life, `forwarder` serves all of them."""
