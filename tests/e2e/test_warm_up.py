"""With --warmup the server is not ready before its usual programs are compiled, and says how far it is."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx

from tests.support.server import Server

SMALL = ("--train-micro-batch-tokens", "16", "--sample-max-num-sequences", "1")


def test_it_is_ready_when_warm_up_has_ended(tiny_qwen3: Path, tmp_path: Path) -> None:
    server = Server(tiny_qwen3, tmp_path, "--warmup", *SMALL, rank=1)
    starting = threading.Thread(target=server.start)
    starting.start()
    details: list[str] = []
    try:
        while starting.is_alive():
            starting.join(0.05)
            try:
                reply = httpx.get(f"{server.url}/api/v1/healthz", timeout=5)
            except httpx.TransportError:
                continue
            log = server.log.read_text()
            if reply.status_code == 200:
                break
            details.append(reply.json()["detail"] or "")
        assert "warmed up" in log
        assert any(detail.startswith("warming up: ") for detail in details)
    finally:
        starting.join()
        server.stop()
