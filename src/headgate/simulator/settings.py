"""Settings of the simulator: one frozen record. Reads nothing; the command line (`__main__`) and tests fill it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Tier = Literal["none", "tier1", "tier2", "tier3", "tier4", "start", "build", "scale"]


@dataclass(frozen=True, slots=True)
class SimulatorSettings:
    """Everything a simulator can be told at start. Defaults make a quick, honest API with the limits of tier Start."""

    host: str = "127.0.0.1"
    port: int = 9100
    """0 takes a free one."""
    seed: int = 1
    """Texts, ids, dice and the order of batch results depend on it and on the request alone."""
    speed: float = 1.0
    """How many times faster than life answers come; 0 sends everything at once."""

    tier: Tier = "start"
    rpm: int | None = None
    """Requests a minute for each model class, instead of the tier's; `itpm` and `otpm` likewise."""
    itpm: int | None = None
    otpm: int | None = None
    burst_s: float = 60.0
    """Seconds of rate that a full request bucket holds, in (0, 60]; 1 enforces 60 a minute as one a second."""
    ramp_factor: float | None = None
    """Refuse a class when its last minute exceeds this many times the mean of the five before; None: never."""
    ramp_floor_tokens: int = 50_000
    """Growth below this many tokens a minute is never a ramp."""
    spend_cap_usd: float | None = None
    """Monthly cap of an organization; None: none."""

    api_keys: tuple[str, ...] = ()
    """`KEY` or `KEY=ORG/WORKSPACE`. Empty: any key is good and all belong to one organization."""
    lenient: bool = False
    """Accept top-level body fields the API does not know, instead of answering 400."""
    edge_413: bool = False
    """Answer too large a body with HTML, as the network edge does, and not with JSON."""

    answer_tokens: int = 120
    """Mean length of an answer that nothing else decides."""
    ttft_s: float | None = None
    """Time to the first token for every request, instead of each model's own law."""
    otps: float | None = None
    """Output tokens a second for every model, instead of each model's own."""
    ping_s: float = 15.0
    """Silence after which a stream sends a ping."""
    count_bias: float = 1.0
    """count_tokens answers this many times what the bill will say."""

    batch_clock: float = 60.0
    """How many times faster than life batches age: at 60, a day takes 24 minutes."""

    records_max: int = 10_000
    """Requests kept for /sim/requests."""
    record_bytes_max: int = 256 * 2**20
    """Body bytes kept for /sim/requests."""
    header_timeout_s: float = 30.0
    """How long a connection may take over a request head."""
    idle_timeout_s: float = 600.0
    """How long an unused connection stays open."""

    tls_certificate: Path | None = None
    """PEM chain; serves https together with `tls_key`."""
    tls_key: Path | None = None
