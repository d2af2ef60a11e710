"""Who may call the service how: hosts, the path of a proxy, HEAD, redirects, both kinds of IP."""

from __future__ import annotations

import http.client
import json
import re
import socket
from typing import Any
from urllib.parse import urljoin

import pytest
from serving.client import JSON, PATIENCE, Client, Reply

from var_deploy.errors import UsageError

pytest.importorskip("fastapi", reason="the extra serve is not installed")

FOREIGN = "evil.example"


def raw(client: Client, request: str, address: str = "127.0.0.1") -> Reply:
    """The answer to a request as it is typed here."""
    with socket.create_connection((address, client.port), PATIENCE) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode("latin-1"))
        reply = http.client.HTTPResponse(connection)
        reply.begin()
        names = {name.lower(): value for name, value in reply.getheaders()}
        return Reply(status=reply.status, headers=names, data=reply.read())


def called(client: Client, host: str, path: str = "/health") -> Reply:
    return raw(client, f"GET {path} HTTP/1.1\nHost: {host}\nConnection: close\n\n")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:80",
        "10.1.2.3:8000",  # a pod's, or that of a board in the same network
        "[::1]",
        "[::1]:8000",
        "[fe80::1]",
    ],
)
def test_addresses_and_localhost_are_answered(service: Client, host: str) -> None:
    assert called(service, host).status == 200


@pytest.mark.parametrize(
    "host", [FOREIGN, f"{FOREIGN}:8000", "localhost.evil.example", "127.0.0.1.evil.example", "x"]
)
def test_a_foreign_host_is_refused_on_every_route(service: Client, host: str) -> None:
    for path in ("/", "/health", "/metrics", "/docs", "/openapi.json", "/page/app.js", "/no"):
        reply = called(service, host, path)
        assert reply.status == 403 and "--allowed-host" in reply.error
    head = f"POST /v1/images HTTP/1.1\nHost: {host}\nContent-Type: application/json\n"
    assert raw(service, f"{head}Content-Length: 2\n\n{{}}").status == 403


