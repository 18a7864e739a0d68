"""Servers on loopback for the tests of live sources: HTTP and RTSP streams that are cut, held up and refused."""

import socket
import socketserver
import struct
import threading
from contextlib import contextmanager


class StreamServer(socketserver.ThreadingTCPServer):
    """Answers each connection with the next entry of a script; the last one stays.

    An entry is the bytes to send before hanging up, None for hanging up at once, or a list of bytes to send before
    saying nothing more: `silent` is then set.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, script, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.script = script
        self.connections = 0
        self.refused = 0
        self.silent = threading.Event()
        self.ending = threading.Event()

    def next_entry(self):
        self.connections += 1
        return self.script[min(self.connections, len(self.script)) - 1]

    def deliver(self, request, entry, wrap=lambda data: [data]):
        """Send an entry's bytes, each piece as `wrap` says."""
        for data in entry if isinstance(entry, list) else [entry]:
            for piece in wrap(data):
                request.sendall(piece)
        if isinstance(entry, list):
            self.silent.set()
            self.ending.wait()


class _Http(socketserver.StreamRequestHandler):
    kind = "video/mp2t"

    def handle(self):
        while self.rfile.readline().strip():
            pass
        entry = self.server.next_entry()
        if entry is None:
            return
        length = f"Content-Length: {len(entry)}\r\n" if self.kind == "video/x-matroska" else ""
        self.wfile.write(f"HTTP/1.0 200 OK\r\nContent-Type: {self.kind}\r\n{length}\r\n".encode())
        self.server.deliver(self.request, entry)


class _Parts(_Http):
    kind = "multipart/x-mixed-replace;boundary=frame"


class _File(_Http):
    kind = "video/x-matroska"


class _Rtsp(socketserver.StreamRequestHandler):
    """An MPEG transport stream in RTP packets, within the connection of RTSP itself; nothing else is offered."""

    def handle(self):
        entry = self.server.next_entry()
        while True:
            request = self.rfile.readline().decode().split()
            headers = {}
            while line := self.rfile.readline().decode().strip():
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            if not request or entry is None:
                return
            if not self.answer(request[0], headers):
                self.server.refused += 1
                self.wfile.write(f"RTSP/1.0 461 Unsupported\r\nCSeq: {headers['cseq']}\r\n\r\n".encode())
                return
            if request[0] == "PLAY":
                self.server.deliver(self.request, entry, self.packets)
                return

    def answer(self, method, headers):
        body, more = b"", ""
        if method == "OPTIONS":
            more = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == "DESCRIBE":
            body = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
            body += b"m=video 0 RTP/AVP 33\r\na=control:track1\r\n"
            more = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
        elif method == "SETUP":
            if "TCP" not in headers["transport"]:
                return False
            more = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 7\r\n"
        elif method == "PLAY":
            more = "Session: 7\r\n"
        self.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {headers['cseq']}\r\n{more}\r\n".encode() + body)
        return True

    def packets(self, data):
        for number, begin in enumerate(range(0, len(data), 7 * 188)):
            packet = struct.pack(">BBHII", 0x80, 33, number, number * 3000, 1) + data[begin : begin + 7 * 188]
            yield struct.pack(">cBH", b"$", 0, len(packet)) + packet


HANDLERS = {"http": _Http, "parts": _Parts, "file": _File, "rtsp": _Rtsp}


@contextmanager
def serving(script, kind="http"):
    """A running server; its address is in `url`."""
    with StreamServer(script, HANDLERS[kind]) as server:
        server.url = f"{'rtsp' if kind == 'rtsp' else 'http'}://127.0.0.1:{server.server_address[1]}/live"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()


def closed_port():
    """A port of loopback at which no one listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
