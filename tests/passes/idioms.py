"""Random cascades made of what people write: softmax, log-sum-exp, variance, norms, masks, products, mixed at will."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np

import castile
from castile.ir.cascade import Cascade
from castile.ir.errors import CastileError

PARAMS = (("X", "ab"), ("Y", "ab"), ("Z", "bc"), ("u", "a"), ("v", "b"), ("s", ""))
MAPS = (
    "exp({})", "tanh({})", "abs({})", "-{}", "sigmoid({})", "{} * 0.5", "{} + 1.0", "sqrt(abs({}))", "maximum({}, 0.2)",
    "{} ** 2", "1.0 / (1.0 + abs({}))", "log(1.0 + abs({}))",
)  # fmt: skip
PAIRS = ("{} * {}", "{} + {}", "{} - {}", "{} / (1.0 + abs({}))", "maximum({}, {})")


@dataclass(frozen=True)
class Tensor:
    name: str
    ranks: str
    truth: bool = False

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.ranks)}]" if self.ranks else self.name


class Writer:
    """A cascade while it is written, line by line."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        given = self.draw.sample(PARAMS, self.draw.randint(2, 5))
        self.params = [Tensor(*p) for p in given]
        if self.draw.random() < 0.4:
            self.params.append(Tensor("K", "ab", True))
        self.made: list[Tensor] = []
        self.lines: list[str] = []

    def pick(self, truth: bool = False) -> Tensor:
        """A tensor; later ones rather than earlier ones."""
        found = [t for t in (*self.params, *self.made) if t.truth == truth]
        return found[max(self.draw.randrange(len(found)), self.draw.randrange(len(found)))]

    def put(self, base: str, ranks: str, value: str, truth: bool = False) -> Tensor:
        """A line that computes a value."""
        made = Tensor(f"{base}{len(self.lines) + 1}", "".join(sorted(set(ranks))), truth)
        self.lines.append(f"    {made} = {value}")
        self.made.append(made)
        return made

    def condition(self) -> tuple[str, str]:
        """A condition on a coordinate or on data, and the ranks that it varies over."""
        if any(t.truth for t in (*self.params, *self.made)) and self.draw.random() < 0.25:
            t = self.pick(True)
            return str(t), t.ranks
        x, y = self.pick(), self.pick()
        match self.draw.randrange(3):
            case 0 if x.ranks:
                rank = self.draw.choice(x.ranks)
                return f"({rank} {self.draw.choice(['<', '>=', '!='])} {self.draw.randint(0, 3)})", rank
            case 1:
                return f"({x} {self.draw.choice(['<', '>='])} {y})", x.ranks + y.ranks
        return f"({x} {self.draw.choice(['<', '>', '>=', '<='])} {self.draw.choice(['0.1', '-0.5', '1.5'])})", x.ranks

    def line(self) -> None:
        """One more idiom."""
        x, y = self.pick(), self.pick()
        kind = self.draw.choice(("map", "pair", "choice", "truth", *("fold",) * 5))
        if kind == "map":
            self.put("e", x.ranks, self.draw.choice(MAPS).format(x))
        elif kind == "pair":
            self.put("p", x.ranks + y.ranks, self.draw.choice(PAIRS).format(x, y))
        elif kind == "choice":
            asked, over = self.condition()
            value = self.draw.choice([f"where({asked}, {x}, {y})", f"where({asked}, {x}, 0.0)"])
            self.put("w", over + x.ranks + y.ranks, value)
        elif kind == "truth":
            self.put("q", *reversed(self.condition()), True)
        elif x.ranks:
            self.fold(x, self.draw.choice(x.ranks))

    def fold(self, x: Tensor, k: str) -> None:
        """Something that is reduced over a rank."""
        rest = x.ranks.replace(k, "")
        match self.draw.randrange(6):
            case 0:
                self.put("t", rest, f"sum[{k}]({x})" if self.draw.random() < 0.7 else f"max[{k}]({x})")
            case 1 | 2:
                self.softmax(x, k, rest)
            case 3:
                mean = self.put("mu", rest, f"sum[{k}]({x}) / extent({k})")
                d = self.put("d", x.ranks, f"{x} - {mean}")
                variance = self.put("va", rest, f"sum[{k}]({d} ** 2) / extent({k})")
                self.put("n", x.ranks, f"{d} * rsqrt({variance} + 0.01)")
            case 4:
                y = self.pick()
                self.put("g", (x.ranks + y.ranks).replace(k, ""), f"sum[{k}]({x} * {y})")
            case _:
                self.put("nr", x.ranks, f"{x} * rsqrt(sum[{k}]({x} ** 2) + 0.1)")

    def softmax(self, x: Tensor, k: str, rest: str) -> None:
        asked, over = self.condition()
        masked = self.draw.random() < 0.4 and set(over) <= set(x.ranks)
        z = self.put("x", x.ranks, f"where({asked}, {x}, -inf)") if masked else x
        m = self.put("M", rest, f"max[{k}]({z})")
        e = self.put("E", x.ranks, f"exp({z} - {m})")
        total = self.put("L", rest, f"sum[{k}]({e})")
        self.put("P", x.ranks, f"{e} / {total}")
        if masked:
            # Of a row of nothing these are infinite.
            self.made = [t for t in self.made if t not in (z, m)]
        else:
            self.put("lse", rest, f"{m} + log({total})")

    def cascade(self) -> Cascade | None:
        for _ in range(self.draw.randint(3, 9)):
            self.line()
        if self.draw.random() < 0.3 and not any("-inf" in line for line in self.lines):
            self.put("o", *reversed(self.condition()), True)
        if not self.made:
            return None
        others = self.draw.sample(self.made, min(len(self.made), self.draw.randint(0, 2)))
        outputs = [t.name for t in self.made if t in (self.made[-1], *others)]
        params = [f"{t.name}: {'bool' if t.truth else 'f32'}{str(t)[len(t.name) :]}" for t in self.params]
        results = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        try:
            return castile.parse(f"def f({', '.join(params)}) -> {results}:\n" + "\n".join(self.lines) + "\n")
        except CastileError:
            return None  # an output that only names another, a rank that nothing shows


def drawn(c: Cascade, seed: int) -> dict[str, Any]:
    """Inputs of a few elements."""
    rng = np.random.default_rng(seed)
    extents = {"a": rng.integers(1, 5), "b": rng.integers(1, 6), "c": rng.integers(1, 4)}
    shapes = {p.name: [extents[i.name] for i in p.indices] for p in c.params}  # type: ignore[union-attr]
    floats = {n: np.round(2 * rng.standard_normal(shape), 3) for n, shape in shapes.items()}
    return {n: x > -0.5 if n == "K" else x for n, x in floats.items()}
