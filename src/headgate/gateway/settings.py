"""The gateway's settings: one TOML file, every key also an environment variable. The only file here that reads either.

Names are fixed in the design: `HEADGATE_<SECTION>__<KEY>`; see docs/settings.md. An unknown key stops the start, and so
does what cannot be meant. What the sections mean to a request is made of them in `policies.py`.
"""

from __future__ import annotations

import difflib
import os
import re
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from headgate.policy.fallback import is_dearer
from headgate.policy.routing import DEFAULT_ALIAS
from headgate.wire.catalog import FOREVER_NS, Catalog, day_start_ns, packaged
from headgate.wire.tiers import TierName

Seconds = float
Usd = Annotated[float, Field(gt=0, le=1_000_000)]
NAME = "NAME"
"""Stands in `setting_names` where a table has names of its owner's choice: `tiers.NAME.rpm`."""
_PER_MINUTE_MAX = 1_000_000_000


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


def _is_lower_case_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", value):
        raise ValueError("a name is 1 to 64 lower case letters, digits, - and _")
    return value


def _is_arm_name(value: str) -> str:
    # A colon parts the experiment from its arm in the ledger.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", value):
        raise ValueError("a name is 1 to 64 letters, digits, -, _ and .")
    return value


def _is_label(value: str) -> str:
    if not 0 < len(value) <= 256 or not value.isprintable():
        raise ValueError("a name is 1 to 256 characters that can be printed")
    return value


def _split_by_commas(value: Any) -> Any:  # Any: what stands in the file or the variable
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


LowerCaseName = Annotated[str, AfterValidator(_is_lower_case_name)]
ArmName = Annotated[str, AfterValidator(_is_arm_name)]
Label = Annotated[str, AfterValidator(_is_label)]
PerMinute = Annotated[int, Field(ge=1, le=_PER_MINUTE_MAX)]
ModelList = Annotated[tuple[str, ...], BeforeValidator(_split_by_commas)]


class QueueSection(Section):
    """How long a request may wait, and how many may."""

    deadline_s: Seconds = Field(20.0, gt=0, le=3600)
    """Queue and retries together."""
    waiting_max: int = Field(500, ge=1, le=1_000_000)
    """Requests that wait in this process, over all people and models."""
    bytes_max: int = Field(256 << 20, ge=1024, le=1 << 40)
    """Of their bodies together."""


class PacingClassSection(Section):
    """Anthropic's limits of one model class or line."""

    rpm: PerMinute | None = None
    itpm: PerMinute | None = None
    otpm: PerMinute | None = None


class PacingSection(Section):
    """Anthropic's limits of this organization. What is given here is a ceiling: headers only ever lower it."""

    tier: Literal["", TierName] = ""
    """Empty: begin with `tier2`, and believe what Anthropic's headers say, up as well as down."""
    rpm: PerMinute | None = None
    """For every model class, over the tier's own; so are the next two."""
    itpm: PerMinute | None = None
    otpm: PerMinute | None = None
    burst_s: Seconds = Field(10.0, ge=0.1, le=60)
    """How many seconds of a rate may leave at once: a full minute's worth in one second is a 429 (claude-api §6.1)."""
    count_tokens_rpm: PerMinute | None = None
    classes: dict[Label, PacingClassSection] = {}
    """By `rate_class` of the catalogue (`sonnet-4`), or by line (`sonnet`) for all classes of it."""


class TierSection(Section):
    """What one person of a tier may do. A tier of a new name begins with these, which are those of `free`."""

    rpm: PerMinute = 20
    otpm: PerMinute | None = None
    """Output tokens."""
    concurrency: int | None = Field(None, ge=1, le=1_000_000)
    """Calls at once, waiting ones not counted."""
    weight: float = Field(1.0, gt=0, le=1000)
    """Share of the queue beside one person of weight 1."""
    waiting_max: int = Field(10, ge=1, le=1_000_000)
    """Requests of one person that wait."""
    burst_s: Seconds = Field(60.0, ge=0.1, le=3600)
    """How many seconds of the rate may come at once."""
    count_tokens_rpm: PerMinute = 200
    model: str = ""
    """What those get who ask for the default model; empty: the default model."""
    background: bool = False
    """Waits behind everybody whose tier is not."""
    budget_usd_day: Usd | None = None
    """Of one person, over all of their keys; a UTC day."""
    budget_usd_month: Usd | None = None
    total_usd_day: Usd | None = None
    """Of all people of the tier together."""
    total_usd_month: Usd | None = None


