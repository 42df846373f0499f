"""Pictures of a bundle over HTTP: ``python examples/serve.py out/demo`` and open localhost:8000/?label=3&seed=7.

Needs numpy, onnxruntime, msgspec and pillow; neither torch nor onnx.
"""

from __future__ import annotations

import io
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from dexport.errors import UsageError
from dexport.runtime.draws import Draws
from dexport.runtime.gallery import to_pil
from dexport.runtime.opened import OpenProgram
from dexport.runtime.programs.program import PICTURES, Request


def picture(program: OpenProgram, label: int, seed: int) -> bytes:
    """One PNG; the same label and seed give the same one."""
    results = program.results(Request(1, labels=(label,)), Draws(seed, images=[0]))
    file = io.BytesIO()
    to_pil(results[PICTURES][0]).save(file, format="PNG")
    return file.getvalue()


def server(program: OpenProgram, port: int = 8000) -> ThreadingHTTPServer:
    """Sessions are safe to use from several threads, and noise belongs to the request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                query = {name: int(value) for name, value in parse_qsl(urlsplit(self.path).query)}
                body, kind, status = picture(program, **query), "image/png", HTTPStatus.OK
            except (UsageError, TypeError, ValueError) as error:
                body, kind, status = f"{error}\n".encode(), "text/plain", HTTPStatus.BAD_REQUEST
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    # Opening checks every hash: a bundle that was changed or torn is refused before the port is taken.
    server(OpenProgram.open(sys.argv[1])).serve_forever()
