"""The gateways that are compared: how each is installed, configured, started and addressed.

Each gets the same upstream and the same core, and the settings its own documentation recommends for speed.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kit import BenchError, first_line, free_port

UPSTREAM_KEY = "sk-ant-bench"
MODEL = "claude-sonnet-4-6"


@dataclass(frozen=True, slots=True)
class Tls:
    """A TLS terminator in front of the upstream; its certificate is its own authority."""

    port: int
    certificate: Path


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a gateway in an empty directory of its own."""

    argv: list[str]
    port: int
    ready_path: str
    client_key: str
    env: dict[str, str] = field(default_factory=dict)
    ready_within_s: float = 15


class Gateway(Protocol):
    name: str
    connections: int
    """Of the closed loop: enough to saturate its core, and not so many that the queue is what is measured."""

    def prepare(self, cache: Path) -> None:
        """Installs what is missing."""

    def version(self) -> str: ...

    def command(self, home: Path, *, upstream_port: int, tls: Tls | None) -> Command:
        """Writes its configuration into home."""


# --- nginx: what a proxy that does no job at all costs ---

NGINX = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {home}/nginx.pid;
error_log {home}/error.log;
events {{ worker_connections 8192; multi_accept on; }}
http {{
  access_log off;
  tcp_nodelay on;
  keepalive_timeout 600s;
  keepalive_requests 1000000000;
  # The larger body of the measurement must not go through a file.
  client_body_buffer_size 64k;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi;
  scgi_temp_path {home}/scgi;
  upstream api {{
    server 127.0.0.1:{upstream_port};
    keepalive 512;
    keepalive_requests 1000000000;
    keepalive_timeout 600s;
  }}
  server {{
    listen 127.0.0.1:{port} {listen_options} backlog=4096;
    {server_options}
    location / {{
      proxy_pass {scheme}://api;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
      {proxy_options}
    }}
  }}
}}
"""


def nginx_argv(home: Path) -> list[str]:
    return ["nginx", "-e", str(home / "error.log"), "-p", str(home), "-c", str(home / "nginx.conf")]


def write_tls_terminator(home: Path, *, port: int, upstream_port: int, certificate: Path, key: Path) -> None:
    text = NGINX.format(
        home=home,
        port=port,
        upstream_port=upstream_port,
        scheme="http",
        listen_options="ssl",
        server_options=f"ssl_certificate {certificate}; ssl_certificate_key {key};",
        proxy_options="",
    )
    (home / "nginx.conf").write_text(text)


class Nginx:
    name = "nginx"
    connections = 32

    def prepare(self, cache: Path) -> None:  # noqa: ARG002
        try:
            self.version()
        except FileNotFoundError as e:
            raise BenchError("nginx is not installed (Debian: apt-get install nginx-light)") from e

    def version(self) -> str:
        return first_line(["nginx", "-v"]).partition("/")[2]

    def command(self, home: Path, *, upstream_port: int, tls: Tls | None) -> Command:
        port = free_port()
        verified = (
            f"proxy_ssl_trusted_certificate {tls.certificate}; proxy_ssl_verify on; proxy_ssl_server_name on; "
            "proxy_ssl_name localhost; proxy_ssl_session_reuse on; proxy_ssl_protocols TLSv1.2 TLSv1.3;"
            if tls
            else ""
        )
        text = NGINX.format(
            home=home,
            port=port,
            upstream_port=tls.port if tls else upstream_port,
            scheme="https" if tls else "http",
            listen_options="",
            server_options="",
            proxy_options=verified,
        )
        (home / "nginx.conf").write_text(text)
        # It has no key of its own and hands on the client's.
        return Command(nginx_argv(home), port, "/bench/streams", client_key=UPSTREAM_KEY)


# --- LiteLLM: what teams use today ---

LITELLM_CONFIG = """\
model_list:
  - model_name: {model}
    litellm_params:
      model: anthropic/{model}
      api_base: {upstream_url}
      api_key: {upstream_key}
general_settings:
  master_key: {client_key}
litellm_settings:
  telemetry: false