BUILT_IN_TIERS: Mapping[str, TierSection] = {
    "free": TierSection(),
    "paid": TierSection(rpm=100, weight=5, waiting_max=50, count_tokens_rpm=1_000),
    "premium": TierSection(rpm=100, weight=5, waiting_max=50, count_tokens_rpm=1_000, model="claude-opus-4-7"),
    "batch": TierSection(rpm=100, waiting_max=100, background=True),
}
"""Free and paid are the article's, and so is premium's model."""


class RoutingSection(Section):
    """Which model a request goes to."""

    fallback: str = "claude-haiku-4-5"
    """The model that answers when the one asked for does not; empty: none. Never used for a cheaper model."""
    fallbacks: dict[Label, ModelList] = {}
    """By model, in order; over `fallback`. An empty list: none for this model."""
    aliases: dict[Label, str] = {}
    """Names that clients may ask for instead of a model's. `default` is always one, for `CLAUDE_MODEL`."""
    endpoints: dict[Label, str] = {}
    """By `x-headgate-endpoint`: what requests with this label go to, whatever they ask for."""


class ArmSection(Section):
    """One arm of an experiment."""

    name: ArmName
    model: str
    weight: float = Field(1.0, ge=0, le=1_000_000)
    """Share of the requests, beside the other arms' weights. 0: none."""


class ExperimentSection(Section):
    """An A/B test between models."""

    name: ArmName
    model: str
    """Requests that would go to this model take part."""
    endpoint: str = ""
    """And that have this label; empty: any."""
    salt: str = ""
    """Another salt deals people and conversations anew."""
    arms: tuple[ArmSection, ...]


class RetrySection(Section):
    """How failed attempts are tried again."""

    attempts_max: int = Field(3, ge=1, le=3)
    base_delay_s: Seconds = Field(1.0, gt=0, le=60)


class LedgerSection(Section):
    """How what was paid is remembered."""

    durability: Literal["process", "power"] = "process"
    """`process` survives a `kill -9`; `power` also waits for the disk (a grouped fdatasync) before a call leaves."""


class BreakerSection(Section):
    """When a model that fails is left alone, and for how long. Rate limits (429) are no failure."""

    failures: int = Field(3, ge=1, le=1_000_000)
    """In a row."""
    window_s: Seconds = Field(30.0, gt=0, le=3600)
    """Or, of the attempts within this time,"""
    window_requests_min: int = Field(10, ge=1, le=1_000_000)
    """when they are at least so many,"""
    failure_ratio: float = Field(0.5, gt=0, le=1)
    """this share."""
    open_s: Seconds = Field(10.0, gt=0, le=3600)
    """Until one probe is let through; doubles with each that fails,"""
    open_s_max: Seconds = Field(120.0, gt=0, le=3600)
    """up to this."""
    successes: int = Field(3, ge=1, le=1000)
    """In a row, until all is well again."""
    poison_failures: int = Field(3, ge=1, le=1_000_000_000)
    """Of one and the same request, without an answer and within ten minutes: then it is refused for ten."""
    spend_cap_probe_s: Seconds = Field(900.0, gt=0, le=86_400)
    """After Anthropic said that the account may spend no more, one call in this time asks again."""


