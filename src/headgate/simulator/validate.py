"""Reads a Messages request as the API reads it: an `Ask` to answer, or the 400/404 it deserves. Pure; knows both API
versions.

The order of the checks is the API's: body, model, betas, parameters. Texts follow docs "api/errors" where they are
known.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast

import msgspec

from headgate.simulator.binding import CONTROLS_BETA, check_thinking_blocks
from headgate.simulator.errors import ApiError, Rejected, invalid
from headgate.simulator.jsonvalue import Json, JsonObject, content_blocks, int_in, list_in, object_in, text_in
from headgate.simulator.models import Catalogue, Model
from headgate.simulator.prompt import markable

Purpose = Literal["message", "count", "batch"]
Thinking = Literal["off", "adaptive", "enabled", "between_tools"]
Display = Literal["omitted", "summarized"]

VERSIONS = frozenset({"2023-01-01", "2023-06-01", "2026-10-21"})
SAMPLING_REMOVED = "2026-10-21"
SAMPLING_DEFAULTS: dict[str, float | None] = {"temperature": 1.0, "top_p": None, "top_k": None}

MESSAGES_MAX = 100_000
BREAKPOINTS_MAX = 4
BUDGET_TOKENS_MIN = 1_024
EFFORTS = ("low", "medium", "high", "xhigh", "max")
OUTPUT_300K_BETA = "output-300k-2026-03-24"

FIELDS = frozenset(
    [
        "model",
        "max_tokens",
        "messages",
        "system",
        "cache_control",
        "metadata",
        "stop_sequences",
        "stream",
        "thinking",
        "output_config",
        "tools",
        "tool_choice",
        "service_tier",
        "speed",
        "inference_geo",
        "container",
        "diagnostics",
        "temperature",
        "top_p",
        "top_k",
    ]
)
BETA_FIELDS: dict[str, tuple[str, ...]] = {
    "context_management": ("context-management-", "compact-"),
    "compaction": ("compact-",),
    "fallbacks": ("server-side-fallback-",),
    "fallback_credit_token": ("fallback-credit-",),
    "mcp_servers": ("mcp-client-",),
    "thread": ("message-threads-",),
    "billing_policy": ("user-profiles-billing-",),
}
"""Top-level fields that need a beta: any whose name begins so."""
NOT_IN_BATCHES = ("speed", "fallbacks", "thread")

BETAS = frozenset(
    [
        "computer-use-2024-10-22",
        "computer-use-2025-01-24",
        "computer-use-2025-11-24",
        "output-128k-2025-02-19",
        "mcp-client-2025-04-04",
        "mcp-client-2025-11-20",
        "mcp-client-2026-09-15",
        "dev-full-thinking-2025-05-14",
        "interleaved-thinking-2025-05-14",
        "code-execution-2025-05-22",
        "context-1m-2025-08-07",
        "context-management-2025-06-27",
        "model-context-window-exceeded-2025-08-26",
        "fast-mode-2026-02-01",
        "output-300k-2026-03-24",
        "user-profiles-2026-03-24",
        "user-profiles-2026-08-18",
        "user-profiles-2026-09-04",
        "advisor-tool-2026-03-01",
        "managed-agents-2026-04-01",
        "dreaming-2026-04-21",
        "thinking-token-count-2026-05-13",
        "server-side-fallback-2026-06-01",
        "server-side-fallback-2026-07-01",
        "fallback-credit-2026-06-01",
        "fallback-credit-2026-07-01",
        "agent-memory-2026-07-22",
        "mid-conversation-tool-changes-2026-07-01",
        "compact-2026-01-12",
        "compact-2026-09-04",
        "mcp-tunnels-2026-06-22",
        "structured-outputs-2025-11-13",
        "task-budgets-2026-03-13",
        "thinking-display-updates-2026-08-18",
        "mid-conversation-output-config-2026-07-01",
        "thinking-binding-controls-2026-08-01",
        "mid-conversation-system-clear-at-2026-08-21",
        "inline-tools-2026-09-15",
        "ce-plugins-2026-09-01",
        "spend-limit-reads-2026-09-26",
        "telemetry-destinations-2026-08-11",
        "webhooks-2026-10-07",
        "admin-user-sign-out-2026-10-08",
        "message-threads-2026-08-12",
        "analytics-usage-cost-2026-08-24",
        "experimental-claude-tag-2026-10-21",
        "message-batches-2024-09-24",
        "prompt-caching-2024-07-31",
        "pdfs-2024-09-25",
        "token-counting-2024-11-01",
        "token-efficient-tools-2025-02-19",
        "files-api-2025-04-14",
        "extended-cache-ttl-2025-04-11",
        "skills-2025-10-02",
        "cache-diagnosis-2026-04-07",
        "ce-user-management-2026-07-13",
        "ce-claude-code-managed-settings-2026-10-06",
        "efs-2026-10-01",
        "user-profiles-billing-2026-10-01",
        "claude-code-20250219",
        "oauth-2025-04-20",
        "prompt-caching-scope-2026-01-05",
        "fine-grained-tool-streaming-2025-05-14",
    ]
)
"""Official SDK 2.12, `types/anthropic_beta_param.py`; the last four are what Claude Code sends."""

TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
BLOCKS_OF: dict[str, frozenset[str]] = {
    "user": frozenset(
        [
            "text",
            "image",
            "document",
            "search_result",
            "tool_result",
            "container_upload",
            "tool_reference",
            "mid_conv_system",
        ]
    ),
    "assistant": frozenset(
        [
            "text",
            "thinking",
            "redacted_thinking",
            "tool_use",
            "server_tool_use",
            "web_search_tool_result",
            "web_fetch_tool_result",
            "code_execution_tool_result",
            "bash_code_execution_tool_result",
            "text_editor_code_execution_tool_result",
            "tool_search_tool_result",
            "container_upload",
            "search_result",
            "mcp_tool_use",
            "mcp_tool_result",
            "fallback",
            "compaction",
            "document",
            "image",
        ]
    ),
    "system": frozenset({"text"}),
}


@dataclass(frozen=True, slots=True)
class Ask:
    """A valid request, defaults filled in."""

    model: Model
    body: JsonObject
    max_tokens: int
    """0 warms the cache and answers nothing."""
    stream: bool
    thinking: Thinking
    budget_tokens: int | None
    display: Display
    effort: str
    speed: str | None
    """As asked for: `standard`, `fast` or None."""
    inference_geo: str
    stop_sequences: tuple[str, ...]
    betas: frozenset[str]
    purpose: Purpose


def read_body(raw: bytes) -> JsonObject:
    """The body as an object; Rejected for anything else."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected(invalid(f"The request body is not valid JSON: {error}")) from None
    if not isinstance(body, dict):
        raise Rejected(invalid("The request body must be a JSON object."))
    return cast(JsonObject, body)


