"""Makes malformed requests to the API. A kind, a seed and a number determine each of them byte for byte."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from app.api.ingress import ROUTES
from app.api.openapi import document
from app.api.protocol import EDIT_NEUTRAL, NEUTRAL
from app.api.settings import Service
from tests.fuzz_uploads import form, links

DOCUMENT = document(Service("demo", ("128x128",)), ROUTES, keys=False)
# Those that are always refused, too.
BODY_FIELDS = sorted({*DOCUMENT["components"]["schemas"]["ImageRequest"]["properties"], *NEUTRAL})
EDIT_FIELDS = sorted({*DOCUMENT["components"]["schemas"]["EditForm"]["properties"], *EDIT_NEUTRAL, "colour"})
WORDS = [
    "a red boat",
    "",
    " ",
    "é",
    "\x00",
    "漢字" * 40,
    "🎨",
    "\ud800",
    "a" * 1999,
    "a" * 2001,
    "%s%n",
    "../..",
    "\u202e",
]
ODD: list[object] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 2**31, 2**32, 2**64, 10**400, float("nan"), float("inf")),
    *(
        [],
        [1],
        {},
        {"a": 1},
        [[]],
        "1",
        "-1",
        "1e3",
        "NaN",
        "0x10",
        "１",
        "true",
        "null",
        "128x128",
        "1x1",
        "x",
        "auto",
    ),
]
METHODS = [
    "GET",
    "POST",
    "HEAD",
    "PUT",
    "DELETE",
    "PATCH",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "get",
    "G\x00T",
    "",
]
PATHS = [*DOCUMENT["paths"], "/-/routes", "/-/healthz", "/v1"]
HEADER_NAMES = [
    *("X-Request-ID", "X-Request-Timeout-Seconds", "X-Request-Disconnect-Disabled", "serve_multiplexed_model_id"),
    *(
        "X-Session-Id",
        "traceparent",
        "tracestate",
        "Content-Length",
        "Transfer-Encoding",
        "Content-Type",
        "Host",
        "Origin",
    ),
    *(
        "Connection",
        "Upgrade",
        "Expect",
        "Range",
        "TE",
        "Trailer",
        "Accept",
        "Accept-Encoding",
        "Authorization",
        "Cookie",
    ),
    *(
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "Forwarded",
        "Sec-Fetch-Site",
        "If-None-Match",
        "Content-Encoding",
        "Via",
    ),
]
HEADER_VALUES = [
    *(
        b"",
        b"1",
        b"-1",
        b"0.001",
        b"nan",
        b"?1",
        b"a" * 65,
        b"a" * 9000,
        b"\xff\xfe",
        b"\x80",
        b"a\tb",
        b"a\x0bb",
        b"\x00",
    ),
    *(
        b"chunked",
        b"gzip, chunked",
        b"identity",
        b"close",
        b"keep-alive",
        b"Upgrade, HTTP2-Settings",
        b"h2c",
        b"websocket",
    ),
    *(b"100-continue", b"application/json", b"application/json; charset=utf-16", b"multipart/form-data; boundary=a"),
    *(
        b"127.0.0.1",
        b"10.0.0.9, 127.0.0.1",
        b"evil.example",
        b"localhost:99999",
        b"Bearer \xff",
        b"bytes=0-",
        b"${jndi:x}",
    ),
    *(b"cross-site", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"%0d%0aX: y", b"\x1b[31m", b"gzip"),
]

Make = Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Case:
    kind: str
    seed: int
    number: int

    @property
    def request(self) -> bytes:
        return KINDS[self.kind](random.Random(f"{self.kind}:{self.seed}:{self.number}"))

    def __str__(self) -> str:
        return f"{self.kind}:{self.seed}:{self.number}"


def request(
    method: str, target: bytes, headers: Sequence[bytes] = (), body: bytes = b"", *, close: bool = True
) -> bytes:
    lines = [method.encode("latin-1") + b" " + target + b" HTTP/1.1", b"Host: localhost", *headers]
    return b"\r\n".join([*lines, *([b"Connection: close"] if close else []), b"", body])


def posted(body: bytes, kind: bytes = b"application/json", to: bytes = b"/v1/images/generations") -> bytes:
    headers = [b"Content-Type: " + kind, b"Content-Length: " + str(len(body)).encode()]
    return request("POST", to, headers, body)


def bodies(rng: random.Random) -> bytes:
    fields: dict[str, object] = {"prompt": rng.choice(WORDS), "num_inference_steps": 1}
    for _ in range(rng.randint(0, 3)):
        name = rng.choice([*BODY_FIELDS, "colour", "", "prompt\x00"])
        if name != "num_inference_steps" or rng.random() < 0.3:
            fields[name] = rng.choice([*ODD, *WORDS])
    body = json.dumps(fields, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    match rng.randrange(14):
        case 0:
            body = body[: rng.randrange(len(body))]
        case 1 | 2:
            body = mangled(rng, body)
        case 3:
            depth = rng.choice([10, 1000, 30000])
            body = b'{"prompt": ' + b"[" * depth + b"]" * rng.choice([0, depth]) + b"}"
        case 4:
            body = rng.choice([b"\xef\xbb\xbf" + body, body.decode("utf-8", "replace").encode("utf-16")])
        case 5:
            body = b" " * rng.choice([65000, 65536, 70000, 1 << 20]) + body
        case 6:
            body = body[:-1] + b', "prompt": "again"}'
        case 7:
            body = rng.choice([b"", b"null", b"[]", b'"a"', b"1", b"{}", b"{" + b'"a":' * 3000, b"-", b"\x00"])
        case 8:
            body = b'{"prompt": "a", "seed": ' + b"9" * rng.choice([20, 4301, 60000]) + b"}"
        case 9:
            kinds = [
                b"text/plain",
                b"application/json; charset=latin-1",
                b"",
                b"multipart/form-data",
                b"application/jsonp",
            ]
            return posted(body, rng.choice(kinds))
    return posted(body)


def queries(rng: random.Random) -> bytes:
    pairs = [("prompt", rng.choice(WORDS)), ("num_inference_steps", "1")]
    for _ in range(rng.randint(0, 4)):
        pairs.append((rng.choice([*BODY_FIELDS, "colour", "", "%"]), str(rng.choice([*ODD, *WORDS]))))
    rng.shuffle(pairs)
    query = "&".join(
        f"{quote(n, errors='surrogatepass')}={quote(v, errors='surrogatepass')}" for n, v in pairs
    ).encode()
    match rng.randrange(10):
        case 0 | 1:
            query = mangled(rng, query)
        case 2:
            query += rng.choice(
                [b"&prompt=%ff", b"&%", b"&a=%zz", b"&seed=%00", b"&prompt=%ed%a0%80", b"&=&&==", b";a=b"]
            )
        case 3:
            query = b"&".join([query] * rng.choice([2, 60, 200]))
        case 4:
            query = b"prompt=" + b"a" * rng.choice([49000, 49153, 60000, 64000, 66000])
        case 5:
            query = bytes(rng.randrange(256) for _ in range(rng.randrange(60)))
    return request(rng.choice(["GET"] * 9 + ["HEAD"]), b"/imagine?" + query)


def paths(rng: random.Random) -> bytes:
    path = rng.choice(PATHS).encode()
    match rng.randrange(9):
        case 0:
            path += rng.choice(
                [b"/", b"//", b"/..", b"/%2e%2e/", b"%00", b"%", b"%zz", b";a", b"#a", b"?", b"%2f", b"\\", b"/."]
            )
        case 1:
            path = mangled(rng, path)
        case 2:
            path = rng.choice(
                [b"*", b"//", b"http://localhost/imagine", b"http://evil.example/", b"://", b"imagine", b"/%ff"]
            )
        case 3:
            path += b"/a" * rng.choice([1, 100, 5000, 40000])
        case 4:
            path = bytes(rng.randrange(1, 256) for _ in range(rng.randrange(1, 40)))
        case 5:
            path = b"/" + quote(rng.choice(WORDS), errors="surrogatepass").encode()
    return request(rng.choice(METHODS), path)


def headers(rng: random.Random) -> bytes:
    lines = []
    for _ in range(rng.choice([1, 1, 2, 3, 6, 140])):
        name = rng.choice(HEADER_NAMES).encode()
        if rng.random() < 0.2:
            name = rng.choice(
                [name.replace(b"-", b"_"), name.upper(), mangled(rng, name), name + b" ", b" " + name, b""]
            )
        value = rng.choice(HEADER_VALUES)
        lines.append(
            name + rng.choice([b": ", b":", b" : ", b""]) + value + rng.choice([b""] * 8 + [b"\r\n folded", b"\n"])
        )
    target = rng.choice([b"/", b"/v1/models", b"/nowhere", b"/imagine?prompt=a&num_inference_steps=1"])
    return request(rng.choice(["GET", "GET", "POST", "HEAD", "OPTIONS"]), target, lines)


def framings(rng: random.Random) -> bytes:
    body = b'{"prompt": "a", "num_inference_steps": 1}'
    size = b"%x" % len(body)
    json_type = b"Content-Type: application/json"
    chunked = [json_type, b"Transfer-Encoding: chunked"]
    to = b"/v1/images/generations"
    match rng.randrange(13):
        case 0:
            bad = [
                b"-1",
                b"ffffffffffffffffff",
                b"g",
                b"",
                b" 29",
                b"0x29",
                size + b";" + b"a" * 200,
                size + b" ",
                b"+29",
                b"1",
            ]
            return request("POST", to, chunked, rng.choice(bad) + b"\r\n" + body + b"\r\n0\r\n\r\n")
        case 1:
            end = rng.choice(
                [b"", b"\r\n", b"0", b"0\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\nHost: evil\r\n\r\n", b"\r\n\r\n0\r\n\r\n"]
            )
            return request("POST", to, chunked, size + b"\r\n" + body + b"\r\n" + end)
        case 2:
            length = rng.choice([0, 1, len(body) - 1, len(body) + 1, 10**6, 10**12, 2**63, 2**64, 10**30])
            return request("POST", to, [json_type, b"Content-Length: %d" % length], body)
        case 3:
            lines = [b"Content-Length: %d" % rng.choice([0, len(body)]), *chunked]
            rng.shuffle(lines)
            return request("POST", to, lines, size + b"\r\n" + body + b"\r\n0\r\n\r\n")
        case 4:
            odd = [
                b"chunked, chunked",
                b"xchunked",
                b"chunked, gzip",
                b"Chunked",
                b"identity",
                b"\tchunked",
                b"chunked;q=1",
            ]
            return request(
                "POST",
                to,
                [json_type, b"Transfer-Encoding: " + rng.choice(odd)],
                size + b"\r\n" + body + b"\r\n0\r\n\r\n",
            )
        case 5:
            some = [
                posted(body).replace(b"Connection: close\r\n", b""),
                request("GET", b"/healthz", close=False),
                request("GET", b"/"),
            ]
            return b"".join(rng.choice(some) for _ in range(rng.choice([2, 3, 30])))
        case 6:
            return posted(body).replace(b"\r\n", rng.choice([b"\n", b"\r", b"\r\r\n", b"\n\r"]))
        case 7:
            return posted(body).replace(
                b"HTTP/1.1", rng.choice([b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/1.1 ", b"", b"ICY"])
            )
        case 8:
            return posted(body)[: rng.randrange(len(posted(body)))]
        case 9:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 300)))
        case 10:
            return request(
                rng.choice(["GET", "HEAD", "DELETE"]),
                rng.choice([b"/", b"/imagine?prompt=a"]),
                [b"Content-Length: 9"],
                b"body body",
            )
        case 11:
            lines = [b"X-%d: %s" % (i, b"a" * rng.choice([10, 1000, 9000])) for i in range(rng.choice([10, 100, 200]))]
            return request("GET", b"/", lines)
    return mangled(rng, posted(body))


def uploads(rng: random.Random) -> bytes:
    fields: dict[str, object] = {"prompt": "a boat", "num_inference_steps": 1}
    for _ in range(rng.choice([0, 0, 0, 0, 1, 2])):
        fields[rng.choice(EDIT_FIELDS)] = rng.choice([*ODD, *WORDS])
    if rng.random() < 0.3:
        return posted(links(rng, fields), to=b"/v1/images/edits")
    texts = [(name, str(value).encode("utf-8", "surrogatepass")) for name, value in fields.items()]
    return posted(*form(rng, texts), to=b"/v1/images/edits")


KINDS: dict[str, Make] = {
    "bodies": bodies,
    "queries": queries,
    "paths": paths,
    "headers": headers,
    "framings": framings,
    "uploads": uploads,
}


def mangled(rng: random.Random, data: bytes) -> bytes:
    """Changes, doubles or removes one to four bytes or slices."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(0, 8))
        piece = rng.choice([b"", bytes([rng.randrange(256)]), 2 * data[at:end], b"\r\n", b"\x00", b"%", b'"'])
        data = data[:at] + piece + data[end:]
    return data