class CacheSection(Section):
    """Prompt caching at Anthropic."""

    plan: bool = True
    """Mark the prompts of callers who set no mark themselves."""
    single_flight: bool = True
    """Of those who bring a prefix that is in no cache yet, one goes ahead."""
    single_flight_wait_s: Seconds = Field(2.0, gt=0, le=60)
    """The longest that the others wait for the first byte of that one's answer."""
    ttl: Literal["auto", "5m", "1h"] = "auto"
    """`auto`: by what the gaps between uses would cost."""
    keep_warm: bool = False
    """Refresh a prefix before it is lost, where that costs less than to write it again."""
    keep_warm_usd_day: Usd = 1.0
    """At most, over all prefixes; a UTC day."""
    diagnostics: bool = True
    """Ask Anthropic why a prompt missed, where its family has missed before."""


class BudgetsSection(Section):
    """Money that may be spent at most, over everybody. People, tiers and keys have budgets of their own."""

    usd_day: Usd | None = None
    usd_month: Usd | None = None
    alert_usd_day: Usd = 20.0
    """Beyond this an alert is raised, and nothing is stopped. The article's."""
    clamp: bool = False
    """Lower `max_tokens` to what is left of a budget, rather than refuse."""


class VelocitySection(Section):
    """When somebody spends so fast that it must be a mistake."""

    enabled: bool = True
    usd_per_10_min: Usd = 2.0
    """Of one person or key."""
    history_factor: float = Field(5.0, ge=1, le=1000)
    """Or so many times what their busy ten minutes of the last week cost."""
    hold_s: Seconds = Field(3600.0, gt=0, le=604_800)
    """How long it is held to one request at a time."""


class ReuseEndpointSection(Section):
    """One label whose answers are used again."""

    ttl_s: Seconds = Field(gt=0, le=2_592_000)
    shared_by_users: bool = False
    """One person of a key may get the answer that another one was given."""


class ReuseSection(Section):
    """Whole answers given again to the very same request of the same key."""

    endpoints: dict[Label, ReuseEndpointSection] = {}
    bytes_max: int = Field(64 << 20, ge=1024, le=1 << 40)


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
    )

    anthropic_api_key: SecretStr = Field(SecretStr(""), validation_alias="ANTHROPIC_API_KEY")
    anthropic_api_key_file: Path | None = Field(None, validation_alias="ANTHROPIC_API_KEY_FILE")
    anthropic_admin_key: SecretStr = Field(SecretStr(""), validation_alias="ANTHROPIC_ADMIN_KEY")
    """For `headgate reconcile` alone."""
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
    pacing: PacingSection = PacingSection()
    tiers: dict[LowerCaseName, TierSection] = dict(BUILT_IN_TIERS)
    retry: RetrySection = RetrySection()
    breaker: BreakerSection = BreakerSection()
    routing: RoutingSection = RoutingSection()
    experiments: tuple[ExperimentSection, ...] = ()
    cache: CacheSection = CacheSection()
    budgets: BudgetsSection = BudgetsSection()
    velocity: VelocitySection = VelocitySection()
    reuse: ReuseSection = ReuseSection()
    ledger: LedgerSection = LedgerSection()
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

    @field_validator("tiers", mode="before")
    @classmethod
    def _over_built_in_tiers(cls, value: Any) -> Any:  # Any: what stands in the file and the variables
        """One number of a tier may be changed without repeating the others."""
        if not isinstance(value, dict):
            return value
        tiers: dict[Any, Any] = dict(BUILT_IN_TIERS)
        for name, given in value.items():
            built_in = BUILT_IN_TIERS.get(name)
            tiers[name] = built_in.model_dump() | given if built_in is not None and isinstance(given, dict) else given
        return tiers

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  ours takes its place
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003  no .env file: a secret must not lie in a checkout
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over file over defaults."""
        file = TomlConfigSettingsSource(settings_cls, toml_file=config_path(os.environ))
        return init_settings, _Variables(settings_cls), file


_NAMED_BY_MODEL = re.compile(r"(headgate_(?:pacing__classes|routing__fallbacks)__)([^_]+(?:_[^_]+)*)(?=__|$)")


class _Variables(EnvSettingsSource):
    """The environment. A shell takes no hyphen in a name, so `_` stands for it where models and classes are named."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self.env_vars = {
            _NAMED_BY_MODEL.sub(lambda match: match[1] + match[2].replace("_", "-"), name): value
            for name, value in self.env_vars.items()
        }

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:  # Any: as in the base
        """JSON; what is none is left as it is, for validation to name and refuse."""
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def config_path(environ: Mapping[str, str]) -> Path:
    """Where the file is: `HEADGATE_CONFIG`, else `./headgate.toml` (which need not exist)."""
    return Path(environ.get("HEADGATE_CONFIG") or "headgate.toml")