def check_version(version: str | None) -> str:
    """The `anthropic-version` in force; Rejected when it is missing or unknown."""
    if version is None:
        raise Rejected(invalid("anthropic-version: header is required"))
    if version not in VERSIONS:
        raise Rejected(invalid(f"anthropic-version: {version!r} is not a valid version"))
    return version


def read_betas(header: str | None) -> frozenset[str]:
    """The values of `anthropic-beta`; Rejected when one is unknown."""
    values = [value.strip() for value in (header or "").split(",") if value.strip()]
    unknown = [value for value in values if value not in BETAS]
    if unknown:
        listed = ", ".join(f"`{value}`" for value in unknown)
        raise Rejected(
            invalid(
                f"Unexpected value(s) {listed} for the `anthropic-beta` header. Please consult our documentation at "
                "docs.claude.com or try again without the header."
            )
        )
    return frozenset(values)


def find_model(body: JsonObject, catalogue: Catalogue) -> Model:
    """The model a body names; Rejected with 404 when there is none, or it is retired."""
    name = body.get("model")
    if name is None:
        raise Rejected(invalid("model: Field required"))
    if not isinstance(name, str):
        raise Rejected(invalid("model: Input should be a valid string"))
    model = catalogue.find(name)
    if model is None or model.lifecycle == "retired":
        raise Rejected(ApiError(404, f"model: {name}"))
    return model


