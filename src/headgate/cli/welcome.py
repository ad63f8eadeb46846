"""What `headgate up` prints when all is up: where to go, the key, and three commands to paste."""

import shlex
import sys
from pathlib import Path

from headgate.gateway.settings import Settings, host_port


def reachable(host: str) -> str:
    """An address to call what listens on every address."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  read, not bound


def _url(listen: str) -> str:
    host, port = host_port(listen)
    host = reachable(host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def welcome(settings: Settings, key: str, *, simulator_port: int | None) -> str:
    """URLs, the key, and three commands to paste."""
    url = _url(settings.listen)
    lines = []
    if simulator_port is not None:
        lines += [
            "┌──────────────────────────────────────────────────────────────────────┐",
            "│ SIMULATOR. ANTHROPIC_API_KEY is not set: answers are made up, and    │",
            "│ nothing is paid. Set it and start again to reach the Claude API.     │",
            "└──────────────────────────────────────────────────────────────────────┘",
        ]
    lines += [
        f"gateway     {url}",
        f"operator    {_url(settings.operator_listen)}",
    ]
    if simulator_port is not None:
        lines.append(f"simulator   http://127.0.0.1:{simulator_port}")
    body = f'{{"model":"{settings.default_model}","max_tokens":100,"messages":[{{"role":"user","content":"Hello"}}]}}'
    program = (
        "from anthropic import Anthropic; "
        f'print(Anthropic().messages.create(model="{settings.default_model}", max_tokens=100, '
        'messages=[{"role": "user", "content": "Hello"}]).content[0].text)'
    )
    lines += [
        f"key         {key}",
        "",
        "curl:",
        f"  curl {url}/v1/messages -H 'x-api-key: {key}' -H 'anthropic-version: 2023-06-01'"
        f" -H 'content-type: application/json' -d '{body}'",
        "the official SDK:",
        f"  ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={key} {shlex.quote(_python())} -c '{program}'",
        "Claude Code (an ANTHROPIC_API_KEY of its own would win over the token):",
        f"  env -u ANTHROPIC_API_KEY ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key} claude",
        "",
        "Ctrl-C stops everything. One line of JSON follows for each call.",
    ]
    return "\n".join(lines)


def _python() -> str:
    """This Python, in which the SDK is installed, as short as it can be written from here."""
    python = Path(sys.executable)
    return str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)