def host_port(value: str) -> tuple[str, int]:
    """`host:port` taken apart; an IPv6 address stands in brackets. Raises ValueError with the form that is meant."""
    host, colon, port = value.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
        raise ValueError(f"must be host:port, as in 127.0.0.1:8080, not {value!r}")
    return host.strip("[]"), int(port)


LIVE = frozenset(
    {
        "default_model",
        "queue",
        "pacing",
        "tiers",
        "retry",
        "breaker",
        "routing",
        "experiments",
        "cache",
        "budgets",
        "velocity",
    }
)
"""What `reload` changes in a running gateway. Everything else is read when it starts."""


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
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    problems = list(_contradictions(settings, packaged(), at_ns=time.time_ns()))
    if problems:
        raise SettingsError("\n".join(problems))
    return _with_key_from_file(settings)


def reload(running: Settings) -> tuple[Settings, list[str]]:
    """Read again: what holds from now on, and the keys that were changed and wait for a restart.

    The settings returned are the running ones but for `LIVE`, so that they always say what is in force. Raises
    SettingsError; then everything stays as it is.
    """
    read = load_settings()
    waiting = [
        name
        for name, (before, after) in zip(
            setting_names(), zip(_values(running), _values(read), strict=True), strict=True
        )
        if before != after and _field_of(name) not in LIVE
    ]
    return running.model_copy(update={name: getattr(read, name) for name in LIVE}), waiting


def _values(settings: Settings) -> Iterator[object]:
    """In the order of `setting_names`; None for those in a table of names, which are live."""
    for name in setting_names():
        of: object = settings
        for part in (_field_of(name), *name.split(".")[1:]):
            of = getattr(of, part, None)
        yield of


def _field_of(name: str) -> str:
    """The field of `Settings` that a setting is in."""
    section = name.partition(".")[0]
    return next((field for field, info in Settings.model_fields.items() if info.validation_alias == section), section)


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


def setting_fields() -> dict[str, FieldInfo]:
    """Every key as it stands in the file, with its field: `queue.deadline_s`, `listen`, `tiers.NAME.rpm`.

    A list of tables is named without a number: `experiments.arms.weight`.
    """
    fields: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        alias = field.validation_alias
        fields.update(_leaves(alias if isinstance(alias, str) else name, field, field.annotation))
    return fields


def setting_names() -> list[str]:
    """The keys of `setting_fields`."""
    return list(setting_fields())


def _leaves(name: str, field: FieldInfo, annotation: Any) -> Iterator[tuple[str, FieldInfo]]:  # Any: a type
    if isinstance(annotation, type) and issubclass(annotation, Section):
        for key, inner in annotation.model_fields.items():
            yield from _leaves(f"{name}.{key}", inner, inner.annotation)
    elif get_origin(annotation) is dict:
        yield from _leaves(f"{name}.{NAME}", field, get_args(annotation)[1])
    elif get_origin(annotation) is tuple:
        yield from _leaves(name, field, get_args(annotation)[0])
    else:
        yield name, field


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """A misspelt `HEADGATE_SECTION__KEY` would be ignored in silence otherwise."""
    for variable in environ:
        first, *names = variable.upper().split("__")
        if not names or not first.startswith("HEADGATE_"):
            continue
        parts = [first.removeprefix("HEADGATE_"), *names]
        if parts[0] == "EXPERIMENTS":
            raise SettingsError(
                f"{variable}: a list has no such variables. HEADGATE_EXPERIMENTS holds it all, as JSON."
            )
        known = {"HEADGATE_" + "__".join(each).upper() for each in _spelt_out(parts) if all(each)}
        if variable.upper() not in known:
            raise SettingsError(f"{variable}: no such setting.{_did_you_mean(variable.upper(), known)}")


