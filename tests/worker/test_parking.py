"""Parking: bits through memory and files, the budget, who goes first, disks that fail."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tx.errors import ModelLost
from tx.layers.lora import Adapter, LoraWeights
from tx.worker.adapters import TrainingState
from tx.worker.parking import REST_AFTER_FAILURE_S, Parking

SHAPES = {"q_proj": ((64, 4), (4, 32)), "down_proj": ((3, 16, 2), (3, 2, 64))}
SITE_BYTES = 4 * (64 * 4 + 4 * 32 + 3 * 16 * 2 + 3 * 2 * 64)
PARKED_BYTES = 4 * SITE_BYTES  # weights, two moments, gradients


def adapter(rng: np.random.Generator | None) -> Adapter:
    """Random bits, NaNs with payloads and subnormal numbers among them; None: zeros."""

    def array(shape: tuple[int, ...]) -> np.ndarray:
        if rng is None:
            return np.zeros(shape, np.float32)
        return rng.integers(1, 2**32, shape, np.uint32).view(np.float32)

    sites = {key: LoraWeights(array(a), array(b)) for key, (a, b) in SHAPES.items()}
    return Adapter((sites, {}), None)


def state(seed: int, *, grads: bool = True, **fields) -> TrainingState:
    rng = np.random.default_rng(seed)
    weights, mu, nu, waiting = (adapter(rng) for _ in range(4))
    return TrainingState(**{"weights": weights, "mu": mu, "nu": nu, "grads": waiting if grads else None} | fields)


def arrays(adapter: Adapter | None) -> list[tuple]:
    """Everything that two adapters must share."""
    if adapter is None:
        return []
    return [
        (layer, key, part, array.shape, array.dtype, array.tobytes())
        for layer, sites in enumerate(adapter.layers)
        for key, site in sorted(sites.items())
        for part, array in (("a", site.a), ("b", site.b))
    ]


def same(one: TrainingState, two: TrainingState) -> bool:
    trees = (arrays(getattr(one, part)) == arrays(getattr(two, part)) for part in ("weights", "mu", "nu", "grads"))
    return all(trees) and (one.step, one.is_base) == (two.step, two.is_base)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*"))


@pytest.mark.parametrize("tier", ["memory", "file"])
def test_a_state_comes_back_bit_for_bit(tmp_path: Path, tier: str):
    folder = tmp_path / "parked"
    parking = Parking(2**30 if tier == "memory" else 0, folder)
    fresh = state(3, grads=False, mu=adapter(None), nu=adapter(None), is_base=True)
    wanted = {"trained": state(1, step=7), "stepped": state(2, grads=False, step=2**40), "fresh": fresh}
    for model_id, parked in wanted.items():
        parking.put(model_id, parked)
    assert len(files(folder)) == (3 if tier == "file" else 0)
    for model_id, parked in wanted.items():
        assert same(parking.peek(model_id), parked)
        assert same(parking.peek(model_id), parked), "to look is not to take"
        parking.drop(model_id)
        assert model_id not in parking
    assert parking.num_bytes == 0
    assert files(folder) == []


def test_zeros_take_no_room_but_minus_zero_is_kept(tmp_path: Path):
    parking = Parking(2**30, tmp_path)
    parking.put("fresh", state(1, grads=False, mu=adapter(None), nu=adapter(None)))
    assert parking.num_bytes == SITE_BYTES
    minus = adapter(None)
    minus.layers[0]["q_proj"].a[1, 2] = -0.0
    parking.put("minus", state(1, grads=False, mu=minus, nu=adapter(None)))
    assert same(parking.peek("minus"), state(1, grads=False, mu=minus, nu=adapter(None)))


def test_memory_stays_in_its_budget_and_the_least_recently_used_go_first(tmp_path: Path):
    parking = Parking(3 * PARKED_BYTES, tmp_path)
    first = {}
    for index in range(3):
        parking.put(f"m{index}", state(index))
    assert files(tmp_path) == []
    parking.peek("m0")  # used now: m1 is the oldest
    for index, oldest in ((3, "m1"), (4, "m2"), (5, "m0")):
        before = files(tmp_path)
        parking.put(f"m{index}", state(index))
        (first[oldest],) = set(files(tmp_path)) - set(before)
        assert parking.num_bytes == 3 * PARKED_BYTES
    for model_id, file in first.items():
        parking.drop(model_id)
        assert not file.exists(), f"{model_id} was not the one that went"
    assert all(same(parking.peek(f"m{index}"), state(index)) for index in (3, 4, 5))


def test_a_new_state_takes_the_place_of_the_old(tmp_path: Path):
    for budget in (2**30, 0):
        parking = Parking(budget, tmp_path / str(budget))
        parking.put("m", state(1))
        parking.put("m", state(2, step=1))
        assert same(parking.peek("m"), state(2, step=1))
        assert parking.num_bytes == (PARKED_BYTES if budget else 0)
        assert len(files(tmp_path / str(budget))) == (0 if budget else 1)


def test_without_a_folder_everything_stays_in_memory():
    parking = Parking(0)
    parking.put("m", state(1))
    assert same(parking.peek("m"), state(1))


def test_what_an_earlier_process_left_is_deleted(tmp_path: Path):
    Parking(0, tmp_path).put("m", state(1))
    (tmp_path / "mine.txt").write_text("not ours")
    assert len(files(tmp_path)) == 2
    parking = Parking(0, tmp_path)
    assert files(tmp_path) == [tmp_path / "mine.txt"]
    with pytest.raises(ModelLost, match="m "):
        parking.peek("m")


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_folder_that_cannot_be_written_keeps_states_in_memory(tmp_path: Path, caplog):
    clock, folder = Clock(), tmp_path / "parked"
    folder.write_text("a file where the folder should be")
    parking = Parking(0, folder, clock)
    with caplog.at_level(logging.WARNING):
        for index in range(3):
            parking.put(f"m{index}", state(index))
    assert len(caplog.records) == 1, "not a warning, and not an attempt, for each"
    assert "m0" in caplog.text
    assert all(same(parking.peek(f"m{index}"), state(index)) for index in range(3))
    folder.unlink()
    clock.now_s += REST_AFTER_FAILURE_S
    parking.put("m3", state(3))
    assert parking.num_bytes == 0
    assert all(same(parking.peek(f"m{index}"), state(index)) for index in range(4))


def test_a_disk_that_fills_up_while_writing_loses_nothing(tmp_path: Path):
    """The limit on a file's size makes the kernel refuse to write on, as a full disk does."""
    parking = Parking(0, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (PARKED_BYTES // 2, hard))
    try:
        parking.put("m", state(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(parking.peek("m"), state(1))
    assert parking.num_bytes == PARKED_BYTES
    assert files(tmp_path) == [], "half a file is of no use"


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def _exchange_two_arrays(file: Path) -> None:
    """A valid file in which every array is there, under another's name."""
    stored = load_file(file)
    one, two = [name for name, array in stored.items() if array.shape == (64, 4)][:2]
    save_file(stored | {one: stored[two], two: stored[one]}, file)


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_bit,
        _exchange_two_arrays,
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(b""),
        lambda file: file.unlink(),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["bit", "exchanged", "short", "empty", "gone", "folder"],
)
def test_a_file_that_is_not_what_was_written_is_a_lost_model(tmp_path: Path, damage):
    clock = Clock()
    parking = Parking(0, tmp_path, clock)
    parking.put("m", state(1))
    (file,) = files(tmp_path)
    damage(file)
    with pytest.raises(ModelLost, match="m can't be read back"):
        parking.peek("m")
    assert "m" not in parking
    parking.put("m", state(2))  # rebuilt; the folder is not trusted for a while
    assert parking.num_bytes == PARKED_BYTES
    assert same(parking.peek("m"), state(2))
    clock.now_s += REST_AFTER_FAILURE_S
    parking.put("n", state(3))
    assert parking.num_bytes == 0
    assert same(parking.peek("m"), state(2))
