"""The gateway's settings: one TOML file, every key also an environment variable. The only file here that reads either.

Names are fixed in the design: `HEADGATE_<SECTION>__<KEY>`; see docs/settings.md. An unknown key stops the start.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

Seconds = float


class SettingsError(Exception):
    """The settings cannot be meant. The text names each key, what is wrong with it and how to mend it."""


class Section(BaseModel):
    """Base of a section of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class UpstreamSection(Section):
    """How Anthropic is called."""

    connect_timeout_s: Seconds = Field(5.0, gt=0, le=60)
    """For name, connection and TLS handshake together."""
    first_byte_timeout_s: Seconds = Field(120.0, gt=0, le=3600)
    """From the request to the end of the answer's head; a server that drips headers does not reset it."""
    stall_timeout_s: Seconds = Field(180.0, gt=0, le=3600)
    """Silence in an answer; any byte counts. Thinking streams have been seen silent for 150 s and more."""
    hold_s: Seconds = Field(1.0, ge=0, le=30)
    """How long events are held for an invisible retry, from `message_start` to the first content."""
    connections_max: int = Field(1000, ge=1, le=65_000)
    idle_timeout_s: Seconds = Field(30.0, gt=0, le=3600)
    """An unused connection is closed after this, before the other side may do so under a request."""
    background_max: int = Field(32, ge=0, le=10_000)
    """Answers read to their end for a client that left without a stream: they are billed in full anyway."""
    background_timeout_s: Seconds = Field(120.0, gt=0, le=3600)


class ServerSection(Section):
    """How clients are served."""

    header_timeout_s: Seconds = Field(10.0, gt=0, le=600)
    body_timeout_s: Seconds = Field(30.0, gt=0, le=3600)
    """Silence while a body comes; the whole body may take four times as long."""
    write_timeout_s: Seconds = Field(120.0, gt=0, le=3600)
    """How long a client may read nothing of what is ready for it."""
    idle_timeout_s: Seconds = Field(75.0, gt=0, le=3600)
    """How long a connection may lie between two requests."""
    drain_timeout_s: Seconds = Field(300.0, ge=0, le=3600)
    """What streams get to finish after SIGTERM."""
    ping_after_s: Seconds = Field(15.0, gt=0, le=3600)
    """Silence towards a streaming client before it gets a `ping` of ours."""
    connections_max: int = Field(10_000, ge=1, le=1_000_000)
    body_bytes_max: int = Field(32 << 20, ge=1024, le=1 << 30)
    """Of one request, decoded; Anthropic's own limit (claude-api §2.2)."""
    bodies_bytes_max: int = Field(512 << 20, ge=1024, le=1 << 40)
    """Of all requests in the process together: what bounds its memory."""
    bad_keys_per_min: int = Field(20, ge=1, le=1_000_000)
    """Wrong keys from one address before it is answered 429."""
    public_url: str = ""
    """`https://gateway.example.com`: what `results_url` of a batch is rewritten to; empty: the Host the client used."""


class QueueSection(Section):
    """How long a request may wait."""

    deadline_s: Seconds = Field(20.0, gt=0, le=3600)
    """Queue and retries together."""


class RetrySection(Section):
    """How failed attempts are tried again."""

    attempts_max: int = Field(3, ge=1, le=3)
    base_delay_s: Seconds = Field(1.0, gt=0, le=60)


class LedgerSection(Section):
    """How what was paid is remembered."""

    durability: Literal["process", "power"] = "process"
    """`process` survives a `kill -9`; `power` also waits for the disk (a grouped fdatasync) before a call leaves."""


class BreakerSection(Section):
    """Kept for the circuit breaker, which is not built yet: without effect."""

    open_s: Seconds = Field(10.0, gt=0, le=3600)


class LogSection(Section):
    """What is written to standard output."""

    calls: bool = True
    """One line of JSON for each call."""