def _spelt_out(parts: Sequence[str]) -> list[list[str]]:
    """Every setting's name in parts, with the names that `parts` chose where it may choose them."""
    return [
        [parts[at] if part == NAME and at < len(parts) else part for at, part in enumerate(name.split("."))]
        for name in setting_names()
    ]


def _explain(problem: Any, path: Path) -> str:  # Any: pydantic's ErrorDetails
    parts = [str(part) for part in problem["loc"] if isinstance(part, str) and part != "[key]"]
    name = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", ".".join(str(part) for part in problem["loc"] if part != "[key]"))
    if problem["type"] == "extra_forbidden":
        # Tables themselves can be misspelt, too.
        known = {".".join(each[:depth]) for each in _spelt_out(parts) for depth in range(1, len(each) + 1)}
        return f"{path}: {name}: no such setting.{_did_you_mean('.'.join(parts), known)}"
    value = problem.get("input")
    # A URL may carry a password, and a value of the wrong kind anything.
    hidden = not isinstance(value, str | int | float) or any(word in name.lower() for word in ("key", "url"))
    shown = "" if hidden else f" (it is {value!r})"
    return f"{name}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _did_you_mean(name: str, known: Iterable[str], *, otherwise: str = " docs/settings.md lists all of them.") -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else otherwise


# ---- what is well formed and still cannot be meant -------------------------------------------------------------------


def _contradictions(settings: Settings, catalog: Catalog, *, at_ns: int) -> Iterator[str]:
    """Each with the key and the mend. `at_ns` is now: models retire, and prices change."""
    aliases = settings.routing.aliases
    for key, model in _models_named(settings):
        problem = _model_problem(model, catalog, at_ns)
        if problem and model in (DEFAULT_ALIAS, *aliases):
            meant = aliases.get(model, settings.default_model)
            yield f"{key}: {model} is an alias. Name the model itself: {meant}."
        elif problem:
            yield f"{key}: {problem}"
    for alias in aliases:
        if alias == DEFAULT_ALIAS:
            yield f"routing.aliases.{alias}: this alias is always there, for CLAUDE_MODEL. Set CLAUDE_MODEL instead."
        elif catalog.resolve(alias):
            yield f"routing.aliases.{alias}: a model has this name, and could not be asked for. Choose another name."
    yield from _fallback_contradictions(settings, catalog, at_ns=at_ns)
    yield from _experiment_contradictions(settings.experiments, catalog)
    breaker = settings.breaker
    if breaker.open_s > breaker.open_s_max:
        yield f"breaker.open_s: {breaker.open_s:g} is above breaker.open_s_max, {breaker.open_s_max:g}. Raise that too."
    classes = {model.rate_class for model in catalog.models} | {model.line for model in catalog.models}
    for name in settings.pacing.classes:
        if name not in classes:
            meant = _did_you_mean(name, classes, otherwise=f" There are: {', '.join(sorted(classes))}.")
            yield f"pacing.classes.{name}: no such model class or line.{meant}"


def _models_named(settings: Settings) -> Iterator[tuple[str, str]]:
    """Every key that names a model, with the model."""
    routing = settings.routing
    yield "CLAUDE_MODEL", settings.default_model
    if routing.fallback:
        yield "routing.fallback", routing.fallback
    for source, targets in routing.fallbacks.items():
        for model in (source, *targets):
            yield f"routing.fallbacks.{source}", model
    for table, models in (("aliases", routing.aliases), ("endpoints", routing.endpoints)):
        for name, model in models.items():
            yield f"routing.{table}.{name}", model
    for name, tier in settings.tiers.items():
        if tier.model:
            yield f"tiers.{name}.model", tier.model
    for experiment in settings.experiments:
        yield f"experiments.{experiment.name}.model", experiment.model
        for arm in experiment.arms:
            yield f"experiments.{experiment.name}.arms.{arm.name}.model", arm.model


