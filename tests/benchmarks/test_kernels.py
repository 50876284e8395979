"""The cases of `castile bench`: each says one thing, in a cascade, its inputs and its peers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import castile
from castile.benchmarks._command import Options, parse_options
from castile.benchmarks._workload import Tensors, Workload, case_of, draw, peak_bytes, verify
from castile.benchmarks._workloads_attention import documents, window
from castile.benchmarks._workloads_gemm import gemm_int4
from castile.benchmarks._workloads_rows import softmax_columns
from castile.benchmarks.bench_kernels import workloads
from castile.benchmarks.harness import WrongOutput, check
from castile.ir.extents import resolve

torch = pytest.importorskip("torch")


@pytest.fixture
def quick(tmp_path: Path) -> Options:
    return parse_options("kernels", ["--quick", "--threads", "2", "--out", str(tmp_path / "rows.jsonl")])


def test_names_tell_cases_apart_and_small_sizes_fit_their_cascades() -> None:
    names: Counter[str] = Counter()
    for w in workloads():
        names[w.name] += 1
        assert set(w.small) <= set(w.extents), w.name
        assert set(w.peers) or w.others, w.name
        inputs = draw(w, resolve(w.cascade, {**w.extents, **w.small}), np.random.default_rng(0))
        assert {p.name for p in w.cascade.params} <= set(inputs), w.name
    assert max(names.values()) == 1


def test_documents_are_in_order_and_none_is_empty() -> None:
    for length in (70, 2048):
        ids = documents(length)
        assert torch.equal(ids, ids.sort().values)
        assert ids.unique().tolist() == list(range(8))


@pytest.mark.parametrize(
    "workload", [lambda: window("f32"), lambda: gemm_int4(3, tiles=True), lambda: softmax_columns(9, 9)]
)
def test_castile_and_its_peers_agree_with_the_oracle(workload: Callable[[], Workload], quick: Options) -> None:
    check(case_of(workload(), quick))


def test_a_wrong_peer_is_found(quick: Options) -> None:
    def zeros(x: Tensors) -> Callable[[], object]:
        return lambda: torch.zeros_like(x["X"])

    c = castile.parse("def twice(X: f32[n]) -> Y:\n    Y[n] = X[n] + X[n]\n")
    w = Workload("twice", c, {"n": 8}, {"zeros": zeros})
    with pytest.raises(WrongOutput, match="zeros"):
        check(case_of(w, quick))


def test_a_result_without_ranks_is_judged() -> None:
    c = castile.parse("def total(X: f32[n]) -> Y:\n    Y = sum[n](X[n])\n")
    x = torch.arange(5.0)
    verify(c, {"n": 5}, {"X": x}, x.sum())
    with pytest.raises(AssertionError):
        verify(c, {"n": 5}, {"X": x}, x.sum() + 1)


def test_the_peak_is_that_of_the_call() -> None:
    small, large = (peak_bytes(lambda n=n: np.ones(n).sum()) for n in (8, 4 << 20))
    if small is None or large is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert small < 8 << 20 < 30 << 20 < large < 80 << 20
