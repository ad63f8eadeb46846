"""What the simulated Anthropic charges, to the nano-dollar. A witness: it shares no price and no line with the
gateway's ledger.
"""

from collections import deque
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Decimal

from headgate.simulator.models import Catalogue, Model, Price
from headgate.simulator.usage import Usage

PICO_PER_NANO = 1_000
LINES_MAX = 200_000


def price_of(model: Model, usage: Usage, day: date) -> Price:
    """The dated row for a response: its day, its speed, and the highest band below its prompt."""
    speed = "fast" if usage.speed == "fast" and model.fast else "standard"
    rows = [
        row
        for row in model.prices
        if row.speed == speed
        and row.valid_from <= day
        and (row.valid_to is None or day < row.valid_to)
        and row.prompt_over_tokens < max(usage.prompt_tokens, 1)
    ]
    if not rows:  # a day before the launch: the earliest row stands
        rows = [min((row for row in model.prices if row.speed == speed), key=lambda row: row.valid_from)]
    return max(rows, key=lambda row: row.prompt_over_tokens)


def charges(catalogue: Catalogue, model: Model, usage: Usage, day: date) -> list[tuple[str, Decimal]]:
    """What is charged for each kind of token, and for web searches, in pico-dollars, not rounded; what is not there
    is left out. Kinds have the names of the cost report's `token_type`.
    """
    row = price_of(model, usage, day)
    modifiers = catalogue.modifiers
    factor = Decimal(1)
    if usage.service_tier == "batch":
        factor *= modifiers.batch
    if usage.inference_geo == "us" and model.us:
        factor *= modifiers.us_inference
    found = [
        ("uncached_input_tokens", usage.input_tokens * row.input_picousd * factor),
        ("cache_read_input_tokens", usage.read_tokens * row.read_picousd * factor),
        ("cache_creation.ephemeral_5m_input_tokens", usage.write_5m_tokens * row.write_5m_picousd * factor),
        ("cache_creation.ephemeral_1h_input_tokens", usage.write_1h_tokens * row.write_1h_picousd * factor),
        ("output_tokens", usage.output_tokens * row.output_picousd * factor),
        ("web_search", Decimal(usage.web_searches * modifiers.web_search_picousd)),
    ]
    return [(kind, picousd) for kind, picousd in found if picousd]


def cost_nanousd(catalogue: Catalogue, model: Model, usage: Usage, day: date) -> int:
    """The charge for one response, rounded half up once, at its end."""
    total_picousd = sum((picousd for _, picousd in charges(catalogue, model, usage, day)), Decimal(0))
    return int((total_picousd / PICO_PER_NANO).quantize(Decimal(1), rounding=ROUND_HALF_UP))


@dataclass(frozen=True, slots=True)
class Line:
    """One charged response."""

    request: int
    """Number of the request in /sim/requests; 0 for a batch."""
    message_id: str
    request_id: str
    organization: str
    workspace: str
    model: str
    wall_s: float
    usage: Usage
    cost_nanousd: int
    complete: bool
    """False for a stream that was cut: its output is what had been produced."""

    @property
    def day(self) -> date:
        """The day (UTC) whose prices it was charged."""
        return _day(self.wall_s)


@dataclass(slots=True)
class Total:
    """Sums over lines."""

    requests: int = 0
    input_tokens: int = 0
    read_tokens: int = 0
    write_5m_tokens: int = 0
    write_1h_tokens: int = 0
    output_tokens: int = 0
    thinking_tokens: int = 0
    web_searches: int = 0
    cost_nanousd: int = 0

    def add(self, usage: Usage, cost: int) -> None:
        """Counts one line."""
        self.requests += 1
        self.input_tokens += usage.input_tokens
        self.read_tokens += usage.read_tokens
        self.write_5m_tokens += usage.write_5m_tokens
        self.write_1h_tokens += usage.write_1h_tokens
        self.output_tokens += usage.output_tokens
        self.thinking_tokens += usage.thinking_tokens
        self.web_searches += usage.web_searches
        self.cost_nanousd += cost

    def as_dict(self) -> dict[str, int]:
        """The sums by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


class Bill:
    """All that was charged: exact totals for ever, single lines for the last 200,000."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.lines: deque[Line] = deque(maxlen=LINES_MAX)
        self.total = Total()
        self.by_model: dict[str, Total] = {}
        self._months: dict[tuple[str, str], int] = {}

    def charge(
        self,
        model: Model,
        usage: Usage,
        *,
        request: int,
        message_id: str,
        request_id: str,
        organization: str,
        workspace: str,
        wall_s: float,
        complete: bool,
    ) -> Line:
        """Prices a response at the day it started, and keeps it."""
        cost = cost_nanousd(self._catalogue, model, usage, _day(wall_s))
        line = Line(request, message_id, request_id, organization, workspace, model.id, wall_s, usage, cost, complete)
        self.lines.append(line)
        self.total.add(usage, cost)
        self.by_model.setdefault(model.id, Total()).add(usage, cost)
        month = (organization, _day(wall_s).strftime("%Y-%m"))
        self._months[month] = self._months.get(month, 0) + cost
        return line

    def month_nanousd(self, organization: str, wall_s: float) -> int:
        """What the organization has spent in the calendar month (UTC) of that moment."""
        return self._months.get((organization, _day(wall_s).strftime("%Y-%m")), 0)

    def clear(self) -> None:
        """A new bill."""
        self.lines.clear()
        self.total = Total()
        self.by_model.clear()
        self._months.clear()


def _day(wall_s: float) -> date:
    return datetime.fromtimestamp(wall_s, tz=UTC).date()
