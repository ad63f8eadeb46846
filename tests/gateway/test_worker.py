"""What a worker makes of its number: ids that nobody else gives out, and ports of its own."""

import json
import os
import re
import select
import socket
import subprocess
import sys

import pytest

from headgate.gateway import worker
from headgate.gateway.worker import WORKERS_MAX, CallIds, Worker

SECOND_NS = 10**9
NOW_NS = 1_785_000_000 * SECOND_NS


@pytest.fixture
def loaded_dice(monkeypatch):
    """Dice that always fall the same: what differs then, differs for certain."""
    monkeypatch.setattr(worker.secrets, "token_hex", lambda size: "7" * 2 * size)


def test_an_id_has_the_length_that_the_ledger_knows():
    assert re.fullmatch(r"call_[0-9a-f]{24}", CallIds(WORKERS_MAX - 1, now_ns=lambda: NOW_NS)())


def test_workers_that_begin_in_the_same_second_never_make_the_same_id(loaded_dice):
    ids = [CallIds(index, now_ns=lambda: NOW_NS) for index in range(WORKERS_MAX)]
    made = [each() for each in ids for _ in range(1_000)]
    assert len(set(made)) == len(made)


def test_a_worker_that_is_started_again_a_second_later_never_makes_an_id_of_its_first_life(loaded_dice):
    lives = [CallIds(1, now_ns=lambda at=at: NOW_NS + at * SECOND_NS) for at in range(3)]
    made = [each() for each in lives for _ in range(1_000)]
    assert len(set(made)) == len(made)


def test_ids_of_one_process_are_in_the_order_they_were_made_and_after_those_before_it():
    earlier, later = CallIds(9, now_ns=lambda: NOW_NS), CallIds(0, now_ns=lambda: NOW_NS + SECOND_NS)
    made = [*(earlier() for _ in range(300)), *(later() for _ in range(300))]
    assert made == sorted(made)


def test_when_the_counter_is_full_it_begins_anew_with_the_time_of_then(loaded_dice, monkeypatch):
    monkeypatch.setattr(worker, "_COUNTER_MAX", 3)
    times = iter(range(NOW_NS, NOW_NS + 10 * SECOND_NS, SECOND_NS))
    ids = CallIds(0, now_ns=lambda: next(times))
    made = [ids() for _ in range(7)]
    assert len(set(made)) == 7
    assert {len(each) for each in made} == {29}


def test_one_that_is_alone_listens_where_the_settings_say():
    alone = Worker()
    assert not alone.is_one_of_several
    assert (alone.public_port(8080), alone.operator_port(8081), alone.operator_port(0)) == (8080, 8081, 0)


EVENTS = """
from headgate.gateway.app import configure_logging, log
from headgate.gateway.worker import Worker
worker = Worker()
worker.index, worker.count = 1, 2
configure_logging(worker)
log.info("listening", gateway="http://127.0.0.1:8080")
try:
    raise RuntimeError("x" * 9_000)
except RuntimeError as error:
    log.error("task_crashed", exc_info=error)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_event_is_one_write_whatever_it_tells_of(unbuffered):
    """On a socket that keeps writes apart, each that comes is a whole line."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            subprocess.run([sys.executable, "-c", EVENTS], stdout=theirs, env=environment, check=True)
        writes = [ours.recv(1 << 20) for _ in range(2)]
        assert ours.recv(1) == b""
    assert all(write.endswith(b"}\n") and len(write) <= select.PIPE_BUF for write in writes)
    assert [(json.loads(write)["event"], json.loads(write)["worker"]) for write in writes] == [
        ("listening", 1),
        ("task_crashed", 1),
    ]
