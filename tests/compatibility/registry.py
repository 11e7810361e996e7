"""One small call for each thing that the SDK offers, found under its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tests.compatibility.introspect import FORWARDERS
from tests.compatibility.lab import Bound, Lab

MODULES = ("service_calls", "training_calls", "sampling_calls", "rest_calls", "cli_calls")

Run = Callable[[Lab, Any], None]


@dataclass(frozen=True)
class Call:
    """``run(lab, do)`` calls the target with ``do`` and asserts what came back."""

    target: str
    options: tuple[str, ...]
    """What it shows to work, each a row of its own; empty: the target with nothing but what it must be given."""
    run: Run
    refused: str | None
    """Words of the refusal, where tx or the SDK says no on purpose. Any other error is a failure."""


CALLS: list[Call] = []


def call(target: str, *options: str, refused: str | None = None) -> Callable[[Run], Run]:
    """Register a call of ``target``."""

    def register(run: Run) -> Run:
        CALLS.append(Call(target, options, run, refused))
        return run

    return register


def load() -> None:
    """Import every module of calls, once."""
    for module in MODULES:
        importlib.import_module(f"tests.compatibility.{module}")


def calls_for(targets: dict[str, set[str]]) -> Iterator[Call]:
    """The registered ones, and what follows from them: async variants, and clients' methods on their futures."""
    base = {entry.target: entry for entry in CALLS if not entry.options}
    for target in targets:
        owner, _, name = target.partition(".")
        forwarded = f"{FORWARDERS[owner]}.{name}" if owner in FORWARDERS else target
        for known in (target, forwarded, forwarded.removesuffix("_async"), f"APIFuture.{name.removesuffix('_async')}"):
            if known in base:
                yield replace(base[known], target=target)
                break
    yield from (entry for entry in CALLS if entry.options or entry.target not in targets)


def gaps(targets: dict[str, set[str]]) -> list[str]:
    """What the SDK offers and no call covers, and calls of what it doesn't offer."""
    covered: dict[str, set[str]] = {}
    for entry in calls_for(targets):
        covered.setdefault(entry.target, set()).update(entry.options or {""})
    wanted = {target: options if _needs_no_base(target) else options | {""} for target, options in targets.items()}
    missing = [
        f"{target} {option}".strip() + " has no call"
        for target, options in wanted.items()
        for option in sorted(options - covered.get(target, set()))
    ]
    return missing + [f"{target} is no longer in the SDK" for target in covered if target not in targets]


def _needs_no_base(target: str) -> bool:
    """Types are only options, and the CLI's root does nothing alone."""
    return target == "tinker" or not ("." in target or "(" in target or target.startswith("tinker "))


def bind(lab: Lab, target: str) -> Any:
    """What a call's ``do`` is: a method, a constructor, a function, or a command."""
    import tinker

    if target == "tinker" or target.startswith("tinker "):
        words = target.split()[1:]
        return lambda *more, **options: lab.cli(*words, *more, **options)
    if target.endswith("()"):
        made = getattr(tinker, target.removesuffix("()"))
        return lambda *args, **options: made(*args, **({"base_url": lab.url} | options))
    owner, _, name = target.partition(".")
    if owner == "auth":
        return Bound(name, lambda: tinker.auth)
    return Bound(name, lambda: lab.subject(owner)) if name else None
