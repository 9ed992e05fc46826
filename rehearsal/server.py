"""Serves the simulated Google Cloud over TLS, under Google's own names.

The transport of Google's client connects to loopback and trusts the rehearsal's own certificate. Ray's code and the
rest of the client are as they are. While it serves, nothing of this process reaches the real Google Cloud.
"""

import datetime
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httplib2

from rehearsal.accounts import REFRESH_TOKEN
from rehearsal.cloud import Cloud, Request

VALID_DAYS = 2
FILES = "files.pythonhosted.org"  # from which cluster.yaml gets uv; here it has the files of a folder


class Handler(BaseHTTPRequestHandler):
    """One request of one connection."""

    server: "Server"

    def setup(self) -> None:
        self.request = self.server.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").partition(":")[0]
        if host == FILES:
            return self.send_file(self.server.files / self.path.rpartition("/")[2])
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        form = "form-urlencoded" in self.headers.get("Content-Type", "")
        body: Any = dict(parse_qsl(content.decode())) if form else json.loads(content) if content else None
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status, answer = self.server.cloud.answer(Request(host, self.command, self.path, token, body))
        self.send(status, "application/json; charset=UTF-8", json.dumps(answer).encode())

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def send_file(self, file: Path) -> None:
        if file.is_file():
            self.send(200, "application/octet-stream", file.read_bytes())
        else:
            self.send(404, "text/plain", b"")

    def send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that wait; beyond them a client on a busy machine waits for minutes

    def __init__(
        self, cloud: Cloud, folder: Path, files: Path = Path("/nowhere"), address: tuple[str, int] = ("127.0.0.1", 0)
    ) -> None:
        super().__init__(address, Handler)
        self.cloud = cloud
        self.files = files
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate(folder), folder / "key.pem")


@contextmanager
def serving(cloud: Cloud, folder: Path) -> Iterator[dict[str, str]]:
    """Serves to this process. Gives the environment of a user who is logged in to this Google Cloud."""
    server = Server(cloud, folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with names_lead_to(server.server_port, folder / "certificate.pem"):
            yield {"GOOGLE_APPLICATION_CREDENTIALS": str(credentials(folder, cloud.books.project.id))}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def names_lead_to(port: int, trusted: Path) -> Iterator[None]:
    """Has the transport of Google's client connect to this port instead of to a name of Google's."""
    connect, certificates = httplib2.HTTPSConnectionWithTimeout.connect, httplib2.CA_CERTS

    def connect_here(connection: Any) -> None:
        if not connection.host.endswith(".googleapis.com"):
            raise OSError(f"A rehearsal does not connect to {connection.host}.")
        plain = socket.create_connection(("127.0.0.1", port), connection.timeout)
        connection.sock = connection._context.wrap_socket(plain, server_hostname=connection.host)

    httplib2.HTTPSConnectionWithTimeout.connect = connect_here
    httplib2.CA_CERTS = str(trusted)
    try:
        yield
    finally:
        httplib2.HTTPSConnectionWithTimeout.connect = connect
        httplib2.CA_CERTS = certificates


def credentials(folder: Path, project: str) -> Path:
    """The file that `gcloud auth application-default login` would write."""
    file = folder / "application_default_credentials.json"
    content = {
        "type": "authorized_user",
        "client_id": "rehearsal.apps.googleusercontent.com",
        "client_secret": "none",
        "refresh_token": REFRESH_TOKEN,
        "quota_project_id": project,
    }
    file.write_text(json.dumps(content))
    return file


def certificate(folder: Path) -> Path:
    """A certificate for Google's names, beside its key. It is its own authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rehearsal")])
    today = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in ("*.googleapis.com", FILES)]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(*private))
    (folder / "certificate.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    return folder / "certificate.pem"
