"""What the installed SDK offers: every public method, its options, and every command of its CLI, found by looking.

A target is a method (``TrainingClient.save_state``), a constructor (``RestClient()``), a function (``auth.…``), a type
whose fields are options (``SamplingParams``) or a command (``tinker run list``). Its options are the parameters that
have a default, each choice of a parameter that names its choices (``kind=inflight``), fields, and flags.
"""

from __future__ import annotations

import inspect
import sys
import types as python_types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import tinker
from tinker.cli.__main__ import main_cli

CLASSES = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
    tinker.AdminClient,
    tinker.APIFuture,
    tinker.LossHandle,
    tinker.SampleResponse,
    tinker.SampledSequence,
    tinker.BackcompatTrainingClientFuture,
    tinker.BackcompatSamplingClientFuture,
)
CONSTRUCTED = (tinker.ServiceClient, tinker.RestClient, tinker.AdminClient)
"""Users make these themselves; the others come from them."""

FIELDS = (
    tinker.SamplingParams,
    tinker.AdamParams,
    tinker.DimuonParams,
    tinker.DimuonOptimizerConfig,
    tinker.types.SessionSearchRequest,
)
"""Types whose every field is a thing to ask the server for."""

UNIONS = (
    ("ModelInputChunk", "SamplingClient.sample", "prompt"),
    ("ModelInputChunk", "TrainingClient.forward_backward", "model_input"),
    ("OptimParams", "TrainingClient.optim_step", "optim_params"),
    ("OptimizerConfig", "ServiceClient.create_lora_training_client", "optimizer"),
    ("SearchOwner", "SessionSearchRequest", "owner"),
    ("SessionStatusQuery", "SessionSearchRequest", "statuses"),
)
"""Unions whose every member is a choice of a target's parameter or field."""

FORWARDERS = {
    "BackcompatTrainingClientFuture": "TrainingClient",
    "BackcompatSamplingClientFuture": "SamplingClient",
}
"""Futures of a client that also have its methods."""

_CONSTANT = ("type",)
"""Fields with one value."""


def targets() -> dict[str, set[str]]:
    """Every target, in the order of this file's tables, with its options."""
    found: dict[str, set[str]] = {}
    for owner in CLASSES:
        if owner in CONSTRUCTED:
            found[f"{owner.__name__}()"] = set(_options(owner.__init__))
        for name, method in _public(owner):
            found[f"{owner.__name__}.{name}"] = set() if owner.__name__ in FORWARDERS else set(_options(method))
    for name in tinker.auth.__all__:
        found[f"auth.{name}"] = set(_options(getattr(tinker.auth, name)))
    for model in FIELDS:
        found[model.__name__] = {name for name in model.model_fields if name not in _CONSTANT}
    for target in list(found):
        if target.endswith("_async") and found[target] == found.get(target.removesuffix("_async")):
            found[target] = set()  # the same method, awaited
    for union, target, parameter in UNIONS:
        found[target].discard(parameter)
        found[target] |= {f"{parameter}={member.__name__}" for member in _members(getattr(tinker.types, union))}
    found |= _commands(main_cli, "tinker")
    return found


def _public(owner: type) -> Iterator[tuple[str, Any]]:
    for name in sorted(dir(owner)):
        if not name.startswith("_"):
            member = inspect.getattr_static(owner, name)
            if hasattr(member, "__get__") and not isinstance(member, type):
                yield name, member.__func__ if isinstance(member, staticmethod) else member


def _options(function: Any) -> Iterator[str]:
    if not callable(function):  # a property
        return
    for parameter in list(inspect.signature(function).parameters.values()):
        if parameter.name.startswith("_") or parameter.name == "self" or parameter.kind is parameter.VAR_KEYWORD:
            continue
        choices = _choices(function, parameter)
        if choices:
            yield from (f"{parameter.name}={choice}" for choice in choices)
        elif parameter.default is not parameter.empty:
            yield parameter.name


def _choices(function: Callable[..., Any], parameter: inspect.Parameter) -> list[str]:
    """Of a Literal, also if it may be None; a single one is no choice."""
    origin = inspect.unwrap(function)
    scope = vars(sys.modules[origin.__module__])
    try:
        hint = get_type_hints(_only(parameter), scope)["it"]
    except NameError:  # names for type checkers alone
        return []
    values = [value for part in _members(hint) if get_origin(part) is Literal for value in get_args(part)]
    return [str(value) for value in values] if len(values) > 1 else []


def _only(parameter: inspect.Parameter) -> Callable[..., Any]:
    """A function with this annotation alone, so that another one that can't be resolved is no obstacle."""

    def holder() -> None: ...

    holder.__annotations__ = {"it": parameter.annotation}
    return holder


def _members(union: Any) -> list[Any]:
    if get_origin(union) is Annotated:
        return _members(get_args(union)[0])
    if get_origin(union) in (Union, python_types.UnionType):
        return [member for part in get_args(union) for member in _members(part)]
    if isinstance(union, type) and union.__name__.endswith("Base"):  # an open union: what may come later, and what is
        return list(union.__subclasses__())
    return [union]


def _commands(command: click.Command, name: str) -> dict[str, set[str]]:
    """Depth first; a group is itself a target when it has options."""
    flags = {
        max(parameter.opts, key=len)
        for parameter in command.params
        if isinstance(parameter, click.Option) and not {"--help", "--version"} & set(parameter.opts)
    }
    arguments = {
        f"[{parameter.human_readable_name.lower()}]"
        for parameter in command.params
        if isinstance(parameter, click.Argument) and not parameter.required
    }
    if not isinstance(command, click.Group):
        return {name: flags | arguments}
    found = {name: flags} if flags else {}
    context = click.Context(command)
    for child in command.list_commands(context):
        found |= _commands(command.get_command(context, child), f"{name} {child}")
    return found
