"""What callers of services share: the discovery client, what is known of each service, and the attempts."""
