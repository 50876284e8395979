"""Tables of strangers: both forms are read, whatever is wrong ends in one clear error."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from castile.autotune import table as tables
from castile.autotune.replay import replay
from castile.autotune.surrogate import encode
from castile.autotune.table import read_table
from castile.ir.errors import InputError


def cache(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    names = [n for n in rows[0] if n not in ("time", "GFLOP/s")]
    found = {",".join(str(r[n]) for n in names): r for r in rows}
    return {"device_name": "d", "kernel_name": "k", "tune_params_keys": names, "cache": found, **more}


ROWS = [
    {"a": 1, "b": "row", "time": 2.0},
    {"a": 2, "b": "row", "time": 1.0},
    {"a": 4, "b": "column", "time": "RuntimeFailedConfig"},
    {"a": 8, "b": "column", "time": 1e20},
    {"a": 8, "b": "row", "time": None},
]


def written(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "table.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_cache_with_failures_and_words(tmp_path: Path) -> None:
    found = read_table(written(tmp_path, cache(ROWS)))
    assert found.parameters == ("a", "b")
    assert np.array_equal(np.isnan(found.times), [False, False, True, True, True])
    assert found.best == 1.0


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(gzip.compress(json.dumps(cache(ROWS)).encode()))
    assert len(read_table(path)) == 5


def test_a_cache_that_is_still_being_written(tmp_path: Path) -> None:
    assert len(read_table(written(tmp_path, json.dumps(cache(ROWS))[:-2] + ",\n"))) == 5


def test_t4(tmp_path: Path) -> None:
    results = [
        {
            "configuration": {"a": a},
            "invalidity": "correct" if a < 4 else "runtime",
            "objectives": ["time"],
            "measurements": [{"name": "time", "value": 1.0 / a, "unit": "ms"}],
        }
        for a in (1, 2, 4)
    ]
    found = read_table(written(tmp_path, {"schema_version": "1.0.0", "results": results}))
    assert found.best == 0.5
    assert np.isnan(found.times[2])


def test_more_is_better_where_the_objective_is_a_rate(tmp_path: Path) -> None:
    rows = [{"a": a, "GFLOP/s": 10.0 * a} for a in (1, 2, 3)]
    found = read_table(written(tmp_path, cache(rows, objective="GFLOP/s")))
    assert int(np.argmin(found.times)) == 2


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "{}",
        '{"cache": {}}',
        '{"cache": {"1": 3}, "tune_params_keys": ["a"]}',
        '{"cache": {"1": {"b": 1, "time": 1}}, "tune_params_keys": ["a"]}',
        '{"cache": {"1": {"a": 1, "time": "x"}}, "tune_params_keys": ["a"]}',
        '{"results": [3]}',
        '{"results": []}',
        '{"results": [{"configuration": {}, "times": {"runtimes": [1]}}]}',
        '{"results": [{"configuration": {"a": 1}, "measurements": 5}]}',
        "[" * 100_000,
        json.dumps(cache(ROWS))[:60],
    ],
)
def test_what_is_no_table_is_one_error(tmp_path: Path, data: str) -> None:
    with pytest.raises(InputError):
        read_table(written(tmp_path, data))


def test_bytes_that_are_no_text_or_end_early(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps(cache(ROWS)).encode())
    for raw in (b"\xff\xfe\x00", whole[: len(whole) // 2], b"\x1f\x8b", b"\x1f\x8bnot gzip"):
        path = tmp_path / "broken"
        path.write_bytes(raw)
        with pytest.raises(InputError):
            read_table(path)
    with pytest.raises(InputError):
        read_table(tmp_path / "absent")


def test_a_file_that_unzips_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LARGEST_BYTES", 1000)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b" " * 100_000))
    with pytest.raises(InputError, match="too large"):
        read_table(path)


def grid(tmp_path: Path) -> Path:
    rows = [
        {"x": 2**i, "y": 2**j, "z": z, "time": (1 + (i - 3) ** 2 + (j - 1) ** 2 + 2 * z) if i + j < 9 else "failed"}
        for i in range(6)
        for j in range(6)
        for z in (0, 1)
    ]
    return written(tmp_path, cache(rows))


def test_replay_is_deterministic_and_finds_the_optimum(tmp_path: Path) -> None:
    found = read_table(grid(tmp_path))
    first, second = (replay(found, 40, range(3)) for _ in range(2))
    assert np.array_equal(first.regrets, second.regrets)
    assert first.median()["40"] == 0.0
    assert np.all(np.diff(first.regrets, axis=1) <= 0)


def test_whole_numbers_lie_apart_by_size_and_by_how_often_2_divides_them() -> None:
    even = encode([[16, 48, 96, 128]]).places[0][:, 1]
    assert even[0] == even[1] == 0 < even[2] < even[3] == 1
    # Where the size says it too, or numbers are not whole or not above 0, there is nothing to add.
    assert encode([[1, 2, 4, 8]]).places[0].shape == (4, 1)
    assert encode([[3, 6, 12, 24]]).places[0].shape == (4, 1)
    assert encode([[0, 1, 2, 3]]).places[0].shape == (4, 1)
    assert encode([[1.5, 2, 3, 4]]).places[0].shape == (4, 1)
    assert encode([[1, 3, 5, 7]]).places[0].shape == (4, 1)
    assert encode([[1e300, 2, 3, 4]]).places[0].shape == (4, 1)


def test_what_names_say_to_act_together_has_a_place_too() -> None:
    columns = [[16, 32, 16, 32], [2, 2, 4, 4], [1, 1, 3, 3], [0, 1, 0, 1]]
    alone = encode(columns)
    named = encode(columns, ["block_size_x", "block_size_y", "tile_size_x", "stride_x"])
    assert named.codes.shape[1] == alone.codes.shape[1] + 2
    assert np.array_equal(named.codes[:, 4], [0, 1, 1, 2])  # 32, 64, 64 and 128 threads
    assert np.array_equal(named.codes[:, 5], [0, 1, 2, 3])  # 16, 32, 48 and 96 elements of x
    assert np.array_equal(encode(columns, ["a", "b_x", "c", "d"]).codes, alone.codes)


def test_more_trials_than_configurations(tmp_path: Path) -> None:
    result = replay(read_table(grid(tmp_path)), 100, [0])
    assert result.mean()["100"] == 0.0
