"""What every command shares: where output goes, how errors end, and the options that several commands take.

With ``--json`` stdout is one JSON document; whatever else a command has to say goes to stderr.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..ir.errors import CastileError, Source, UsageError, attach, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from ..ir.cascade import Cascade
    from ..ir.mapping import Mapping

OK, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130

# How a file says that it takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE|NAME",
        help="A .cascade file, or attention, softmax or gemm, or - for stdin.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", metavar="RANK=N", help="Extents, such as --shape q=2048 k=2048; repeatable.", show_default=False
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="T",
        help="cpu, cuda, cuda:90, hip:gfx942, interpret, …",
        show_default=False,
    ),
]
MappingOption = Annotated[
    str | None,
    typer.Option("--mapping", metavar="JSON", help="A mapping as JSON, or @FILE that holds one.", show_default=False),
]
More = Annotated[list[str] | None, typer.Argument(metavar="[RANK=N ...]", hidden=True, show_default=False)]


def out() -> Console:
    """Stdout: colour on a terminal, plain text in a pipe. Lines are not wrapped: the terminal does that."""
    return _console(stderr=False)


def err() -> Console:
    """Stderr."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)


def say(text: str = "", style: str = "") -> None:
    """A line on stdout."""
    out().print(text, style=style or None)


def note(text: str) -> None:
    """A remark beside the result, on stderr."""
    err().print(text, style="dim")


def emit(document: Any) -> None:
    """One JSON document on stdout. NaN and infinities, which JSON lacks, become strings."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value


def guarded(command: Callable[[], Any]) -> int:
    """Run a command to its exit code: 0, 1 where what was checked failed, 2 on the user's mistake, 130 on Ctrl-C."""
    try:
        _open_streams()
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else OK
    except CastileError as error:
        complain(str(error), located=error.loc is not None)
        return MISTAKE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        return _closed()
    except OSError as error:
        if error.errno not in _FULL:
            raise
        complain(f"cannot write {error.filename or 'the output'}: {error.strerror}")
        return _closed()
    except RecursionError:
        complain("the cascade is nested too deep for this command")
        return MISTAKE
    except MemoryError:
        complain("not enough memory for these extents")
        return MISTAKE
    except Exception as error:
        # Typer's own errors (an unknown option, a missing argument); by shape, as its versions differ in their class.
        if not hasattr(error, "format_message"):
            raise
        complain(error.format_message().replace("\n", " ") or "a command is missing")
        context = getattr(error, "ctx", None)
        if context is not None:
            err().print(f"hint: {context.command_path} --help", style="dim")
        return MISTAKE


def _open_streams() -> None:
    """Put something in place of standard streams that were closed before the command began: nothing to read, nowhere to
    write."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _closed() -> int:
    """Nobody reads stdout any more, or it takes no more: say nothing when Python flushes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def complain(text: str, located: bool = False) -> None:
    """An error: one line, below it what helps."""
    first, _, rest = text.partition("\n")
    console = err()
    console.print(first if located else f"error: {first}", style="bold red")
    if rest:
        console.print(rest)


def warned(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """How a warning is shown: one of castile's own as its errors are, any other with its place, as Python does."""
    console = err()
    own = str(message).removeprefix("castile: ")
    if own == str(message):
        console.print(warnings.formatwarning(message, category, filename, lineno).rstrip())
        return
    first, *rest = own.split("\n")
    console.print(f"warning: {first}", style="yellow")
    for line in rest:
        console.print(line)


def fail(message: str, hint: str = "") -> NoReturn:
    """The user's mistake."""
    raise UsageError(message, hint=hint)


def read_cascade(name: str) -> Cascade:
    """The cascade of a file, one that is known by its name, or that of stdin for ``-``."""
    from ..autotune.presets import PRESETS, preset
    from ..ir.parse import load, parse
    from ..ir.source import MAX_CHARS

    if name in PRESETS and not os.path.isfile(name):
        return preset(name)[0]
    if name != "-":
        try:
            os.stat(name)
        except FileNotFoundError:
            known = f"give the path of a .cascade file, or one of {', '.join(PRESETS)}"
            fail(f"cannot read {name}: No such file or directory", did_you_mean(name, PRESETS) or known)
        except OSError:
            pass  # `load` tells what it is
        return load(name)
    raw = sys.stdin.buffer.read(4 * MAX_CHARS + 1)
    try:
        return parse(raw.decode("utf-8"), "<stdin>")
    except UnicodeDecodeError as error:
        fail(f"stdin is not UTF-8 text (byte {error.start})")


def read_mapping(given: str | None) -> Mapping | None:
    """A mapping from the command line: its JSON, or ``@file``."""
    if given is None:
        return None
    from ..ir.mapping import Mapping

    if not given.startswith("@"):
        return Mapping.from_json(given)
    try:
        return Mapping.from_json(Path(given[1:]).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the mapping {given[1:]}: {getattr(error, 'strerror', None) or error}")


@contextmanager
def of_file(name: str) -> Iterator[None]:
    """Errors of a run point into the file that the cascade came from."""
    try:
        yield
    except CastileError as error:
        if error.loc is not None and error.source is None and name != "-":
            with suppress(OSError, ValueError):
                attach(error, Source(Path(name).read_text(encoding="utf-8-sig"), name))
        raise


def sorted_out(file: str, more: Iterable[str] | None) -> tuple[str, list[str]]:
    """The file and the extents, in whichever order they came: ``--shape q=8 k=8 FILE`` leaves ``k=8`` in its place."""
    words = [file, *(more or ())]
    files = [word for word in words if "=" not in word]
    return (files[0], [word for word in words if "=" in word]) if len(files) == 1 else (file, words[1:])


def extents(words: Iterable[str]) -> dict[str, int]:
    """``q=2048 k=2048`` or ``q=2048,k=2048`` as a mapping."""
    found: dict[str, int] = {}
    for name, value in pairs(words, "--shape", "q=2048"):
        try:
            size = int(value)
        except ValueError:
            fail(f"--shape {name}={value[:40]}: an extent is an integer", "write --shape q=2048 k=2048")
        if found.setdefault(name, size) != size:
            fail(f"--shape gives rank `{name}` two extents, {found[name]} and {size}")
    return found


def pairs(words: Iterable[str], option: str, example: str) -> list[tuple[str, str]]:
    """Words of the form ``name=value``, several to a word where commas join them."""
    found = []
    for word in (part for w in words for part in w.split(",") if part):
        name, equals, value = word.partition("=")
        if not equals or not name.strip().isidentifier() or not value.strip():
            fail(f"{option}: `{word[:60]}` is not of the form name=value", f"write {option} {example}")
        found.append((name.strip(), value.strip()))
    return found


def write_file(path: Path, data: str | bytes) -> None:
    """Write a result, whole or not at all; a user's mistake where that cannot be."""
    raw = data.encode() if isinstance(data, str) else data
    made = path.parent / f".{path.name[:100]}.{os.getpid()}"
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_bytes(raw)  # a pipe or a device takes bytes, and has no other in its place
            return
        try:
            made.write_bytes(raw)
            if path.exists():
                made.chmod(path.stat().st_mode & 0o777)
            os.replace(made, path)
        finally:
            with suppress(OSError):
                made.unlink()
    except (OSError, ValueError) as error:
        fail(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
