"""The two ends of HTTP/1.1: a client's connection, and one request on a connection to an instance.

connection   a client's requests, one after the other, and how it ends
client       the client's end: bytes from it and to it, and the time that each may take
upstream     the instance's end: one request on one connection, until its response has ended
pump         a request's body that streams to the instance, which may answer meanwhile
lane         plain requests of a connection, served in the relay loop
"""
