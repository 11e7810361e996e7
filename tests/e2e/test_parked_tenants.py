"""A real server with fewer places than tenants: each trains as if it were alone, through a crash of the engine too."""

import os
import signal
from pathlib import Path

from tests.support.server import Server
from tests.support.tenant import Tenant, good_datum

TENANTS = 5


def train_all(tenants: list[Tenant], steps: int) -> list[list[float]]:
    """Losses by step, then tenant; everybody's turn comes before anybody's next."""
    losses = []
    for step in range(steps):
        data = [good_datum(40, seed=step), good_datum(30, seed=step + 100)]
        losses.append([tenant.forward_backward(data).metrics["loss:sum"] for tenant in tenants])
        for tenant in tenants:
            tenant.optim_step()
    return losses


def test_five_tenants_on_two_places(tiny_qwen3: Path, tmp_path: Path) -> None:
    flags = ("--max-lora-adapters", "2", "--parked-adapters-memory", "1")
    with Server(tiny_qwen3, tmp_path, *flags) as server, server.client() as http:
        tenants = [Tenant(http, seed=5) for _ in range(TENANTS)]
        before = train_all(tenants, 2)
        files = set((tmp_path / "parked").glob("*/*"))
        assert len(files) == TENANTS - 2
        (engine,) = server.engine_pids()
        os.kill(engine, signal.SIGKILL)
        after = train_all(tenants, 1)
        left = set((tmp_path / "parked").glob("*/*"))
        assert len(left) == TENANTS - 2
        assert not files & left, "the new engine has emptied the folder"
    losses = before + after
    for step in losses:
        assert len(set(step)) == 1, "the tenants are alike, so their losses are"
    assert losses[0] != losses[1] != losses[2]