"""


class LiteLlm:
    """One worker, no database, `/v1/messages`: its route that hands Anthropic's form on without translating it."""

    name = "litellm"
    connections = 8

    def __init__(self) -> None:
        self._bin = Path()

    def prepare(self, cache: Path) -> None:
        home = cache / "litellm"
        self._bin = home / "bin"
        if (self._bin / "litellm").exists():
            return
        print("installing litellm[proxy] into an environment of its own, once …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(self._bin / "pip"), "install", "--quiet", "litellm[proxy]"], check=True)

    def version(self) -> str:
        code = "from importlib.metadata import version; print(version('litellm'))"
        python = subprocess.run([str(self._bin / "python"), "-V"], capture_output=True, text=True).stdout.strip()
        return f"{first_line([str(self._bin / 'python'), '-c', code])} ({python})"

    def command(self, home: Path, *, upstream_port: int, tls: Tls | None) -> Command:
        port, client_key = free_port(), "sk-bench"
        url = f"https://localhost:{tls.port}" if tls else f"http://127.0.0.1:{upstream_port}"
        config = LITELLM_CONFIG.format(model=MODEL, upstream_url=url, upstream_key=UPSTREAM_KEY, client_key=client_key)
        (home / "config.yaml").write_text(config)
        argv = [str(self._bin / "litellm"), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
        env = {
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no download of the price list at start
            "LITELLM_LOG": "ERROR",
            "PATH": f"{self._bin}:{os.environ['PATH']}",
        }
        if tls:
            env["SSL_CERT_FILE"] = str(tls.certificate)
        argv += ["--num_workers", "1"]
        return Command(argv, port, "/health/readiness", client_key=client_key, env=env, ready_within_s=90)


# --- Headgate, with its whole job on ---


class Headgate:
    connections = 32

    def __init__(self, python: str = "") -> None:
        """python: an interpreter that has Headgate installed, where it is not the one that runs this."""
        self._headgate = [python or sys.executable, "-m", "headgate"]
        self.name = f"headgate on {first_line([python, '-V'])}" if python else "headgate"

    def prepare(self, cache: Path) -> None:  # noqa: ARG002
        done = subprocess.run([*self._headgate, "--help"], capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"headgate does not run under {self._headgate[0]}:\n{done.stderr[-2000:]}")

    def version(self) -> str:
        code = "import sys; from importlib.metadata import version; print(version('headgate'), sys.version.split()[0])"
        number, python = first_line([self._headgate[0], "-c", code]).split()
        commit = first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"])
        return f"{number} at {commit} (Python {python})"

    def command(self, home: Path, *, upstream_port: int, tls: Tls | None) -> Command:
        port = free_port()
        env = {
            "ANTHROPIC_API_KEY": UPSTREAM_KEY,
            "HEADGATE_DATA_DIR": str(home / "data"),
            "HEADGATE_UPSTREAM_URL": f"https://localhost:{tls.port}" if tls else f"http://127.0.0.1:{upstream_port}",
            "HEADGATE_LISTEN": f"127.0.0.1:{port}",
            "HEADGATE_OPERATOR_LISTEN": f"127.0.0.1:{free_port()}",
            # All limits are kept, and none is reached: one person here sends more than a thousand would.
            "HEADGATE_PACING__RPM": "100000000",
            "HEADGATE_PACING__ITPM": "1000000000",
            "HEADGATE_PACING__OTPM": "1000000000",
            "HEADGATE_TIERS__FREE__RPM": "100000000",
            "HEADGATE_VELOCITY__USD_PER_10_MIN": "1000000",
        }
        if tls:
            env["SSL_CERT_FILE"] = str(tls.certificate)
        create = [*self._headgate, "keys", "create", "--name", "bench", "--rpm", "100000000", "--json"]
        done = subprocess.run(create, cwd=home, env={**os.environ, **env}, capture_output=True, text=True)
        if done.returncode:
            raise BenchError(f"headgate keys create failed:\n{done.stderr[-2000:]}")
        key = json.loads(done.stdout)["key"]
        return Command([*self._headgate, "gateway"], port, "/readyz", client_key=key, env=env)
