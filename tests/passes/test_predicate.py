"""Interval analysis of predicates, against trying every point of the box."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import numpy as np
import pytest

import castile
from castile.ir.cascade import Access, Call, Cascade, Const, Expr, Extent, Rank, negative
from castile.ir.errors import UsageError
from castile.ir.ops import OPS
from castile.ir.print import print_expr
from castile.passes import predicate
from castile.passes.predicate import Verdict, classify, loop_bounds, support

Box = dict[str, tuple[int, int]]
EXTENTS = {"q": 37, "k": 29, "p": 5}

NAMED = {
    "causal": "q >= k",
    "causal, keys before": "q + extent(k) - extent(q) >= k",
    "window": "(q >= k) & (q - k < 5)",
    "window both ways": "abs(q - k) <= 4",
    "prefix": "(q >= k) | (k < 6)",
    "sink and window": "(q >= k) & ((k < 3) | (q - k < 7))",
    "dilated": "(q >= k) & ((q - k) % 3 == 0)",
    "dilated window": "(q >= k) & (q - k < 12) & ((q - k) % 4 == 1)",
    "blocks": "q // 4 == k // 4",
    "blocks, causal": "q // 8 >= k // 8",
    "two blocks": "(q // 8 >= k // 4) & (q // 8 - k // 4 < 2)",
    "neighbourhood": "abs(minimum(maximum(q, 3), extent(q) - 1 - 3) - k) <= 3",
    "not causal": "~(q >= k)",
    "everything": "(q >= k) | (q < k)",
    "nothing": "(q > k) & (q < k)",
    "slanted": "2 * q + 3 <= 3 * k",
    "three ranks": "(q + p >= k) & (k + 2 * p != q)",
    "chosen": "where(p < 2, q >= k, q - k == p)",
}


def condition(text: str) -> Expr:
    """A predicate over q, k, p, integers doc and len, a scalar w and bools seen."""
    signature = "X: f32[q, k, p], doc: i32[q], len: i32[p], seen: bool[q, k], w: i32"
    c: Cascade = castile.parse(f"def f({signature}) -> Y:\n    Y[q, k, p] = where({text}, X[q, k, p], 0)\n")
    where = c.einsums[0].expr
    assert isinstance(where, Call)
    return where.args[0]


def truth(e: Expr, at: dict[str, Any], extents: dict[str, int] = EXTENTS, data: dict[str, Any] | None = None) -> Any:
    """What NumPy makes of an expression over a grid of coordinates."""
    match e:
        case Const(value=value):
            return np.asarray(value)
        case Rank(name=name):
            return at[name]
        case Extent(rank=rank):
            return np.asarray(extents[rank])
        case Access(tensor=tensor, indices=indices):
            assert data is not None
            return np.asarray(data[tensor])[tuple(truth(i, at, extents, data) for i in indices)]
        case Call(op="where", args=args):
            return np.where(*(truth(a, at, extents, data) for a in args))
        case Call(op=op, args=args):
            return OPS[op].numpy(*(truth(a, at, extents, data) for a in args))
        case _:
            raise AssertionError(e)


def grid(box: Box) -> dict[str, Any]:
    coordinates = np.meshgrid(*(np.arange(a, b + 1) for a, b in box.values()), indexing="ij")
    return dict(zip(box, coordinates, strict=True))


def tried(e: Expr, box: Box) -> Any:
    """The predicate at every point of the box, an axis for each rank."""
    at = grid(box)
    return np.broadcast_to(truth(e, at), next(iter(at.values())).shape)


def verdict(values: Any) -> Verdict:
    return "outside" if not values.any() else "full" if values.all() else "partial"


def random_box(rng: random.Random, widest: int = 12) -> Box:
    box = {}
    for rank, extent in EXTENTS.items():
        low = rng.randrange(extent)
        # One side in forty is empty.
        wide = rng.choice([0, 1, 2, 3, 7, widest]) if rng.random() < 0.975 else -1
        box[rank] = (low, min(extent - 1, low + wide))
    return box


def random_form(rng: random.Random, depth: int = 2) -> Expr:
    kind = rng.randrange(9 if depth else 3)
    if kind == 0:
        return negative(rng.randint(-9, 9))
    if kind in (1, 2):
        return Rank(rng.choice("qqkkp"))
    a, b = random_form(rng, depth - 1), random_form(rng, depth - 1)
    match kind:
        case 3 | 4:
            return Call("add", (a, b))
        case 5:
            return Call("sub", (a, b))
        case 6:
            return Call("mul", (negative(rng.randint(-3, 4)), a))
        case 7:
            return Call(rng.choice(["floordiv", "mod"]), (a, Const(rng.randint(1, 9))))
        case _:
            op = rng.choice(["minimum", "maximum", "abs", "rshift"])
            return Call(op, (a, Const(1)) if op == "rshift" else (a,) if op == "abs" else (a, b))


def random_predicate(rng: random.Random, depth: int = 3) -> Expr:
    kind = rng.randrange(8 if depth else 1)
    if kind < 3:
        op = rng.choice(["lt", "le", "gt", "ge", "eq", "ne"])
        return Call(op, (random_form(rng), random_form(rng)))
    if kind == 3:
        shift = Call("sub", (Rank("q"), Call("add", (Rank("k"), random_form(rng, 1)))))
        return (
            Const(True)
            if rng.random() < 0.1
            else Call(rng.choice(["lt", "ge"]), (shift, negative(rng.randint(-20, 20))))
        )
    parts = [random_predicate(rng, depth - 1) for _ in range(3)]
    if kind == 4:
        return Call("not", (parts[0],))
    if kind == 5:
        return Call("where", tuple(parts))
    return Call(rng.choice(["and", "or"]), (parts[0], parts[1]))


@pytest.mark.parametrize("name", NAMED)
def test_named_masks_are_exact_on_every_tile(name: str) -> None:
    p = condition(NAMED[name])
    for wide, high in [(1, 7), (4, 1), (4, 16), (7, 5), (16, 16)]:
        for q, k in product(range(0, EXTENTS["q"], wide), range(0, EXTENTS["k"], high)):
            box = {"q": (q, min(q + wide, 37) - 1), "k": (k, min(k + high, 29) - 1), "p": (1, 3)}
            assert classify(p, box, EXTENTS) == verdict(tried(p, box)), box


def test_random_predicates_are_exact() -> None:
    rng = random.Random(5)
    seen = {"outside": 0, "full": 0, "partial": 0}
    for _ in range(4000):
        p, box = random_predicate(rng), random_box(rng)
        want = verdict(tried(p, box))
        seen[want] += 1
        assert classify(p, box, EXTENTS) == want, (print_expr(p), box)
    assert min(seen.values()) > 300


def test_branch_and_bound_is_exact_without_trying_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predicate, "TRIED", 0)
    rng = random.Random(6)
    for _ in range(600):
        p, box = random_predicate(rng), random_box(rng, 5)
        want = verdict(tried(p, box))
        found = classify(p, box, EXTENTS)
        # A box of one point is where bounds are exact, so nothing but the budget stops the search.
        assert found == want, (print_expr(p), box)


def test_support_is_the_hull_of_what_holds() -> None:
    rng = random.Random(7)
    predicates = [condition(t) for t in NAMED.values()] * 20 + [random_predicate(rng) for _ in range(1200)]
    for p in predicates:
        box, rank = random_box(rng), rng.choice("qk")
        if any(a > b for a, b in box.values()):
            continue
        if rng.random() < 0.5:
            box[rank] = (0, EXTENTS[rank] - 1)
        values = tried(p, box)
        axis = list(box).index(rank)
        places = np.flatnonzero(values.any(axis=tuple(i for i in range(3) if i != axis)))
        want = (box[rank][0] + places[0], box[rank][0] + places[-1]) if len(places) else (0, -1)
        assert support(p, rank, box, EXTENTS) == want, (print_expr(p), rank, box)


def test_loop_bounds_hold() -> None:
    """Nothing holds outside the touched ranges, everything in the full ones; exact ones touch nothing in vain."""
    rng = random.Random(8)
    exact = filled = 0
    predicates = [condition(t) for t in NAMED.values()] * 30 + [random_predicate(rng, 2) for _ in range(2500)]
    for p in predicates:
        box, rank = random_box(rng), rng.choice("qk")
        box[rank] = (0, EXTENTS[rank] - 1)
        if any(a > b for a, b in box.values()):
            continue
        values = tried(p, box)
        others = tuple(i for i, r in enumerate(box) if r != rank)
        some, every = values.any(axis=others), values.all(axis=others)
        found = loop_bounds(p, rank)
        touched, full = np.zeros(len(some), bool), np.zeros(len(some), bool)
        for ranges, marks in ((found.touch, touched), (found.full, full)):
            for r in ranges:
                low, high = r.within(box[rank], box, EXTENTS)
                marks[low : high + 1] = True
        case = (print_expr(p), rank, box, found)
        assert not (some & ~touched).any(), case
        assert not (full & ~every).any(), case
        if found.exact:
            exact += 1
            assert np.array_equal(touched, some), case
        filled += bool(full.any())
        low, high = found.hull.within(box[rank], box, EXTENTS)
        assert not touched[:low].any() if low <= high else not touched.any(), case
        assert not touched[high + 1 :].any(), case
    assert exact > 500
    assert filled > 300


@pytest.mark.parametrize(
    ("name", "touch", "full"),
    [
        ("causal", ["<= q.last"], ["<= q.first"]),
        ("window", ["q.first - 4 <= k <= q.last"], ["q.last - 4 <= k <= q.first"]),
        ("window both ways", ["q.first - 4 <= k <= q.last + 4"], ["q.last - 4 <= k <= q.first + 4"]),
        ("sink and window", ["<= 2, q.last", "q.first - 6 <= k <= q.last"], None),
        ("prefix", ["<= q.last", "<= 5"], ["<= q.first", "<= 5"]),
        ("blocks, causal", ["<= 8 * (q.last // 8) + 7"], ["<= 8 * (q.first // 8) + 7"]),
        ("nothing", [], None),
    ],
)
def test_loop_bounds_as_text(name: str, touch: list[str], full: list[str] | None) -> None:
    def text(ranges: Any) -> list[str]:
        return [
            (f"{', '.join(map(print_expr, r.lower))} <= k " if r.lower else "")
            + f"<= {', '.join(map(print_expr, r.upper))}"
            for r in ranges
        ]

    found = loop_bounds(condition(NAMED[name]), "k")
    assert found.exact
    assert text(found.touch) == touch
    assert full is None or text(found.full) == full


def test_sink_and_window_leave_out_what_lies_between() -> None:
    found = loop_bounds(condition("(q >= k) & ((k < 4) | (q - k < 64))"), "k")
    box = {"q": (1024, 1087)}
    assert [r.within((0, 4095), box) for r in found.touch] == [(0, 3), (961, 1087)]


def test_data_are_open_without_bounds() -> None:
    box = {"q": (0, 7), "k": (0, 7), "p": (0, 0)}
    assert classify(condition("k < len[p]"), box) == "partial"
    assert classify(condition("(k < len[p]) & (k > 7)"), box) == "outside"
    assert classify(condition("(k < len[p]) | (k <= 7)"), box) == "full"
    assert classify(condition("seen[q, k] & (q > 9)"), box) == "outside"
    assert classify(condition("X[q, k, p] > 0.5"), box, bounds={"X": (1, 2)}) == "partial"


def test_bounds_of_data_decide() -> None:
    box = {"q": (0, 7), "k": (0, 7), "p": (0, 0)}
    for bound, want in {(8, 9): "full", (0, 0): "outside", (3, 9): "partial"}.items():
        assert classify(condition("k < len[p]"), box, bounds={"len": bound}) == want
    same = condition("doc[q] == doc[k]")
    assert isinstance(same, Call)
    one, other = same.args
    assert isinstance(one, Access)
    assert isinstance(other, Access)
    assert classify(same, box, bounds={one: (2, 2), other: (2, 2)}) == "full"
    assert classify(same, box, bounds={one: (2, 3), other: (4, 6)}) == "outside"
    assert classify(same, box, bounds={"doc": (2, 3)}) == "partial"
    assert classify(condition("seen[q, k]"), box, bounds={"seen": (1, 1)}) == "full"
    assert classify(condition("seen[q, k]"), box, bounds={"seen": (0, 0)}) == "outside"
    assert classify(condition("(q - k) % w == 0"), {"q": (4, 4), "k": (1, 1)}, bounds={"w": (3, 3)}) == "full"
    assert support(condition("k < len[p]"), "k", {}, EXTENTS, {"len": (3, 9)}) == (0, 8)


def test_data_that_might_wrap_stay_open() -> None:
    """In u32, ``len[p] - 9`` of 3 is huge: arithmetic on data counts only beside a rank, where it is done in i64."""
    box = {"k": (0, 7), "p": (0, 0)}
    assert classify(condition("len[p] - 9 < 0"), box, bounds={"len": (3, 4)}) == "partial"
    assert classify(condition("len[p] - k < 0"), box, bounds={"len": (9, 10)}) == "outside"


def test_loop_bounds_from_data() -> None:
    p = condition("(k < len[p]) & (q - k < w)")
    (found,) = loop_bounds(p, "k", ("len", "w")).touch
    assert [print_expr(e) for e in found.lower] == ["q.first - w + 1"]
    assert [print_expr(e) for e in found.upper] == ["len.greatest[p] - 1"]
    box = {"q": (8, 15), "p": (0, 0)}
    assert found.within((0, 28), box, EXTENTS, {"len": (3, 7), "w": (4, 4)}) == (5, 6)
    assert loop_bounds(p, "k").touch[0].lower == ()
    assert not loop_bounds(p, "k").exact


def test_empty_boxes_are_outside() -> None:
    p = condition("q >= k")
    assert classify(p, {"q": (3, 2), "k": (0, 0)}) == "outside"
    assert classify(condition("True"), {"q": (3, 2)}) == "outside"
    assert classify(p, {"q": (3, 3)}, {"k": 0, "q": 5}) == "outside"
    assert support(p, "k", {"q": (3, 2)}, {"k": 5}) == (0, -1)
    assert support(p, "k", {"q": (0, 4)}, {"k": 0}) == (0, -1)


def test_large_boxes_stay_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    million = 1 << 20
    huge = {"q": (0, million - 1), "k": (0, million - 1)}
    p = condition("(q >= k) & ((k < 4) | (q - k < 4096))")
    assert classify(p, huge) == "partial"
    assert classify(p, {"q": (million, 2 * million), "k": (4, million // 2)}) == "outside"
    assert classify(condition("(q >= k) | (q < k)"), {"q": (0, 2047), "k": (0, 2047)}) == "full"
    assert support(p, "k", {"q": (500_000, 500_063)}, {"k": million}) == (0, 500_063)
    # Beyond the budget the answer is safe.
    monkeypatch.setattr(predicate, "BUDGET", 3)
    assert classify(condition("(q >= k) | (q < k)"), huge) == "partial"


def test_values_beyond_64_bits_are_not_tried() -> None:
    big = (1 << 62) - 1
    p = Call("lt", (Call("mul", (Const(big), Rank("q"))), Call("mul", (Const(big), Rank("k")))))
    assert classify(p, {"q": (0, 7), "k": (9, 16)}) == "full"
    assert classify(p, {"q": (9, 12), "k": (0, 9)}) == "outside"
    assert classify(p, {"q": (0, 7), "k": (7, 12)}) == "partial"


def test_support_needs_to_know_where_the_rank_runs() -> None:
    with pytest.raises(UsageError, match="between which coordinates `k` runs"):
        support(condition("q >= k"), "k", {"q": (0, 3)})


def test_sums_of_many_maxima_do_not_explode() -> None:
    distance: Expr = Const(0)
    for i in range(40):
        distance = Call("add", (distance, Call("abs", (Call("sub", (Rank("q"), Const(i))),))))
    p = Call("le", (Call("floordiv", (distance, Const(3))), Rank("k")))
    assert classify(p, {"q": (0, 7), "k": (0, 7)}) == "partial"
    assert not loop_bounds(p, "k").exact
