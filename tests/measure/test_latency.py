# SPDX-License-Identifier: Apache-2.0
"""Oracles: a clock of our own, on which every call takes a known time; known noise; and one busy wait on the real clock."""

import dataclasses
import functools
import gc
import itertools
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from featherweight.errors import FeatherweightError, OptionError
from featherweight.measure import Latency, compare, latency, machine_facts, time_callables


class Clock:
    """Stands in for the module `time`: it moves only when a candidate says how long it took."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9

    def taking(self, milliseconds):
        """A candidate whose calls take these milliseconds, one after another."""
        durations = iter(milliseconds)

        def candidate() -> None:
            self.now_ns += round(1e6 * next(durations))

        return candidate


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def made(samples, name="x", **facts) -> Latency:
    samples = tuple(float(s) for s in samples)
    facts = {"threads": 1, "batch": 1, "measured": "then", **facts}
    return Latency(
        name=name, median_ms=float(np.median(samples)), p90_ms=0.0, iqr_ms=float(np.subtract(*np.percentile(samples, [75, 25]))), n=len(samples), first_ms=0.0,
        throughput_per_s=0.0, samples_ms=samples, **facts,
    )  # fmt: skip


def test_first_call_and_warmup_are_kept_apart_and_the_figures_are_numpys(clock: Clock) -> None:
    timed = np.random.default_rng(0).uniform(1, 2, 60).round(3)
    result = time_callables({"a": clock.taking([50.0, 7, 7, 7, *timed])}, warmup=3, runs=60, batch=8)["a"]
    assert result.samples_ms == pytest.approx(timed)
    assert (result.first_ms, result.n, result.batch, result.name) == (50.0, 60, 8, "a")
    assert result.median_ms == pytest.approx(np.median(timed))
    assert result.p90_ms == pytest.approx(np.percentile(timed, 90))
    assert result.iqr_ms == pytest.approx(np.percentile(timed, 75) - np.percentile(timed, 25))
    assert result.throughput_per_s == pytest.approx(8 * 60 / (timed.sum() / 1000))


def test_every_round_calls_every_candidate_once_in_an_order_of_its_own() -> None:
    calls: list[str] = []
    candidates = {name: functools.partial(calls.append, name) for name in "abc"}
    time_callables(candidates, warmup=2, runs=50)
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[:3] == ["abc"] * 3  # first call and warm-up
    assert len(rounds) == 53
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds[3:])) == 6  # all orders come up
    assert all(15 < sum(one[0] == name for one in rounds[3:]) + 8 < 33 for name in "abc")
    again, calls[:] = calls[:], []
    time_callables(candidates, warmup=2, runs=50)
    assert calls == again


def test_samples_of_one_round_stand_at_one_index(clock: Clock) -> None:
    """A machine that is slow in some rounds is slow for all candidates there: each call takes the round's own time."""
    count = itertools.count()

    def candidate() -> None:
        clock.now_ns += 1_000_000 * (1 + next(count) // 2)

    times = time_callables({"a": candidate, "b": candidate}, warmup=1, runs=50)
    assert times["a"].samples_ms == times["b"].samples_ms == tuple(float(i) for i in range(3, 53))


def test_rounds_go_on_until_the_time_is_filled(clock: Clock) -> None:
    times = time_callables({"a": clock.taking([2.0] * 500), "b": clock.taking([3.0] * 500)}, runs=50, min_seconds=1.0)
    assert times["a"].n == times["b"].n
    assert times["a"].n in (200, 201)


def test_threads_and_garbage_collection_are_set_while_timing_and_put_back() -> None:
    seen: list[tuple[int, bool]] = []
    before = torch.get_num_threads()
    gc.enable()
    time_callables({"a": lambda: seen.append((torch.get_num_threads(), gc.isenabled()))}, threads=1, warmup=1, runs=50)
    assert set(seen[2:]) == {(1, False)}
    assert gc.isenabled() and torch.get_num_threads() == before
    gc.disable()
    try:
        assert time_callables({"a": lambda: None}, runs=50)["a"].threads == before
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_candidate_that_fails_is_named_and_all_is_put_back() -> None:
    calls = itertools.count()

    def fails_late() -> None:
        if next(calls) == 30:
            raise RuntimeError("out of paper")

    before = torch.get_num_threads()
    with pytest.raises(FeatherweightError, match="printer failed while it was timed: RuntimeError: out of paper"):
        time_callables({"fine": lambda: None, "printer": fails_late}, threads=before + 1, runs=50)
    assert gc.isenabled() and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": 49}, "runs=49: fewer than 50"),
        ({"warmup": 0}, "warmup=0"),
        ({"batch": 0}, "batch=0"),
        ({"threads": 0}, "threads=0"),
        ({"threads": 2}, "a runs on 1 threads and would be timed as 2"),
    ],
)
def test_a_protocol_that_would_mislead_is_refused(options: dict, words: str) -> None:
    class Session:
        threads = 1

        def __call__(self, x: int = 0) -> None: ...

    for candidate in (Session(), functools.partial(Session(), 3)):
        with pytest.raises(OptionError, match=words):
            time_callables({"a": candidate}, **options)
    with pytest.raises(OptionError, match="nothing to time"):
        time_callables({})