def _model_problem(name: str, catalog: Catalog, at_ns: int) -> str:
    """Why a request could not be sent to this model; empty when it could."""
    model = catalog.resolve(name)
    callable_now = {
        known: one
        for one in catalog.models
        for known in (one.id, *one.aliases)
        if at_ns < (day_start_ns(one.retires_at) if one.retires_at else FOREVER_NS)
    }
    if model is None:
        all_of_them = f" This version knows: {', '.join(one.id for one in dict.fromkeys(callable_now.values()))}."
        return f"no such model: {name!r}.{_did_you_mean(name, callable_now, otherwise=all_of_them)}"
    if name not in callable_now:
        successors = ", ".join(one.id for one in dict.fromkeys(callable_now.values()) if one.line == model.line)
        return f"{name} was retired on {model.retires_at}. Name another{f', as {successors}' if successors else ''}."
    return ""


def _fallback_contradictions(settings: Settings, catalog: Catalog, *, at_ns: int) -> Iterator[str]:
    routing = settings.routing

    def canonical(name: str) -> str:
        model = catalog.resolve(name)
        return model.id if model else name

    # The default fallback beside a CLAUDE_MODEL that is the same is no mistake of anybody's: it is not used then.
    if "fallback" in routing.model_fields_set and canonical(routing.fallback) == canonical(settings.default_model):
        yield f'routing.fallback: {routing.fallback} is CLAUDE_MODEL itself. Name another model, or "" for none.'
    targets: dict[str, tuple[str, ...]] = {}
    for source, named in routing.fallbacks.items():
        key = f"routing.fallbacks.{source}"
        if canonical(source) in targets:
            yield f"{key}: this model has another list, under another of its names. Keep one."
        targets[canonical(source)] = tuple(canonical(name) for name in named)
        for name in named:
            if canonical(name) == canonical(source):
                yield f"{key}: {name} is this model itself. Take it out of the list."
            elif catalog.resolve(source) and catalog.resolve(name) and is_dearer(source, name, catalog, at_ns):
                yield f"{key}: {name} is dearer, and an outage must not raise the bill. Name a cheaper model."
    for source in routing.fallbacks:
        circle = _circle(canonical(source), targets)
        if len(circle) > 2 and min(circle) == canonical(source):
            yield f"routing.fallbacks.{source}: goes in a circle: {' → '.join(circle)}. Take one of them out."


def _circle(start: str, targets: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The shortest way from a model over fallbacks back to itself; empty when there is none."""
    ways, seen = [[start]], {start}
    for way in ways:
        for target in targets.get(way[-1], ()):
            if target == start:
                return [*way, target]
            if target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


def _experiment_contradictions(experiments: Sequence[ExperimentSection], catalog: Catalog) -> Iterator[str]:
    names: set[str] = set()
    subjects: dict[tuple[str, str], str] = {}
    for experiment in experiments:
        key = f"experiments.{experiment.name}"
        if experiment.name in names:
            yield f"{key}: two experiments have this name. Rename one."
        names.add(experiment.name)
        model = catalog.resolve(experiment.model)
        subject = (model.id if model else experiment.model, experiment.endpoint)
        if subject in subjects:
            where = f"{experiment.model} at endpoint {experiment.endpoint}" if experiment.endpoint else experiment.model
            yield f"{key}: {subjects[subject]} is an experiment on {where} already. Name another endpoint, or end one."
        subjects[subject] = experiment.name
        arms = [arm.name for arm in experiment.arms]
        if len(arms) < 2:
            yield f"{key}.arms: an experiment compares at least two arms; it has {len(arms)}. Add one."
        for name in sorted({name for name in arms if arms.count(name) > 1}):
            yield f"{key}.arms.{name}: two arms have this name. Rename one."
        if arms and not any(arm.weight for arm in experiment.arms):
            yield f"{key}.arms: every weight is 0, so that no request has an arm. Give at least one a weight above 0."
