"""castile compiles tensor programs, written as cascades of Einsums, into tuned kernels.

import castile

c = castile.parse('''
def softmax(X: f32[m, n]) -> Y:
    M[m] = max[n](X[m, n])
    E[m, n] = exp(X[m, n] - M[m])
    Y[m, n] = E[m, n] / sum[n](E[m, n])
''')
print(castile.explain(c))                 # passes over each rank, and why
k = castile.compile(c)                    # a kernel for this machine
y = k(X=x)                                # NumPy arrays or torch tensors
y = castile.evaluate(c, {"X": x})["Y"]    # the float64 oracle: what the cascade means
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from castile.codegen.kernel import Kernel as Kernel
    from castile.driver import compile as compile
    from castile.driver import emit as emit
    from castile.driver import explain as explain
    from castile.driver import tune as tune
    from castile.frontend.explain import explain_model as explain_model
    from castile.ir.cascade import Cascade as Cascade
    from castile.ir.cascade import Monoid as Monoid
    from castile.ir.errors import CastileError as CastileError
    from castile.ir.evaluate import evaluate as evaluate
    from castile.ir.mapping import Mapping as Mapping
    from castile.ir.parse import cascade as cascade
    from castile.ir.parse import load as load
    from castile.ir.parse import monoid as monoid
    from castile.ir.parse import parse as parse
    from castile.ir.tiles import in_tiles as in_tiles
    from castile.passes.grad import grad as grad
    from castile.passes.partial import merge as merge
    from castile.passes.partial import partial as partial

__version__ = "0.1.0"

# Public name -> where it lives. Imported on first use, so `import castile` stays quick and loads no dependency.
# The names are absolute because test and type tools meet this file under the name of the checkout's folder.
_PUBLIC = {
    "Cascade": "castile.ir.cascade:Cascade",
    "CastileError": "castile.ir.errors:CastileError",
    "Kernel": "castile.codegen.kernel:Kernel",
    "Mapping": "castile.ir.mapping:Mapping",
    "Monoid": "castile.ir.cascade:Monoid",
    "cascade": "castile.ir.parse:cascade",
    "compile": "castile.driver:compile",
    "emit": "castile.driver:emit",
    "evaluate": "castile.ir.evaluate:evaluate",
    "explain": "castile.driver:explain",
    "explain_model": "castile.frontend.explain:explain_model",
    "in_tiles": "castile.ir.tiles:in_tiles",
    "load": "castile.ir.parse:load",
    "grad": "castile.passes.grad:grad",
    "merge": "castile.passes.partial:merge",
    "monoid": "castile.ir.parse:monoid",
    "parse": "castile.ir.parse:parse",
    "partial": "castile.passes.partial:partial",
    "tune": "castile.driver:tune",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    where = _PUBLIC.get(name)
    if where is None:
        raise AttributeError(f"module 'castile' has no attribute {name!r}")
    module, attribute = where.split(":")
    try:
        value: object = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if (error.name or "castile").startswith("castile"):
            raise
        raise ImportError(
            f"castile.{name} needs `{error.name}`, which is not installed: pip install {error.name}", name=error.name
        ) from error
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
