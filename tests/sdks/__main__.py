"""``python -m tests.sdks [versions…]``: the matrix of SDK versions against a server of its own, with a tiny model.

Makes the environments that are missing (uv, the package index), starts the server, runs the scenario with one version
after the other, prints the table and what is wrong. Exits 1 if anything is. ``--write`` renews docs/sdks.md, for which
every version has to run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.sdks import matrix
from tests.sdks.environments import VERSIONS, environment
from tests.support.server import Server
from tests.support.tiny_models import write_tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sdks", description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of tinker (default: all that are known)")
    parser.add_argument("--write", action="store_true", help="renew the table in docs/sdks.md")
    arguments = parser.parse_args()
    if arguments.write and tuple(arguments.versions) != VERSIONS:
        parser.error("--write needs every version")
    for version in arguments.versions:
        environment(version)
    with tempfile.TemporaryDirectory(prefix="tx-sdks-") as folder:
        model, data = Path(folder, "model"), Path(folder, "server")
        write_tiny_model(model, "qwen3")
        data.mkdir()
        runs = []
        with Server(model, data) as server:
            for version in arguments.versions:
                print(f"SDK {version} …", file=sys.stderr)
                runs.append(matrix.run(version, server.url))
    print(matrix.as_text(matrix.table(runs)))
    found = matrix.complaints(runs)
    if arguments.write and not found:
        matrix.write_document(runs)
    found += matrix.outdated(runs)
    print("\n".join(["", *found]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
