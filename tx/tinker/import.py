"""``python -m tx.tinker.import FOLDER``: a PEFT adapter becomes a checkpoint; see ``tx.tinker.adapter_import``."""

from __future__ import annotations

from tx.tinker.adapter_import import main

if __name__ == "__main__":
    main()
