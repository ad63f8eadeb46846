"""Everything the simulated API keeps between requests, in one place, with its clocks and dice. Holds; decides
nothing.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from headgate.simulator.auth import Keys
from headgate.simulator.bill import Bill
from headgate.simulator.cache import PromptCache, Scope
from headgate.simulator.faults import FaultPlan
from headgate.simulator.generate import Ids
from headgate.simulator.limits import RateLimiter
from headgate.simulator.models import Catalogue
from headgate.simulator.prompt import Prompt
from headgate.simulator.records import Exchange, RequestLog
from headgate.simulator.settings import SimulatorSettings
from headgate.simulator.ticker import Ticker

FINGERPRINTS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What cache diagnostics compare a later request with."""

    model: str
    speed: str | None
    prompt: Prompt


class World:
    """The state of one simulator."""

    def __init__(
        self,
        settings: SimulatorSettings,
        catalogue: Catalogue,
        ticker: Ticker,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self.settings = settings
        self.catalogue = catalogue
        self.ticker = ticker
        self.clock = clock
        """Monotonic seconds."""
        self.wall = wall
        """Seconds since 1970, for dates and prices."""
        self.keys = Keys(settings.api_keys)
        self.cache = PromptCache()
        self.limiter = RateLimiter(settings)
        self.bill = Bill(catalogue)
        self.faults = FaultPlan()
        self.log = RequestLog(records_max=settings.records_max, bytes_max=settings.record_bytes_max)
        self.open: dict[int, Exchange] = {}
        """Messages under way, by number."""
        self.fingerprints: OrderedDict[tuple[Scope, str], Fingerprint] = OrderedDict()
        self.seed = settings.seed
        self.ids = Ids(self.seed)
        self.dice = random.Random(self.seed)

    def reset(self, seed: int | None) -> None:
        """As after a start, with that seed; streams under way go on."""
        self.seed = self.settings.seed if seed is None else seed
        self.ids = Ids(self.seed)
        self.dice = random.Random(self.seed)
        self.cache.clear()
        self.limiter.clear()
        self.bill.clear()
        self.faults.clear()
        self.log.clear()
        self.fingerprints.clear()
        self.ticker.reset()

    def remember(self, scope: Scope, message_id: str, fingerprint: Fingerprint) -> None:
        """Keeps what diagnostics of a later turn need."""
        self.fingerprints[scope, message_id] = fingerprint
        while len(self.fingerprints) > FINGERPRINTS_MAX:
            self.fingerprints.popitem(last=False)
