"""An instance of a service, as a process: answers each line with its name. Standard library only: it starts at once.

instance.py NAME ADDRESS PORT...
"""

import ipaddress
import socket
import socketserver
import sys
import threading


class _Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        try:
            for _ in self.rfile:
                self.wfile.write(f"{sys.argv[1]}\n".encode())
        except ConnectionError:
            return


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: object, client_address: object) -> None:
        return


class _Server6(_Server):
    address_family = socket.AF_INET6


def main() -> None:
    _, _, address, *ports = sys.argv
    kind = _Server6 if ipaddress.ip_address(address).version == 6 else _Server
    servers = [kind((address, int(port)), _Answer) for port in ports]
    sys.stdout.write(f"listening {' '.join(str(server.server_address[1]) for server in servers)}\n")
    sys.stdout.flush()
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
