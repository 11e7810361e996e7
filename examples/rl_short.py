# /// script
# requires-python = ">=3.11"
# dependencies = ["tinker>=0.38", "matplotlib", "rich"]
# ///
"""Reinforcement learning in one file: teach the demo model to answer in one short sentence.

Start a server (`uv run --extra demo -m tx.tinker.api`), then `uv run examples/rl_short.py`. In about 15 minutes on two
CPU cores the reward climbs and `rl_short.png` shows its curve. The loop is the whole algorithm: sample a group of
replies per question with the present weights, score them, subtract each group's mean, take one importance-sampling
step. Nothing here is special to tx: point --base-url at any Tinker server.
"""

import argparse
import random
import statistics
import time
from dataclasses import dataclass

import tinker
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tinker import types

TOPICS = """
    the Moon, rain, volcanoes, bread, honey bees, the heart, gravity, whales, trains, chess, salt, the Nile, glass,
    winter, democracy, the piano, coffee, deserts, magnets, dinosaurs, sleep, paper, money, fire, vaccines, tea, robots,
    rivers, football, music, ice, the Sun, bridges, elephants, electricity, maps, poetry, snow, wheat, clocks
"""


@dataclass
class Step:
    """What one step measured."""

    reward: float
    reply_tokens: float
    seconds: float


def reward_of(text: str, num_tokens: int, finished: bool, max_tokens: int) -> float:
    """0 for a reply that is cut off, too short to be a sentence or without a full stop; else more for fewer tokens.

    Dense on purpose: almost every reply differs a little from its neighbours, so every group teaches something.
    """
    if not finished or len(text.split()) < 3 or not text.rstrip().endswith("."):
        return 0.0
    return 1.0 - num_tokens / (max_tokens + 1)


def question(tokenizer: object, topic: str) -> list[int]:
    """Token ids of a one-turn ChatML prompt."""
    return tokenizer.encode(
        f"<|im_start|>user\nAnswer in one short sentence. Tell me about {topic}.<|im_end|>\n<|im_start|>assistant\n"
    )


def datum(prompt: list[int], reply: types.SampledSequence, advantage: float) -> types.Datum:
    """One reply as a training example: position i predicts token i + 1; prompt positions have advantage 0."""
    tokens = prompt + list(reply.tokens)
    before = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "logprobs": [0.0] * before + list(reply.logprobs),
            "advantages": [0.0] * before + [advantage] * len(reply.tokens),
        },
    )


def train_step(
    training: tinker.TrainingClient, tokenizer: object, rng: random.Random, topics: list[str], flags: argparse.Namespace
) -> Step:
    """Draw questions, sample, score, learn."""
    started = time.monotonic()
    sampler = training.save_weights_and_get_sampling_client().result()
    prompts = [question(tokenizer, topic) for topic in rng.sample(topics, flags.questions)]
    futures = []
    for prompt in prompts:  # each with a seed of its own, so that the whole run can be repeated
        params = types.SamplingParams(max_tokens=flags.max_tokens, temperature=1.0, seed=rng.getrandbits(32))
        futures.append(sampler.sample(types.ModelInput.from_ints(prompt), flags.group, params))
    data, rewards, lengths = [], [], []
    for prompt, future in zip(prompts, futures, strict=True):
        replies = future.result().sequences
        scores = [
            reward_of(
                tokenizer.decode(reply.tokens, skip_special_tokens=True),
                len(reply.tokens),
                reply.stop_reason == "stop",
                flags.max_tokens,
            )
            for reply in replies
        ]
        mean, spread = statistics.fmean(scores), statistics.pstdev(scores)
        rewards += scores
        lengths += [len(reply.tokens) for reply in replies]
        if spread > 0:  # a group of equals teaches nothing
            data += [
                datum(prompt, reply, (score - mean) / spread / flags.max_tokens)
                for reply, score in zip(replies, scores, strict=True)
            ]
    if data:
        gradient = training.forward_backward(data, "importance_sampling")
        adam = types.AdamParams(learning_rate=flags.learning_rate, beta2=0.95, grad_clip_norm=1.0)
        training.optim_step(adam).result()
        gradient.result()
    return Step(statistics.fmean(rewards), statistics.fmean(lengths), time.monotonic() - started)


def draw(steps: list[Step], path: str) -> None:
    """Reward and reply length over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(8, 4.5))
    right = left.twinx()
    left.plot([step.reward for step in steps], color="tab:blue", marker="o", markersize=3)
    right.plot([step.reply_tokens for step in steps], color="tab:orange", linestyle="--")
    left.set_xlabel("step")
    left.set_ylabel("mean reward", color="tab:blue")
    left.set_ylim(0, 1)
    right.set_ylabel("tokens per reply", color="tab:orange")
    left.set_title("One short sentence, please: reward by step")
    left.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the flags, train, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--questions", type=int, default=4, help="questions per step")
    parser.add_argument("--group", type=int, default=8, help="replies per question")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the topics, the adapter and the replies")
    parser.add_argument("--plot", default="rl_short.png", help="where the curve goes; empty for none")
    flags = parser.parse_args()

    service = tinker.ServiceClient(base_url=flags.base_url, api_key="tml-local")
    training = service.create_lora_training_client(base_model=flags.model, rank=flags.rank, seed=flags.seed).result()
    tokenizer = training.get_tokenizer()
    topics, rng = [topic.strip() for topic in TOPICS.split(",")], random.Random(flags.seed)
    steps: list[Step] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("reward –", total=flags.steps)
        for number in range(flags.steps):
            step = train_step(training, tokenizer, rng, topics, flags)
            steps.append(step)
            progress.update(bar, advance=1, description=f"reward {step.reward:.2f}")
            measured = f"reward {step.reward:.3f}  {step.reply_tokens:5.1f} tokens per reply  {step.seconds:.1f} s"
            progress.print(f"step {number:3d}  {measured}")
            if flags.plot:
                draw(steps, flags.plot)
    window = max(1, len(steps) // 5)
    first, last = (statistics.fmean(step.reward for step in part) for part in (steps[:window], steps[-window:]))
    print(
        f"mean reward of the first {window} steps {first:.3f}, of the last {window} {last:.3f}; curve in {flags.plot}"
    )
    sampler = training.save_weights_and_get_sampling_client().result()
    prompt = question(tokenizer, "the sea")
    params = types.SamplingParams(max_tokens=flags.max_tokens, temperature=0.0)
    reply = sampler.sample(types.ModelInput.from_ints(prompt), 1, params).result().sequences[0]
    print("about the sea:", tokenizer.decode(reply.tokens, skip_special_tokens=True))
    service.close("success").result()


if __name__ == "__main__":
    main()