def read_ask(
    body: JsonObject,
    *,
    version: str,
    betas: str | None,
    catalogue: Catalogue,
    organization: str,
    purpose: Purpose,
    lenient: bool = False,
) -> Ask:
    """The request, or Rejected with what is wrong first. `lenient` lets unknown top-level fields pass."""
    model = find_model(body, catalogue)
    values = read_betas(betas)
    if not lenient:
        _check_fields(body, values)
    if purpose == "batch":
        _check_batch(body)
    max_tokens = _max_tokens(body, model, values, purpose)
    stream = _bool(body, "stream")
    _check_sampling(body, model, version)
    effort = _effort(body, model)
    thinking, budget, display = _thinking(body, model, effort, max_tokens, purpose, values)
    tools = _check_tools(body)
    choice = _check_tool_choice(body, model, tools)
    _check_messages(body, model, version)
    _check_cache_marks(body)
    if choice in ("any", "tool") and thinking == "enabled":
        raise Rejected(invalid("Thinking may not be enabled when tool_choice forces tool use."))
    if max_tokens == 0 and purpose == "message":
        _check_prewarm(body, stream=stream, thinking=thinking, choice=choice)
    speed = _speed(body, model)
    geo = _geo(body, model)
    check_thinking_blocks(body, model, organization, values)
    return Ask(
        model=model,
        body=body,
        max_tokens=max_tokens,
        stream=stream,
        thinking=thinking,
        budget_tokens=budget,
        display=display,
        effort=effort,
        speed=speed,
        inference_geo=geo,
        stop_sequences=_stop_sequences(body),
        betas=values,
        purpose=purpose,
    )


def check_context(ask: Ask, prompt_tokens: int) -> None:
    """Rejected when the prompt does not fit into the model's context."""
    maximum = ask.model.context_tokens
    if prompt_tokens > maximum:
        raise Rejected(invalid(f"prompt is too long: {prompt_tokens} tokens > {maximum} maximum"))


def _check_fields(body: JsonObject, betas: frozenset[str]) -> None:
    for name in body:
        if name in FIELDS:
            continue
        prefixes = BETA_FIELDS.get(name, ())
        if not any(beta.startswith(prefix) for beta in betas for prefix in prefixes):
            raise Rejected(invalid(f"{name}: Extra inputs are not permitted"))


def _check_batch(body: JsonObject) -> None:
    if body.get("stream") is True:
        raise Rejected(invalid("stream: Streaming is not supported in batches."))
    for name in NOT_IN_BATCHES:
        if body.get(name) is not None:
            raise Rejected(invalid(f"{name}: This parameter is not supported in batches."))


def _max_tokens(body: JsonObject, model: Model, betas: frozenset[str], purpose: Purpose) -> int:
    if purpose == "count":
        return model.output_tokens_max
    if "max_tokens" not in body:
        raise Rejected(invalid("max_tokens: Field required"))
    value = int_in(body["max_tokens"])
    if value is None:
        raise Rejected(invalid("max_tokens: Input should be a valid integer"))
    if value < (1 if purpose == "batch" else 0):
        raise Rejected(invalid("max_tokens: Input should be greater than or equal to 1"))
    large = purpose == "batch" and OUTPUT_300K_BETA in betas
    maximum = model.batch_output_tokens_max if large else model.output_tokens_max
    if value > maximum:
        raise Rejected(
            invalid(
                f"max_tokens: {value} > {maximum}, which is the maximum allowed number of output tokens for {model.id}"
            )
        )
    return value