def noisy(chance: np.random.Generator, rounds: int, factor: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Two candidates on a machine with slow spells (shared by both), single slow calls and 5 % jitter."""
    spells = 1 + np.repeat(chance.random(rounds // 10 + 1) < 0.2, 10)[:rounds] * 0.8
    jitter = [np.exp(chance.normal(0, 0.05, rounds)) * (1 + 3 * (chance.random(rounds) < 0.03)) for _ in range(2)]
    return spells * jitter[0] * factor, spells * jitter[1]


def test_equal_candidates_are_never_called_faster_or_slower() -> None:
    chance = np.random.default_rng(1)
    verdicts = [compare(*map(made, noisy(chance, 200)), resamples=200) for _ in range(60)]
    assert [verdict.faster for verdict in verdicts] == [None] * 60
    assert all("within noise" in verdict.words for verdict in verdicts)


@pytest.mark.parametrize(("factor", "faster", "word"), [(1.3, True, "1.3"), (1 / 1.3, False, "1.3")])
def test_a_difference_beyond_the_noise_is_found_and_its_size_told(factor: float, faster: bool, word: str) -> None:
    chance = np.random.default_rng(2)
    verdicts = [compare(*map(made, noisy(chance, 200, factor)), resamples=200) for _ in range(40)]
    found = [verdict for verdict in verdicts if verdict.faster is not None]
    assert len(found) >= 36  # where spells widen the quartiles nothing is claimed
    assert all(verdict.faster is faster for verdict in found)
    assert all(("faster" if faster else "slower") in verdict.words for verdict in found)
    assert np.mean([verdict.ratio for verdict in verdicts]) == pytest.approx(factor, rel=0.01)
    # A 95 % interval misses the truth in one case of twenty.
    assert sum(not verdict.low <= factor <= verdict.high for verdict in verdicts) <= 6


def test_the_interval_is_as_wide_as_slow_spells_make_it() -> None:
    """Ten slow rounds in a row are one bad moment, not ten samples that agree."""
    chance = np.random.default_rng(3)

    def spells() -> Latency:
        return made(np.repeat(chance.lognormal(0, 0.2, 40), 10) * chance.lognormal(0, 0.02, 400))

    verdicts = [compare(spells(), spells(), resamples=100) for _ in range(60)]
    assert sum(not verdict.low <= 1 <= verdict.high for verdict in verdicts) <= 8
    assert sum(verdict.faster is not None for verdict in verdicts) <= 2


def test_a_difference_smaller_than_two_equal_sessions_show_is_not_claimed() -> None:
    exact = compare(made([1.02] * 100), made([1.0] * 100))
    assert (exact.faster, exact.low, exact.high) == (None, pytest.approx(1.02), pytest.approx(1.02))
    assert compare(made([1.02] * 100), made([1.0] * 100), noise=0.01).faster is True


def test_the_wider_single_calls_scatter_the_larger_a_difference_must_be() -> None:
    scatter = np.tile([0.8, 0.9, 1.0, 1.1, 1.2], 40)  # an interquartile range of 0.2: 5 % are asked for
    for factor, faster in ((1.04, None), (1.06, True)):
        verdict = compare(made(factor * scatter), made(scatter))
        assert (verdict.low, verdict.high) == (pytest.approx(factor), pytest.approx(factor))
        assert verdict.faster is faster


def test_a_bad_spell_that_hits_one_candidate_alone_is_no_difference() -> None:
    baseline = np.ones(200)
    baseline[:150] = 3.0  # most rounds, but none of the last quarter
    verdict = compare(made(baseline), made(np.ones(200)))
    assert verdict.low == 3.0
    assert verdict.faster is None


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"measured": "now"}, "not measured side by side"),
        ({"threads": 2}, "1 threads against 2"),
        ({"batch": 8}, "batch 1 against 8"),
    ],
)
def test_what_was_not_measured_alike_is_shown_but_nothing_is_claimed(facts: dict, words: str) -> None:
    verdict = compare(made([2.0] * 60), made([1.0] * 70, **facts))
    assert (verdict.ratio, verdict.faster) == (2.0, None)
    assert verdict.words.startswith(f"no claim: {words} (2.00x")


def test_candidates_of_one_measurement_are_comparable_and_those_of_two_are_not(clock: Clock) -> None:
    def measure() -> dict[str, Latency]:
        return time_callables({"slow": clock.taking([2.0] * 99), "fast": clock.taking([1.0] * 99)}, runs=50)

    one, two = measure(), measure()
    assert compare(one["slow"], one["fast"]).faster is True
    assert compare(one["slow"], two["fast"]).faster is None


def test_latencies_survive_json() -> None:
    latency = made([1.23456789, 2.0] * 30, measured="then")
    back = Latency.from_dict(json.loads(json.dumps(latency.to_dict())))
    assert back.samples_ms == (1.2346, 2.0) * 30
    assert (back.median_ms, back.iqr_ms) == (1.617, 0.7654)
    rest = {"samples_ms": (), "median_ms": 0.0, "iqr_ms": 0.0}
    assert dataclasses.replace(back, **rest) == dataclasses.replace(latency, **rest)
    assert json.loads(json.dumps(compare(latency, latency).to_dict()))["faster"] is None


def test_twice_the_work_is_found_on_the_real_clock() -> None:
    def wait(milliseconds: float) -> None:
        end = time.perf_counter_ns() + 1e6 * milliseconds
        while time.perf_counter_ns() < end:
            pass

    times = time_callables(
        {"once": lambda: wait(0.3), "same": lambda: wait(0.3), "twice": lambda: wait(0.6)}, threads=1, warmup=3, runs=80
    )
    assert times["once"].median_ms == pytest.approx(0.3, rel=0.3)
    assert compare(times["once"], times["same"]).faster is None
    assert compare(times["twice"], times["once"]).faster is True
    assert compare(times["once"], times["twice"]).faster is False
    assert compare(times["twice"], times["once"]).ratio == pytest.approx(2, rel=0.3)


def test_the_machines_facts_are_read_from_the_system(monkeypatch, tmp_path) -> None:
    facts = machine_facts()
    json.dumps(facts)
    assert facts["cpu"] and facts["cores"] >= 1
    assert facts["versions"]["torch"] == torch.__version__
    files = {
        "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Abacus 3\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t: amx_int8\n",
        "/sys/fs/cgroup/cpu.max": "150000 100000",
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave",
    }
    monkeypatch.setattr("featherweight.measure.machine._read", files.get)
    system = lambda path: SimpleNamespace(read_text=lambda: files[path])  # noqa: E731
    monkeypatch.setattr("featherweight.processor.Path", system)
    facts = machine_facts()
    assert (facts["cpu"], facts["flags"]) == ("Abacus 3", ["avx2", "avx512_vnni"])
    assert (facts["cpu_quota"], facts["governor"]) == (1.5, "powersave")
    files["/sys/fs/cgroup/cpu.max"] = "max 100000"
    assert machine_facts()["cpu_quota"] is None
    monkeypatch.setattr("featherweight.measure.machine.os", SimpleNamespace(cpu_count=lambda: 3))
    assert (machine_facts()["cores"], machine_facts()["memory_bytes"]) == (3, None)