@pytest.mark.parametrize(
    "headers",
    [
        "",
        "Host:\n",
        "Host: localhost\nHost: localhost\n",
        "Host: a b\n",
        "Host: http://localhost\n",
        "Host: localhost/\n",
        "Host: user@localhost\n",
        "Host: [::1\n",
        "Host: [localhost]\n",
        "Host: localhost:http\n",
        "Host: \x1b[31mred\n",
        "Host: \xff\n",
        f"Host: {'a' * 300}\n",
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_hosts_that_are_none(service: Client, headers: str, version: str) -> None:
    reply = raw(service, f"GET /health HTTP/{version}\n{headers}Connection: close\n\n")
    assert reply.status == 400 and reply.error
    assert "\x1b" not in reply.data.decode()


def test_names_that_the_operator_gives(start: Any) -> None:
    client: Client = start(hosts=("images.example.org", "*.example.net"))
    for host in ("images.example.org", "Images.Example.Org:443", "a.b.example.net"):
        assert called(client, host).status == 200, host
    for host in ("example.org", "a.images.example.org", "example.net", "badexample.net", FOREIGN):
        assert called(client, host).status == 403, host
    assert called(start(hosts=("*",)), FOREIGN).status == 200


@pytest.mark.parametrize("name", ["", "http://a", "a:80", "a/b", "*.", "**", "a b", "é", "x" * 300])
def test_names_that_cannot_be_hosts(name: str) -> None:
    from var_deploy.serving.settings import Settings

    with pytest.raises(UsageError, match="a host is a name without scheme and port"):
        Settings(hosts=(name,))


def test_the_own_names_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from var_deploy.serving.hosts import own_names

    monkeypatch.setattr(socket, "gethostname", lambda: "Box7")
    assert own_names("127.0.0.1") == own_names("::1") == ()
    assert own_names("0.0.0.0") == own_names("::") == ("box7", "box7.local")
    assert own_names("board.lan") == ("board.lan",)


@pytest.mark.parametrize(
    "path", ["/", "/health", "/metrics", "/docs", "/openapi.json", "/v1/model", "/page/app.js"]
)
def test_head_is_get_without_a_body(service: Client, path: str) -> None:
    get, head = service.ask("GET", path, None, {}), service.ask("HEAD", path, None, {})
    assert head.status == get.status == 200 and head.data == b""
    for name in ("content-type", "content-security-policy"):
        assert head.headers[name] == get.headers[name]
    if path != "/metrics":  # which counts the two
        assert head.headers["content-length"] == get.headers["content-length"]
    assert service.ask("HEAD", "/v1/images", None, {}).status == 405
    assert service.ask("HEAD", "/nothing", None, {}).status == 404


@pytest.mark.parametrize("path", ["/health/", "/v1/model/", "/docs/"])
def test_a_redirect_names_no_host(start: Any, path: str) -> None:
    client: Client = start(hosts=("*",))
    reply = called(client, FOREIGN, path)
    assert reply.status == 307 and FOREIGN not in str(reply.headers)
    assert urljoin(path, reply.headers["location"]) == path.rstrip("/")
    for other in ("/page", "/page/", "//evil.example/..", "/v1/"):
        assert called(client, FOREIGN, other).status == 404


@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("root", ["/images/of/ours", "/v1"])
def test_behind_the_path_of_a_proxy(start: Any, root: str, strips: bool) -> None:
    """The proxy may take the path away or leave it: all that a page asks for is found."""
    client: Client = start(root_path=root)

    def get(address: str) -> Reply:
        assert address.startswith(f"{root}/"), "which the proxy would not send here"
        return client.get(address[len(root) :] if strips else address)

    for page in (f"{root}/", f"{root}/docs"):
        html = get(page).data.decode()
        for link in re.findall(r"(?:href|src)=[\"']?([^\"'#> ][^\"'> ]*)", html):
            assert get(urljoin(page, link)).status == 200, link
    assert f"http://HOST{root}/v1/images" in html
    assert get(f"{root}/openapi.json").json["servers"] == [{"url": root}]
    script = get(urljoin(f"{root}/", "page/service.js")).data.decode()
    assert 'reach("v1/model"' in script  # relative, hence below the page
    path = f"{root}/v1/images"[len(root) * strips :]
    assert client.post(path, {"labels": ["star"]}).status == 200
    metrics = client.metrics()
    assert metrics['var_deploy_requests_total{route="/v1/images",status="200"}'] == 1
    if not strips:
        reply = client.get(root)
        assert reply.status == 307 and urljoin(root, reply.headers["location"]) == f"{root}/"


@pytest.mark.parametrize("root", ["images", "/images/", "/", "/a\nb"])
def test_paths_that_are_none_of_a_proxy(root: str) -> None:
    from var_deploy.serving.settings import Settings

    with pytest.raises(UsageError, match="the root path must start with /"):
        Settings(root_path=root)


def test_all_addresses_are_those_of_both_kinds() -> None:
    from var_deploy.serving.server import listen

    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine cannot listen on both kinds of IP at once")
    with listen("::", 0) as listening:
        port = listening.getsockname()[1]
        for address in ("127.0.0.1", "::1"):
            with socket.create_connection((address, port), PATIENCE):
                pass
    with listen("::1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), PATIENCE)


def test_what_the_service_is_called_is_not_in_an_error(service: Client) -> None:
    for path in ("/nothing", "/page/../../etc/passwd", "/page/%2e%2e/app.py", "/page/\\app.py"):
        reply = called(service, "localhost", path)
        assert reply.status == 404 and set(json.loads(reply.data)) == {"error"}
        assert "var_deploy" not in reply.error and "passwd" not in reply.error
    assert service.ask("POST", "/v1/model", b"{}", JSON).status == 405