class Settings(BaseSettings):
    """All settings. Make them with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="HEADGATE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    anthropic_api_key: SecretStr = Field(SecretStr(""), validation_alias="ANTHROPIC_API_KEY")
    anthropic_api_key_file: Path | None = Field(None, validation_alias="ANTHROPIC_API_KEY_FILE")
    default_model: str = Field("claude-sonnet-4-6", validation_alias="CLAUDE_MODEL")
    data_dir: Path = Path(".headgate")
    upstream_url: str = "https://api.anthropic.com"
    listen: str = "127.0.0.1:8080"
    operator_listen: str = "127.0.0.1:8081"
    chat_listen: str = "127.0.0.1:8000"
    database_url: str = ""
    redis_url: str = ""

    upstream: UpstreamSection = UpstreamSection()
    server: ServerSection = ServerSection()
    queue: QueueSection = QueueSection()
    retry: RetrySection = RetrySection()
    ledger: LedgerSection = LedgerSection()
    breaker: BreakerSection = BreakerSection()
    log: LogSection = LogSection()

    @field_validator("upstream_url")
    @classmethod
    def _is_origin(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("must be http://host[:port] or https://host[:port], as in https://api.anthropic.com")
        return value.rstrip("/")

    @field_validator("listen", "operator_listen", "chat_listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host_port(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  no .env file: a secret must not lie in a checkout
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over file over defaults."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_path(os.environ))


def config_path(environ: Mapping[str, str]) -> Path:
    """Where the file is: `HEADGATE_CONFIG`, else `./headgate.toml` (which need not exist)."""
    return Path(environ.get("HEADGATE_CONFIG") or "headgate.toml")


def host_port(value: str) -> tuple[str, int]:
    """`host:port` taken apart; an IPv6 address stands in brackets. Raises ValueError with the form that is meant."""
    host, colon, port = value.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError(f"must be host:port, as in 127.0.0.1:8080, not {value!r}")
    return host.strip("[]"), int(port)


def load_settings() -> Settings:
    """Read file and environment. Raises SettingsError."""
    path = config_path(os.environ)
    if "HEADGATE_CONFIG" in os.environ and not path.is_file():
        raise SettingsError(f"HEADGATE_CONFIG names {path}, which is no file. Correct the path or unset it.")
    _refuse_unknown_variables(os.environ)
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(problem, path) for problem in error.errors())) from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: not valid TOML: {error}") from None
    return _with_key_from_file(settings)


def _with_key_from_file(settings: Settings) -> Settings:
    file = settings.anthropic_api_key_file
    if file is None or settings.anthropic_api_key.get_secret_value():
        return settings
    try:
        key = file.read_text().strip()
    except OSError as error:
        raise SettingsError(
            f"ANTHROPIC_API_KEY_FILE: {file}: {error.strerror}. Name a file that holds the key."
        ) from None
    if not key:
        raise SettingsError(f"ANTHROPIC_API_KEY_FILE: {file} is empty. Put the key into it.")
    return settings.model_copy(update={"anthropic_api_key": SecretStr(key)})


def _sections() -> dict[str, type[Section]]:
    return {name: field.annotation for name, field in Settings.model_fields.items() if _is_section(field)}  # type: ignore[misc]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def setting_names() -> list[str]:
    """Every key as it stands in the file: `queue.deadline_s`, or `listen` for those without a section."""
    names = []
    for name, field in Settings.model_fields.items():
        if _is_section(field):
            names += [f"{name}.{key}" for key in _sections()[name].model_fields]
        else:
            names.append(field.validation_alias if isinstance(field.validation_alias, str) else name)
    return names


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """A misspelt `HEADGATE_SECTION__KEY` would be ignored in silence otherwise."""
    known = {f"HEADGATE_{name.replace('.', '__')}".upper() for name in setting_names()}
    for variable in environ:
        if variable.startswith("HEADGATE_") and "__" in variable and variable.upper() not in known:
            raise SettingsError(f"{variable}: no such setting.{_did_you_mean(variable.upper(), known)}")


def _explain(problem: Any, path: Path) -> str:  # Any: pydantic's ErrorDetails
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{path}: {name}: no such setting.{_did_you_mean(name, setting_names())}"
    value = problem.get("input")
    # A URL may carry a password, and a value of the wrong kind anything.
    hidden = not isinstance(value, str | int | float) or any(word in name.lower() for word in ("key", "url"))
    shown = "" if hidden else f" (it is {value!r})"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _did_you_mean(name: str, known: Any) -> str:  # Any: an iterable of names
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else " docs/settings.md lists all of them."
