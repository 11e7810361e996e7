# /// script
# requires-python = ">=3.11"
# dependencies = ["tinker>=0.38", "rich"]
# ///
"""Supervised fine-tuning on GSM8K: the loss falls, the held-out loss with it.

Start a server (`uv run --extra demo -m tx.tinker.api`), fetch the data once (`train.jsonl` and `test.jsonl` of
https://github.com/openai/grade-school-math: one {"question": …, "answer": …} per line), then
`uv run examples/sl_gsm8k.py --train train.jsonl --test test.jsonl`. Ends by saving the weights and solving one
problem with them.
"""

import argparse
import json
import random
from pathlib import Path

import tinker
from rich.progress import track
from tinker import types


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a GSM8K file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prompt_of(row: dict[str, str]) -> str:
    """The question as a one-turn ChatML prompt."""
    return f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"


class Example:
    """One problem as tokens and as weights, which pick the positions that predict the answer."""

    def __init__(self, tokenizer: object, row: dict[str, str], max_length: int) -> None:
        prompt, answer = tokenizer.encode(prompt_of(row)), tokenizer.encode(row["answer"] + "<|im_end|>")
        self.tokens = (prompt + answer)[:max_length]
        self.weights = ([0.0] * (len(prompt) - 1) + [1.0] * len(answer))[: len(self.tokens) - 1]

    def datum(self, scale: float) -> types.Datum:
        """For ``cross_entropy``, weights times ``scale``."""
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.tokens[:-1]),
            loss_fn_inputs={
                "target_tokens": self.tokens[1:],
                "weights": [weight * scale for weight in self.weights],
            },
        )


def batch(examples: list[Example]) -> list[types.Datum]:
    """Data whose summed loss is the mean over the answers' tokens: tx and Tinker add losses up and never divide."""
    scale = 1.0 / sum(sum(example.weights) for example in examples)
    return [example.datum(scale) for example in examples]


def main() -> None:
    """Parse the flags, train, evaluate, sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--base-url", default="http://localhost:8000")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--max-length", type=int, default=512, help="longer examples are cut")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()

    service = tinker.ServiceClient(base_url=flags.base_url, api_key="tml-local")
    training = service.create_lora_training_client(base_model=flags.model, rank=flags.rank, seed=flags.seed).result()
    tokenizer = training.get_tokenizer()
    train, test = read(flags.train), read(flags.test)
    random.Random(flags.seed).shuffle(train)

    held_out = batch([Example(tokenizer, row, flags.max_length) for row in test[: 2 * flags.batch]])

    def evaluate() -> float:
        return training.forward(held_out, "cross_entropy").result().metrics["loss:sum"]

    print(f"held-out loss per token before: {evaluate():.4f}")
    for step in track(range(flags.steps), description="training"):
        rows = [train[(step * flags.batch + i) % len(train)] for i in range(flags.batch)]
        data = batch([Example(tokenizer, row, flags.max_length) for row in rows])
        loss = training.forward_backward(data, "cross_entropy")
        rate = flags.learning_rate * (1 - step / flags.steps)
        training.optim_step(types.AdamParams(learning_rate=rate)).result()
        print(f"step {step:3d}  loss per token {loss.result().metrics['loss:sum']:.4f}")
    print(f"held-out loss per token after:  {evaluate():.4f}")

    print("saved:", training.save_state("gsm8k", overwrite=True).result().path)
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(tokenizer.encode(prompt_of(test[0])))
    params = types.SamplingParams(max_tokens=160, temperature=0.0)
    reply = sampler.sample(prompt, 1, params).result().sequences[0]
    print(test[0]["question"], "→", tokenizer.decode(reply.tokens, skip_special_tokens=True), sep="\n")
    service.close("success").result()


if __name__ == "__main__":
    main()
