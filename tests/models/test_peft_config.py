"""adapter_config.json: ranks and scales per module as PEFT resolves them."""

from __future__ import annotations

import math

import pytest

from tx.errors import Unsupported
from tx.models.peft_config import Scale, check_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def test_without_patterns_every_module_has_the_same():
    config = check_config(PLAIN)
    assert (config.rank_of(Q0), config.scale_of(Q0).value, config.scale_of("lm_head").value) == (4, 2.0, 2.0)
    assert check_config(PLAIN | {"use_rslora": True}).scale_of(Q0).value == 8 / math.sqrt(4)


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ({"q_proj": 2}, (2, 2)),
        ({"layers.1.self_attn.q_proj": 2}, (4, 2)),
        ({r".*\.0\..*": 3, "q_proj": 2}, (3, 2)),  # the first that matches
        ({"proj": 2}, (4, 4)),  # a key starts at a dot
        ({"q_proj.x": 2}, (4, 4)),
    ],
)
def test_a_pattern_matches_the_end_of_a_name_after_a_dot(pattern: dict[str, int], ranks: tuple[int, int]):
    config = check_config(PLAIN | {"rank_pattern": pattern})
    assert (config.rank_of(Q0), config.rank_of(Q1)) == ranks
    assert check_config(PLAIN | {"alpha_pattern": pattern}).scale_of(Q1).value == (
        (ranks[1] if ranks[1] != 4 else 8) / 4
    )


@pytest.mark.parametrize("rank", [1, 3, 7, 48])
def test_the_alpha_of_the_own_rank_is_exact(rank: int):
    assert Scale(32.0, float(rank)).alpha_at(rank) == 32.0


def test_empty_unknown_fields_are_fine_and_others_are_not():
    assert check_config(PLAIN | {"new": None, "newer": {}, "newest": False}).rank == 4
    with pytest.raises(Unsupported, match="newest"):
        check_config(PLAIN | {"newest": 1})
