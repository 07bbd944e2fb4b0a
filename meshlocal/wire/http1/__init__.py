"""HTTP/1.1 messages without I/O (RFC 9110 and 9112): heads parsed and rewritten, bodies framed.

How a head is read. Three things look at its raw bytes, and it passes only if all agree:

- a regular expression that matches a whole head of the strict grammar and nothing else: every line ends with CRLF, no
  bare CR or LF, no NUL, no folded line, no space before a colon, names are tokens;
- llhttp, through httptools, in its strict mode, as a second opinion on the same bytes;
- the checks here on the few fields that decide where a message ends and who it is for.

So what goes on to the next hop is either the very bytes that were checked, or lines cut out of them: a head that two
parsers could read in two ways (request smuggling) does not get through. Chunked bodies are checked by
`chunked.ChunkedBody` and pass as the bytes that came, too, less their chunk extensions.
"""
