"""A DNS server of the tests' own, over UDP and TCP."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import trio

from nursery_tests.ports import free_port


class Server:
    """Answers what it is told to.

    Attributes:
        records: by name and kind, as in a zone's file; each with its TTL in front.
        codes: what is answered instead, by name.
        silent: says nothing.
        asked: every question.
        truncates: over UDP it says only that it would be too long.
    """

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], tuple[int, list[str]]] = {}
        self.codes: dict[str, dns.rcode.Rcode] = {}
        self.silent = False
        self.truncates = False
        self.asked: list[tuple[str, str]] = []
        self.over_tcp = 0
        self.port = 0
        self.soa = "example. 60 IN SOA ns.example. root.example. 1 1 1 1 7"

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as udp:
            self.port = free_port()
            await udp.bind(("127.0.0.1", self.port))
            async with trio.open_nursery() as nursery:
                listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, self._take, listeners)
                task_status.started()
                while True:
                    data, peer = await udp.recvfrom(65535)
                    answer = self._answer(data)
                    if answer is not None:
                        if self.truncates:
                            answer.flags |= dns.flags.TC
                            answer.answer = []
                        await udp.sendto(answer.to_wire(), peer)

    async def _take(self, stream: trio.SocketStream) -> None:
        async with stream:
            data = await stream.receive_some(65535)
            self.over_tcp += 1
            answer = self._answer(data[2:])
            if answer is not None:
                wire = answer.to_wire()
                await stream.send_all(len(wire).to_bytes(2, "big") + wire)

    def _answer(self, data: bytes) -> dns.message.Message | None:
        question = dns.message.from_wire(data)
        name = question.question[0].name.to_text(omit_final_dot=True).lower()
        kind = dns.rdatatype.to_text(question.question[0].rdtype)
        self.asked.append((name, kind))
        if self.silent:
            return None
        answer = dns.message.make_response(question)
        if name in self.codes:
            answer.set_rcode(self.codes[name])
            return answer
        ttl, texts = self.records.get((name, kind), (0, []))
        if texts:
            answer.answer.append(dns.rrset.from_text_list(f"{name}.", ttl, "IN", kind, texts))
        else:
            if not any(known == name for known, _ in self.records):
                answer.set_rcode(dns.rcode.NXDOMAIN)
            _, soa_ttl, _, _, *rest = self.soa.split()
            answer.authority.append(dns.rrset.from_text("example.", int(soa_ttl), "IN", "SOA", " ".join(rest)))
        return answer