def _bool(body: JsonObject, name: str) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise Rejected(invalid(f"{name}: Input should be a valid boolean"))


def _check_sampling(body: JsonObject, model: Model, version: str) -> None:
    given = [name for name in SAMPLING_DEFAULTS if body.get(name) is not None]
    for name in given:
        value = body[name]
        if version == SAMPLING_REMOVED:
            raise Rejected(invalid(f"{name}: This parameter is not supported in API version {version}."))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Rejected(invalid(f"{name}: Input should be a valid number"))
        if not model.sampling and value != SAMPLING_DEFAULTS[name]:
            raise Rejected(invalid(f"`{name}` is not supported for this model."))
    temperature = body.get("temperature")
    if isinstance(temperature, int | float) and not 0 <= temperature <= 1:
        raise Rejected(invalid("temperature: Input should be between 0 and 1"))
    if model.prefill and "temperature" in given and "top_p" in given:  # Claude 4.5 alone (docs: migrating to 4.5)
        raise Rejected(
            invalid("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")
        )


def _effort(body: JsonObject, model: Model) -> str:
    config = _object(body, "output_config")
    effort = config.get("effort")
    if effort is None:
        return model.default_effort
    if effort not in EFFORTS:
        raise Rejected(invalid("output_config.effort: Input should be 'low', 'medium', 'high', 'xhigh' or 'max'"))
    if effort not in model.effort:
        raise Rejected(invalid(f'output_config.effort: "{effort}" is not supported for this model.'))
    return effort


def _thinking(
    body: JsonObject, model: Model, effort: str, max_tokens: int, purpose: Purpose, betas: frozenset[str]
) -> tuple[Thinking, int | None, Display]:
    config = body.get("thinking")
    if config is None:
        return model.thinking_default, None, model.thinking_display
    if not isinstance(config, dict):
        raise Rejected(invalid("thinking: Input should be an object"))
    kind = config.get("type")
    if kind not in ("adaptive", "enabled", "disabled", "between_tools"):
        raise Rejected(invalid("thinking.type: Input should be 'adaptive', 'enabled', 'disabled' or 'between_tools'"))
    if kind not in model.thinking:
        raise Rejected(invalid(_thinking_refused(kind, model)))
    if "block_binding" in config and CONTROLS_BETA not in betas:
        raise Rejected(invalid("thinking.block_binding: Extra inputs are not permitted"))
    display = config.get("display", model.thinking_display)
    if display not in ("omitted", "summarized"):
        raise Rejected(invalid("thinking.display: Input should be 'omitted' or 'summarized'"))
    if kind == "disabled":
        limit = model.disabled_effort_max
        if limit is not None and EFFORTS.index(effort) > EFFORTS.index(limit):
            raise Rejected(invalid(f'"thinking.type.disabled" is not supported at effort "{effort}" for this model.'))
        return "off", None, model.thinking_display
    if kind != "enabled":
        return cast(Thinking, kind), None, cast(Display, display)
    budget = int_in(config.get("budget_tokens"))
    if budget is None:
        raise Rejected(invalid("thinking.enabled.budget_tokens: Field required"))
    if budget < BUDGET_TOKENS_MIN:
        raise Rejected(invalid("thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"))
    if purpose != "count" and 0 < max_tokens <= budget:
        raise Rejected(invalid("`max_tokens` must be greater than `thinking.budget_tokens`."))
    return "enabled", budget, cast(Display, display)


def _thinking_refused(kind: str, model: Model) -> str:
    if kind == "adaptive":
        return "adaptive thinking is not supported on this model"
    advice = 'Use "thinking.type.adaptive" and "output_config.effort" to control thinking behavior.'
    if kind == "disabled" and "between_tools" in model.thinking:
        advice = 'Use "thinking.type.between_tools" to turn thinking off.'
    return f'"thinking.type.{kind}" is not supported for this model. {advice}'


