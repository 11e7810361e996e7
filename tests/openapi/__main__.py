"""``python -m tests.openapi --cases 5000``: schemathesis against the app, with a stand-in engine and live ids.

Sends at least that many cases, spread over every operation of the OpenAPI document, and values that no schema can say
besides. Prints what was answered and each failure: a server error, or an answer that the document doesn't have. Exits 1
if there is any. ``--database-url`` of an empty PostgreSQL tries that; SQLite otherwise.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from tests.openapi.lab import Lab


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.openapi", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="at least so many of schemathesis' (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database-url", help="an empty database (default: SQLite)")
    parser.add_argument("--no-hostile", action="store_true", help="only schemathesis' cases")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="tx-openapi-") as folder:
        url = arguments.database_url or f"sqlite:///{folder}/tx.db"
        with Lab(Path(folder), url, arguments.seed) as lab:
            operations = [one for one in lab.operations() if arguments.only in one.label]
            for operation in () if arguments.no_hostile else operations:
                print(f"{operation.label} …", file=sys.stderr, flush=True)
                lab.send_hostile(operation)
            hostile = lab.sent
            for number, operation in enumerate(operations):
                print(f"{lab.sent - hostile} … {operation.label}", file=sys.stderr, flush=True)
                # What the operations before could not use, those that are left do.
                due = max(2, (arguments.cases - (lab.sent - hostile)) / (len(operations) - number))
                lab.fuzz(operation, due)
            while operations and (due := arguments.cases - (lab.sent - hostile)) > 0:
                lab.seed += 1  # some operations have fewer different cases than were due
                for operation in operations:
                    lab.fuzz(operation, due / len(operations))
            print(f"{hostile} hostile cases, {lab.sent - hostile} of schemathesis'")
            print(lab.report())
    return 1 if lab.failures else 0


if __name__ == "__main__":
    sys.exit(main())
