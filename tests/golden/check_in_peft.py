"""Load an exported checkpoint folder with PEFT and compare its logprobs with those that tx computed.

Run with an environment that has torch, transformers and peft::

    python tests/golden/check_in_peft.py EXPORT_FOLDER BASE_MODEL NUMBERS.json

NUMBERS is ``{"tokens": […], "logprobs": [null, …]}``: what ``compute_logprobs`` of a client on that checkpoint said of
the tokens. Exit code 1 if a logprob differs by more than 1e-3 (tx in float32) or a module has not been attached.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-3


def main(export: str, base: str, numbers: str) -> int:
    given = json.loads(Path(numbers).read_text())
    tokens, logprobs = torch.tensor(given["tokens"]), torch.tensor(given["logprobs"][1:], dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), export)
    missing = [str(warning.message) for warning in caught if "missing" in str(warning.message)]
    written = load_file(Path(export) / "adapter_model.safetensors")
    ours = sum(tensor.double().square().sum() for tensor in written.values())
    theirs = sum(p.double().square().sum() for name, p in model.named_parameters() if "lora_" in name)
    with torch.no_grad():
        table = torch.log_softmax(model.eval()(tokens[None]).logits[0, :-1].double(), -1)
    worst = (table.gather(-1, tokens[1:, None])[:, 0] - logprobs).abs().max().item()
    attached = not missing and torch.isclose(ours, theirs, rtol=1e-9).item()
    print(f"{len(written)} tensors, {'all' if attached else 'NOT all'} attached; largest difference {worst:.2e}")
    return 0 if attached and worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