def _check_tools(body: JsonObject) -> frozenset[str]:
    names: set[str] = set()
    for position, tool in enumerate(_list(body, "tools")):
        where = f"tools.{position}"
        if not isinstance(tool, dict):
            raise Rejected(invalid(f"{where}: Input should be an object"))
        kind = tool.get("type", "custom")
        if kind == "mcp_toolset":
            continue
        name = tool.get("name")
        if not isinstance(name, str):
            raise Rejected(invalid(f"{where}.custom.name: Field required"))
        if not TOOL_NAME.fullmatch(name):
            raise Rejected(invalid(f"{where}.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'"))
        if name in names:
            raise Rejected(invalid("tools: Tool names must be unique.", "tool_name_conflict"))
        names.add(name)
        if kind in ("custom", None):
            schema = tool.get("input_schema")
            if not isinstance(schema, dict):
                raise Rejected(invalid(f"{where}.custom.input_schema: Field required"))
            if schema.get("type") != "object":
                raise Rejected(invalid(f"{where}.custom.input_schema.type: Input should be 'object'"))
    return frozenset(names)


def _check_tool_choice(body: JsonObject, model: Model, tools: frozenset[str]) -> str | None:
    choice = body.get("tool_choice")
    if choice is None:
        return None
    kind = object_in(choice).get("type")
    if kind not in ("auto", "any", "tool", "none"):
        raise Rejected(invalid("tool_choice.type: Input should be 'auto', 'any', 'tool' or 'none'"))
    if not tools and kind != "none":
        raise Rejected(invalid("tool_choice: tool_choice may only be specified while providing tools."))
    if kind in ("any", "tool") and not model.forced_tools:
        raise Rejected(invalid(f'tool_choice.type: "{kind}" is not supported for this model. Use "auto".'))
    if kind == "tool" and object_in(choice).get("name") not in tools:
        raise Rejected(
            invalid(f"tool_choice.tool.name: Tool '{object_in(choice).get('name')}' not found in provided tools")
        )
    return kind


def _check_messages(body: JsonObject, model: Model, version: str) -> None:
    _check_system(body)
    if "messages" not in body:
        raise Rejected(invalid("messages: Field required"))
    messages = _list(body, "messages")
    if not messages:
        raise Rejected(invalid("messages: at least one message is required"))
    if len(messages) > MESSAGES_MAX:
        raise Rejected(invalid(f"messages: too many messages: {len(messages)} > {MESSAGES_MAX} maximum"))
    pending: set[str] = set()
    role = ""
    for position, message in enumerate(messages):
        where = f"messages.{position}"
        if not isinstance(message, dict):
            raise Rejected(invalid(f"{where}: Input should be an object"))
        role = text_in(message.get("role"))
        if role not in BLOCKS_OF or (role == "system" and position == 0):
            raise Rejected(invalid(f"{where}.role: Input should be 'user' or 'assistant'"))
        if position == 0 and role == "assistant":
            raise Rejected(invalid('messages: first message must use the "user" role'))
        last = position == len(messages) - 1
        blocks = _check_content(message, where, role, version, may_be_empty=last and role == "assistant")
        pending = _check_tool_pairs(blocks, where, role, pending)
    if role == "assistant" and not model.prefill:
        raise Rejected(
            invalid(
                "This model does not support assistant message prefill. The conversation must end with a user message."
            )
        )
    if role == "assistant" and text_in(_last_text(messages[-1])).endswith((" ", "\n")):
        raise Rejected(invalid("messages: final assistant content cannot end with trailing whitespace"))


def _check_system(body: JsonObject) -> None:
    system = body.get("system")
    if system is None or isinstance(system, str):
        return
    if not isinstance(system, list):
        raise Rejected(invalid("system: Input should be a valid string or list"))
    for position, block in enumerate(system):
        if object_in(block).get("type") != "text":
            raise Rejected(invalid(f"system.{position}.type: Input should be 'text'"))
        if not text_in(object_in(block).get("text")):
            raise Rejected(invalid(f"system.{position}: text content blocks must be non-empty"))


