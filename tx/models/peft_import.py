"""A PEFT folder's adapter as tx's: any set of modules, each with its own rank and scale. Pure numpy.

tx has one rank and one scale for all dense sites of an adapter, and another of each for its experts
(``tx.types.LoraConfig``). Smaller ranks are filled up with zeros, which neither count nor train. A scale that differs
from the adapter's is multiplied into B: exact when the ratio is a power of two, one rounding otherwise.

Experts come in two layouts: each expert's three modules by name, as tx and transformers 4 write them, and transformers
5's stacks, ``experts.base_layer`` and ``experts``, in which gate and up may share their A (tx then holds it twice).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from tx.errors import InvalidInput, Unsupported
from tx.layers.lora import LoraSite, expert_rank
from tx.models.peft import CONFIG_FILE, WEIGHTS_FILE
from tx.models.peft_config import AdapterConfig, Scale, check_config
from tx.types import LoraConfig, ModelState

_DTYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MODULE = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9]\d*)\.(?:self_attn\.(?P<attn>[qkvo]_proj)"
    r"|mlp\.(?:experts\.(?P<expert>0|[1-9]\d*)\.)?(?P<mlp>(?:gate|up|down)_proj)"
    r"|mlp\.(?P<stack>experts(?:\.base_layer)?))|(?P<head>lm_head)"
)
_FROZEN = re.compile(r"base_model\.model\.(?:lm_head|model\.embed_tokens)(?:\.base_layer)?\.weight")
"""PEFT writes the embeddings into the folder of every adapter that has lm_head among its modules, trained or not."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class _Pair:
    """One module as it stands in the folder. a: [rank, in], b: [out, rank], float32."""

    module: str
    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class _Site:
    """One site in tx's orientation. a: [in, rank], b: [rank, out], of experts with that axis in front."""

    a: np.ndarray
    b: np.ndarray
    scale: Scale

    @property
    def rank(self) -> int:
        return int(self.a.shape[-1])

    @property
    def is_expert(self) -> bool:
        return self.a.ndim == 3

    def at(self, scale: float) -> _Site:
        """The same function with this factor on ``x @ a @ b``."""
        ratio = self.scale.value / scale
        if abs(ratio - 1) < 1e-12:
            return self
        return replace(self, b=(self.b.astype(np.float64) * ratio).astype(np.float32), scale=Scale(scale, 1.0))

    def widened(self, rank: int) -> _Site:
        """Zeros up to ``rank``."""
        lead, extra = [(0, 0)] * (self.a.ndim - 2), (0, rank - self.rank)
        return replace(self, a=np.pad(self.a, [*lead, (0, 0), extra]), b=np.pad(self.b, [*lead, extra, (0, 0)]))

    def narrowed(self, rank: int) -> _Site:
        """Without the columns past ``rank``, which are zeros: what an export of tx's experts adds."""
        b, wide = self.b[..., :rank, :] / np.float32(self.rank / rank), self.scale
        return _Site(self.a[..., :rank], b, Scale(wide.alpha, wide.divisor * rank / self.rank))


