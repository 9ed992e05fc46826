"""The simulated Google Cloud: takes a request apart, checks it as Google would, and has a service answer it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from rehearsal import accounts, compute, tpu
from rehearsal.books import Books
from rehearsal.call import Call, Handler, may
from rehearsal.discovery import Method, Service, service
from rehearsal.permissions import NEEDS
from rehearsal.refusal import Refusal

Json = dict[str, Any]
VERSIONS = {"compute": "v1", "tpu": "v2alpha1", "cloudresourcemanager": "v1", "iam": "v1"}
METHODS: dict[str, Handler] = {**compute.METHODS, **tpu.METHODS, **accounts.METHODS}
TOKEN_HOST = "oauth2.googleapis.com"


@dataclass(frozen=True)
class Request:
    host: str
    verb: str  # of HTTP
    target: str  # path and query
    token: str
    body: Any  # parsed JSON, or the form of a request for a token


class Cloud:
    def __init__(self, books: Books) -> None:
        self.books = books
        services = [service(name, version) for name, version in VERSIONS.items()]
        self.services: Mapping[str, Service] = {service.host: service for service in services}

    def answer(self, request: Request) -> tuple[int, Json]:
        """The status and the body for a request."""
        with self.books.lock:
            self.books.settle()
            try:
                return 200, self._answer(request)
            except Refusal as refusal:
                return refusal.code, refusal.body()

    def _answer(self, request: Request) -> Json:
        path, _, query = request.target.partition("?")
        if request.host == TOKEN_HOST:
            return accounts.user_token(self.books, request.body)
        if not (service := self.services.get(request.host)):
            raise Refusal(404, f"The simulator has no service {request.host}.")
        if path == "/$discovery/rest":
            return service.document
        if not (match := service.match(request.verb, path)):
            raise Refusal(404, f"The requested URL {path} was not found on this server.")
        method, in_path = match
        status = 200
        try:
            answer = self._call(service, method, in_path, dict(parse_qsl(query)), request)
            service.check(method.response, answer, "answer")
            return answer
        except Refusal as refusal:
            status = refusal.code
            raise
        finally:
            self.books.calls.append((method.id, status))

    def _call(
        self, service: Service, method: Method, path: dict[str, str], query: dict[str, str], request: Request
    ) -> Json:
        if fault := self.books.fault(method.id, answers=True):
            raise Refusal(fault.answer, f"The service is currently unable to answer ({fault.answer}).")
        call = Call(method.id, {**path, **query}, request.body or {}, self._member(request.token))
        self._check_enabled(service)
        if method.id not in METHODS:
            raise Refusal(404, f"The simulator does not know {method.id}.")
        service.check_request(method, path, query, request.body)
        self._check_project(call)
        for permission in NEEDS[method.id]:
            may(self.books, call, permission, f"projects/{self.books.project.id}")
        return METHODS[method.id](self.books, call)

    def _member(self, token: str) -> str:
        if member := self.books.tokens.get(token):
            return member
        text = "Request had invalid authentication credentials. Expected OAuth 2 access token."
        raise Refusal(401, text, "authError")

    def _check_enabled(self, service: Service) -> None:
        project = self.books.project
        if service.document["name"] not in project.services:
            page = f"https://console.developers.google.com/apis/api/{service.host}/overview?project={project.number}"
            text = (
                f"{service.document['title']} has not been used in project {project.number} before or it is disabled."
            )
            raise Refusal(403, f"{text} Enable it by visiting {page} then retry.", "accessNotConfigured")

    def _check_project(self, call: Call) -> None:
        """Whether another project exists is no matter of the caller's: Google answers as if permission were missing."""
        parameters = call.parameters
        names = [parameters[name] for name in ("project", "projectId", "resource") if name in parameters]
        names += [parameters[name].split("/")[1] for name in ("parent", "name") if name in parameters]
        if any(name != self.books.project.id for name in names):
            raise Refusal(403, "The caller does not have permission", "forbidden")