def _check_content(message: JsonObject, where: str, role: str, version: str, *, may_be_empty: bool) -> list[JsonObject]:
    content = message.get("content")
    if content is None:
        raise Rejected(invalid(f"{where}.content: Field required"))
    if not isinstance(content, str | list):
        raise Rejected(invalid(f"{where}.content: Input should be a valid string or list"))
    if not content and not may_be_empty:
        raise Rejected(
            invalid(
                f"{where}: all messages must have non-empty content except for the optional final assistant message"
            )
        )
    if isinstance(content, str):
        return []
    blocks: list[JsonObject] = []
    for position, block in enumerate(content):
        at = f"{where}.content.{position}"
        if not isinstance(block, dict):
            raise Rejected(invalid(f"{at}: Input should be an object"))
        kind = block.get("type")
        if kind is None:
            raise Rejected(invalid(f"{at}.type: Field required"))
        if text_in(kind) not in BLOCKS_OF[role]:
            raise Rejected(
                invalid(f"{at}: Input tag '{kind}' found using 'type' does not match any of the expected tags")
            )
        _check_block(block, at, role, version)
        blocks.append(block)
    return blocks


def _check_block(block: JsonObject, at: str, role: str, version: str) -> None:
    kind = block["type"]
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise Rejected(invalid(f"{at}.text.text: Field required"))
        if not text_in(block["text"]):
            raise Rejected(invalid(f"{at}: text content blocks must be non-empty"))
        if version == SAMPLING_REMOVED and role == "user" and block.get("citations"):
            raise Rejected(invalid(f"{at}.text.citations: Extra inputs are not permitted"))
    if kind == "document" and role == "assistant" and version == SAMPLING_REMOVED:
        raise Rejected(invalid(f"{at}: `document` blocks are not permitted in assistant messages."))
    if kind in ("image", "document") and not isinstance(block.get("source"), dict):
        raise Rejected(invalid(f"{at}.{kind}.source: Field required"))
    if kind == "tool_use" and not (isinstance(block.get("id"), str) and isinstance(block.get("input"), dict)):
        raise Rejected(invalid(f"{at}.tool_use: `id` and `input` are required"))
    if kind == "tool_result" and not isinstance(block.get("tool_use_id"), str):
        raise Rejected(invalid(f"{at}.tool_result.tool_use_id: Field required"))


def _check_tool_pairs(blocks: list[JsonObject], where: str, role: str, pending: set[str]) -> set[str]:
    if role == "assistant":
        return {text_in(block.get("id")) for block in blocks if block.get("type") == "tool_use"}
    results = {text_in(block.get("tool_use_id")) for block in blocks if block.get("type") == "tool_result"}
    unknown = sorted(results - pending)
    if unknown:
        raise Rejected(
            invalid(
                f"{where}.content.0: unexpected `tool_use_id` found in `tool_result` blocks: {unknown[0]}. "
                "Each `tool_result` block must have a corresponding `tool_use` block in the previous message."
            )
        )
    missing = sorted(pending - results)
    if missing and role == "user":
        raise Rejected(
            invalid(
                f"{where}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block in the "
                "next message."
            )
        )
    return pending - results