def import_files(
    files: Mapping[str, bytes],
    num_experts_per_tok: int = 0,
    sites: Sequence[LoraSite] = (),
    of_experts: int | None = None,
) -> ModelState:
    """The adapter in a folder's files, with no moments, step 0 and seed 0, neither of which is in the format.

    Args:
        num_experts_per_tok: of the base model: the rank that tx gives experts by itself depends on it.
        sites: of the base model. Every module must be one of them and fit it; without them, only that the folder is
            right in itself is checked, and the stacked layout of experts is refused.
        of_experts: the rank of experts in an export of tx, if it is not what tx gives them by itself.

    Raises:
        InvalidInput: naming the module and its shapes, or the field; Unsupported for what tx doesn't have.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in files:
            raise InvalidInput("path", f"an adapter folder without {name}", f"{CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = check_config(json.loads(files[CONFIG_FILE]))
        tensors = _tensors(files[WEIGHTS_FILE])
    except (ValueError, SafetensorError) as error:
        raise InvalidInput("path", f"an adapter folder that can't be read ({error})", "a PEFT LoRA adapter") from error
    known = {site.name: site for site in sites}
    found = _sites(_pairs(tensors, known), config, known)
    if not found:
        raise InvalidInput(WEIGHTS_FILE, "no LoRA tensors", "at least one module's lora_A and lora_B")
    own = of_experts or expert_rank(max(site.rank for site in found.values()), num_experts_per_tok)
    return _unified(found, own, of_experts, sites)


# ---- the folder's tensors -------------------------------------------------------------------------------------------


def _tensors(content: bytes) -> dict[str, np.ndarray]:
    """By name, sorted: the same file gets the same error."""
    tensors = {}
    for name, described in sorted(deserialize(content)):
        dtype = _DTYPES.get(described["dtype"])
        if dtype is None:
            raise Unsupported(f"{WEIGHTS_FILE}.{name}", described["dtype"], ", ".join(_DTYPES))
        array = np.frombuffer(described["data"], dtype).reshape(described["shape"])
        tensors[name] = array.astype(np.float32, copy=False)
    return tensors


def _pairs(tensors: Mapping[str, np.ndarray], known: Mapping[str, LoraSite]) -> list[_Pair]:
    """lora_A and lora_B of each module, of one rank and finite."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is not None and _MODULE.fullmatch(match["module"]):
            modules.setdefault(match["module"], {})[match["side"]] = tensor
        elif not (known and _FROZEN.fullmatch(name) and _is_head(tensor, known["unembed"])):
            accepted = "lora_A and lora_B of attention, MLP, experts and lm_head"
            raise Unsupported(f"{WEIGHTS_FILE}.{name}", f"a tensor of shape {list(tensor.shape)}", accepted)
    pairs = []
    for module, sides in modules.items():
        missing = {"A", "B"} - sides.keys()
        if missing:
            raise InvalidInput(f"{WEIGHTS_FILE}.{module}", f"no lora_{missing.pop()}", "lora_A and lora_B")
        a, b = sides["A"], sides["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise InvalidInput(f"{WEIGHTS_FILE}.{module}", _shapes(a, b), "lora_A [rank, in] and lora_B [out, rank]")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise InvalidInput(f"{WEIGHTS_FILE}.{module}", "a number that is not finite", "finite numbers")
        pairs.append(_Pair(module, a, b))
    return pairs


def _is_head(tensor: np.ndarray, head: LoraSite) -> bool:
    return tensor.shape == (head.out_features, head.in_features)


def _shapes(a: np.ndarray, b: np.ndarray) -> str:
    return f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"


# ---- modules to sites -----------------------------------------------------------------------------------------------


def _sites(pairs: Iterable[_Pair], config: AdapterConfig, known: Mapping[str, LoraSite]) -> dict[str, _Site]:
    """Every site by its name; the experts of a site become one."""
    sites: dict[str, _Site] = {}
    experts: dict[str, dict[int, _Site]] = {}
    for pair in pairs:
        match = _MODULE.fullmatch(pair.module)
        assert match is not None  # _pairs has matched it
        if match["stack"]:
            sites |= _unstacked(pair, match["layer"], config, known)
            continue
        name = "unembed" if match["head"] else f"layers.{match['layer']}.{match['attn'] or match['mlp']}"
        if match["expert"]:
            name = f"layers.{match['layer']}.experts.{match['mlp']}"
        _check(pair, known, name)
        _check_rank(pair.module, pair.a.shape[0], config)
        site = _Site(np.ascontiguousarray(pair.a.T), np.ascontiguousarray(pair.b.T), config.scale_of(pair.module))
        if match["expert"]:
            experts.setdefault(name, {})[int(match["expert"])] = site
        else:
            sites[name] = site
    for name, parts in experts.items():
        count = (known[name].num_experts or 0) if known else len(parts)
        if sorted(parts) != list(range(count)):
            raise InvalidInput(f"{WEIGHTS_FILE}.{name}", f"experts {sorted(parts)}", f"every expert, 0 to {count - 1}")
        sites[name] = _joined([parts[expert] for expert in range(count)])
    return sites


def _check(pair: _Pair, known: Mapping[str, LoraSite], name: str) -> None:
    """The module is one of the base model's and fits it."""
    if not known:
        return
    if name not in known:
        raise InvalidInput(f"{WEIGHTS_FILE}.{pair.module}", "a module", "modules that the base model has")
    inner, outer = known[name].in_features, known[name].out_features
    if (pair.a.shape[1], pair.b.shape[0]) != (inner, outer):
        accepted = f"lora_A [rank, {inner}] and lora_B [{outer}, rank] on this base model"
        raise InvalidInput(f"{WEIGHTS_FILE}.{pair.module}", _shapes(pair.a, pair.b), accepted)


def _check_rank(module: str, rank: int, config: AdapterConfig) -> None:
    if rank != config.rank_of(module):
        accepted = f"rank {config.rank_of(module)} as {CONFIG_FILE} says"
        raise InvalidInput(f"{WEIGHTS_FILE}.{module}.lora_A", f"rank {rank}", accepted)


def _joined(parts: Sequence[_Site]) -> _Site:
    """The experts of a site as one: of the largest rank, at the first one's scale."""
    rank, scale = max(part.rank for part in parts), parts[0].scale
    same = [part.at(scale.value).widened(rank) for part in parts]
    return _Site(np.stack([part.a for part in same]), np.stack([part.b for part in same]), scale)


def _unstacked(pair: _Pair, layer: str, config: AdapterConfig, known: Mapping[str, LoraSite]) -> dict[str, _Site]:
    """A stack of all experts. a: [expert * rank, in], b: [out, rank * expert]; which it is, its shapes say."""
    prefix = f"layers.{layer}.experts."
    gate, down = known.get(prefix + "gate_proj"), known.get(prefix + "down_proj")
    if gate is None or down is None or gate.num_experts is None:
        raise InvalidInput(f"{WEIGHTS_FILE}.{pair.module}", "experts", "modules that the base model has")
    num_experts, given = gate.num_experts, (pair.a.shape[1], pair.b.shape[0])
    fused = (gate.in_features, 2 * gate.out_features)
    if given not in (fused, (down.in_features, down.out_features)) or pair.a.shape[0] % num_experts:
        of_both = (
            f"lora_A [{num_experts} * rank, {fused[0]}] and lora_B [{fused[1]}, {num_experts} * rank] of gate and up"
        )
        accepted = f"{of_both}, or [.., {down.in_features}] and [{down.out_features}, ..] of down"
        raise InvalidInput(f"{WEIGHTS_FILE}.{pair.module}", _shapes(pair.a, pair.b), accepted)
    rank = pair.a.shape[0] // num_experts
    module = f"model.layers.{layer}.mlp.experts." + ("gate_up_proj" if given == fused else "down_proj")
    _check_rank(module, rank, config)
    a = np.ascontiguousarray(pair.a.reshape(num_experts, rank, -1).transpose(0, 2, 1))
    b = np.ascontiguousarray(pair.b.reshape(-1, rank, num_experts).transpose(2, 1, 0))
    scale = config.scale_of(module)
    if given != fused:
        return {prefix + "down_proj": _Site(a, b, scale)}
    of_gate, of_up = b[..., : gate.out_features], b[..., gate.out_features :]
    half = rank // 2
    if rank % 2 == 0 and b.any() and not of_gate[:, half:].any() and not of_up[:, :half].any():
        # Two modules side by side, as PEFT stacks what was trained apart: each takes its own half back.
        return {
            prefix + "gate_proj": _Site(a[..., :half], of_gate[:, :half], scale),
            prefix + "up_proj": _Site(a[..., half:], of_up[:, half:], scale),
        }
    return {prefix + "gate_proj": _Site(a, of_gate, scale), prefix + "up_proj": _Site(a, of_up, scale)}


# ---- sites to an adapter --------------------------------------------------------------------------------------------


def _unified(found: Mapping[str, _Site], own: int, asked: int | None, sites: Sequence[LoraSite]) -> ModelState:
    """All sites at one rank and one scale, experts at their own.

    Experts that are zero past ``own`` columns are what an export makes of tx's own.
    """
    rank = max(site.rank for site in found.values())
    wide = [site for site in found.values() if site.is_expert]
    if all(site.rank == rank and not (site.a[..., own:].any() or site.b[:, own:].any()) for site in wide):
        found = {name: site.narrowed(own) if site.is_expert else site for name, site in found.items()}
    of_experts = max((site.rank for site in found.values() if site.is_expert), default=own)
    alpha = _alpha(found.values(), rank, of_experts)
    weights: dict[str, np.ndarray] = {}
    for name, site in found.items():
        width = of_experts if site.is_expert else rank
        full = site.at(alpha / width).widened(width)
        weights[name + ".lora_A"] = np.ascontiguousarray(full.a)
        weights[name + ".lora_B"] = np.ascontiguousarray(full.b)
    lora = LoraConfig(
        rank=rank,
        seed=0,
        train_attn=any(name.rpartition(".")[2] in _ATTENTION for name in found),
        train_mlp=any(name.endswith(("gate_proj", "up_proj", "down_proj")) for name in found),
        train_unembed="unembed" in found,
        alpha=alpha,
        expert_rank=asked if of_experts == own else of_experts,
    )
    return ModelState(replace(lora, sites=_subset(found, lora, sites)), weights)


def _alpha(found: Iterable[_Site], rank: int, of_experts: int) -> float:
    """Of the scale that most dense sites have, so that few B's change; of experts if there are no others."""
    sites = list(found)
    counted = [site for site in sites if not site.is_expert] or sites
    (scale, _), *_ = Counter(site.scale for site in counted).most_common()
    return scale.alpha_at(rank if any(not site.is_expert for site in sites) else of_experts)


def _subset(found: Mapping[str, _Site], lora: LoraConfig, sites: Sequence[LoraSite]) -> tuple[str, ...] | None:
    """The names of the sites, in the model's order; None if the groups that are trained are there whole."""
    groups = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    whole = [site.name for site in sites if groups[site.group]]
    return None if all(name in found for name in whole) else tuple(name for name in whole if name in found)
