"""A process that writes calls into a ledger until it is killed. Run by test_ledger.py; not a test itself.

It tells a witness file what it was promised, after the ledger returned: `<call id> <attempt> intent`, then
perhaps `… started`, and `… <cost>` once the ending was written. It writes the witness as the journal is written, so
that it is as sure as what it is a witness of.
"""

import os
import random
import sys
import time
from pathlib import Path

from headgate.policy.records import AttemptEnded, AttemptIntent, AttemptProgress, AttemptStarted, CallClosed, CallOpened
from headgate.storage.database import open_database
from headgate.storage.ledger import LocalLedger
from headgate.wire.usage import Usage

MODEL = "claude-sonnet-4-6"
OPEN_AT_ONCE = 20


def price(usage: Usage, model: str, at_ns: int) -> tuple[int, int, str]:
    return usage.input_tokens + 10 * usage.output_tokens, 0, "orphan"


def main(data_dir: Path, seed: int) -> None:
    dice = random.Random(seed)
    engine = open_database(data_dir, now_ns=time.time_ns)
    ledger = LocalLedger(data_dir, engine, price=price, now_ns=time.time_ns)
    witness = os.open(data_dir / "witness", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(call_id: str, attempt: int, what: str) -> None:
        os.write(witness, f"{call_id} {attempt} {what}\n".encode())

    running: dict[str, int] = {}
    parent = os.getppid()
    number = 0
    while os.getppid() == parent:  # it outlives no test that was itself killed
        number += 1
        call_id = f"call_{time.time_ns():019d}{number:05d}"[:29]
        now_ns = time.time_ns()
        ledger.write(
            CallOpened(call_id, now_ns, "key00001", f"user-{number % 7}", "free", "chat", MODEL, streamed=True),
            AttemptIntent(call_id, 1, MODEL, now_ns, 1_000, 500),
        )
        tell(call_id, 1, "intent")
        running[call_id] = 1
        while len(running) > OPEN_AT_ONCE or (running and dice.random() < 0.4):
            one = dice.choice(list(running))
            attempt, roll, cost = running[one], dice.random(), dice.randrange(10**6)
            if roll < 0.3:
                ledger.write(AttemptStarted(one, attempt, "req_1", Usage(input_tokens=900, output_tokens=1)))
                tell(one, attempt, "started")
            elif roll < 0.5:
                ledger.write(AttemptProgress(one, attempt, dice.randrange(500)))
            elif roll < 0.6 and attempt < 3:
                ledger.write(
                    AttemptEnded(one, attempt, "void", 529, Usage(), "", 0),
                    AttemptIntent(one, attempt + 1, MODEL, now_ns, 1_000, 500),
                )
                tell(one, attempt, "0")
                tell(one, attempt + 1, "intent")
                running[one] = attempt + 1
            else:
                ledger.write(
                    AttemptEnded(one, attempt, "settled", 200, Usage(input_tokens=900, output_tokens=9), "row", cost),
                    CallClosed(one, "completed", 200, MODEL, 10),
                )
                tell(one, attempt, str(cost))
                del running[one]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