def _check_cache_marks(body: JsonObject) -> None:
    marked: list[str] = []
    places: list[tuple[str, JsonObject]] = [
        (f"tools.{i}", object_in(tool)) for i, tool in enumerate(list_in(body.get("tools")))
    ]
    places += [(f"system.{i}", block) for i, block in enumerate(content_blocks(body.get("system")))]
    for i, message in enumerate(list_in(body.get("messages"))):
        for j, block in enumerate(content_blocks(object_in(message).get("content"))):
            places.append((f"messages.{i}.content.{j}", block))
    last_mark: Json = None
    for where, block in places:
        mark = block.get("cache_control")
        if mark is None:
            last_mark = None
            continue
        ttl = _check_mark(mark, where)
        if not markable(block):
            raise Rejected(invalid(f"{where}.cache_control: This block cannot carry cache_control."))
        marked.append(ttl)
        last_mark = mark
    automatic = body.get("cache_control")
    if automatic is not None:
        ttl = _check_mark(automatic, "cache_control")
        if last_mark is None:
            marked.append(ttl)
        elif marked[-1] != ttl:
            raise Rejected(invalid("cache_control: conflicts with the ttl of the last block's own cache_control."))
    if len(marked) > BREAKPOINTS_MAX:
        raise Rejected(
            invalid(f"A maximum of {BREAKPOINTS_MAX} blocks with cache_control may be provided. Found {len(marked)}.")
        )
    if "1h" in marked and "5m" in marked[: len(marked) - 1 - marked[::-1].index("1h")]:
        raise Rejected(
            invalid("cache_control: a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block.")
        )


def _check_mark(mark: Json, where: str) -> str:
    label = where if where == "cache_control" else f"{where}.cache_control"
    if not isinstance(mark, dict) or mark.get("type") != "ephemeral":
        raise Rejected(invalid(f"{label}.type: Input should be 'ephemeral'"))
    ttl = mark.get("ttl") or "5m"
    if ttl not in ("5m", "1h"):
        raise Rejected(invalid(f"{label}.ttl: Input should be '5m' or '1h'"))
    return ttl


def _check_prewarm(body: JsonObject, *, stream: bool, thinking: Thinking, choice: str | None) -> None:
    reason = None
    if stream:
        reason = "stream"
    elif thinking == "enabled":
        reason = "thinking.type.enabled"
    elif object_in(body.get("output_config")).get("format") is not None:
        reason = "output_config.format"
    elif choice in ("any", "tool"):
        reason = "tool_choice"
    if reason is not None:
        raise Rejected(invalid(f"max_tokens: 0 is not supported together with {reason}."))


def _speed(body: JsonObject, model: Model) -> str | None:
    speed = body.get("speed")
    if speed is None:
        return None
    if speed not in ("standard", "fast"):
        raise Rejected(invalid("speed: Input should be 'standard' or 'fast'"))
    if speed == "fast" and model.id == "claude-opus-4-6":
        return "standard"  # its fast mode ended, and the request runs as a standard one (docs: fast mode)
    if speed == "fast" and not model.fast:
        raise Rejected(invalid("speed: fast mode is not supported for this model."))
    return speed


def _geo(body: JsonObject, model: Model) -> str:
    geo = body.get("inference_geo")
    if geo is None:
        return "global"
    if geo not in ("global", "us"):
        raise Rejected(invalid("inference_geo: Input should be 'global' or 'us'"))
    if not model.us:
        raise Rejected(invalid("inference_geo: This parameter is not supported for this model."))
    return geo


def _stop_sequences(body: JsonObject) -> tuple[str, ...]:
    found: list[str] = []
    for position, value in enumerate(_list(body, "stop_sequences")):
        if not isinstance(value, str):
            raise Rejected(invalid(f"stop_sequences.{position}: Input should be a valid string"))
        if not value.strip():
            raise Rejected(invalid(f"stop_sequences.{position}: each stop sequence must contain non-whitespace"))
        found.append(value)
    return tuple(found)


def _list(body: JsonObject, name: str) -> list[Json]:
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Rejected(invalid(f"{name}: Input should be a valid list"))
    return value


def _object(body: JsonObject, name: str) -> JsonObject:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Rejected(invalid(f"{name}: Input should be an object"))
    return value


def _last_text(message: Json) -> Json:
    blocks = content_blocks(object_in(message).get("content"))
    return blocks[-1].get("text") if blocks else None
