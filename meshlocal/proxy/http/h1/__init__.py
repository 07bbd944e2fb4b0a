"""The two ends of HTTP/1.1: a client's connection, and one request on a connection to an instance.

client       the client's end: bytes from it and to it, and the time that each may take
upstream     the instance's end: one request on one connection, until its response has ended
pump         how a task drives that; a request's body that streams while the instance may answer
tunnel       what becomes of both ends after CONNECT or Upgrade
"""
