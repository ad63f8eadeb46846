"""The fuzz targets in the ordinary suite: everything that fuzzing has found worth keeping, and some new dice."""

import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
TARGETS = runpy.run_path(str(HERE / "targets.py"))["TARGETS"]
CORPUS = {name: sorted((HERE / "corpus" / name).iterdir()) for name in TARGETS}
CORPUS_BYTES_MAX = 100_000


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_that_was_kept_passes(name):
    assert CORPUS[name]
    for path in CORPUS[name]:
        try:
            TARGETS[name](path.read_bytes())
        except Exception as problem:
            problem.add_note(f"found by {path.name}")
            raise


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
@settings(max_examples=60)
def test_inputs_near_those_that_were_kept_pass(name, data):
    seed = data.draw(st.sampled_from(CORPUS[name])).read_bytes()
    at = data.draw(st.integers(0, len(seed)))
    cut = data.draw(st.integers(0, 8))
    TARGETS[name](seed[:at] + data.draw(st.binary(max_size=6)) + seed[at + cut :])


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.binary(max_size=70))
@settings(max_examples=60)
def test_any_bytes_pass(name, data):
    TARGETS[name](data)


def test_the_corpus_stays_small():
    assert sum(path.stat().st_size for paths in CORPUS.values() for path in paths) < CORPUS_BYTES_MAX
