"""What the sampler's tests share: adapters, requests, a driver, and logits from one full forward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.support.tiny_models import write_tiny_model
from tx.layers.logprobs import next_logits
from tx.layers.lora import expert_rank, single_view
from tx.models.loading import load_model
from tx.models.lora_sites import lora_sites
from tx.types import LoraConfig, ModelState, SampleRequest, SamplingParams
from tx.worker.adapters import site_shapes
from tx.worker.generator import Generator
from tx.worker.mesh import make_mesh

EOS = (2022, 2024)
CONTEXT = 512


def random_state(config, rank, seed, scale=0.3):
    """An adapter strong enough to change what is sampled."""
    rng = np.random.default_rng(seed)
    weights = {}
    for site in lora_sites(config):
        own = rank if site.num_experts is None else expert_rank(rank, config.num_experts_per_tok)
        shape_a, shape_b = site_shapes(site, own)
        weights[f"{site.name}.lora_A"] = rng.normal(0, scale, shape_a).astype(np.float32)
        weights[f"{site.name}.lora_B"] = rng.normal(0, scale / own, shape_b).astype(np.float32)
    return ModelState(LoraConfig(rank=rank, seed=seed), weights)


def tiny_model(folder, vocab_size, context):
    """A random Qwen3 of another vocabulary and context than the shared one."""
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": context}
    return load_model(write_tiny_model(folder, "qwen3", **sizes), make_mesh(), jnp.float32)


def detokenize(ids):
    return "".join(f"<{token}>" for token in ids)


def make(model, max_slots=8, **options):
    arguments = {"max_context": CONTEXT, "kv_blocks": 256, "eos_token_ids": EOS, "detokenize": detokenize} | options
    return Generator(model, max_slots=max_slots, **arguments)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 2000, length).astype(np.int32)


def request_of(prompt, num_samples=1, prompt_logprobs=False, topk=0, **params):
    return SampleRequest(np.asarray(prompt, np.int32), num_samples, SamplingParams(**params), prompt_logprobs, topk)


def run(generator, jobs):
    """Submit (job id → request, snapshot) together and drain; results by job id, errors included."""
    for job_id, (request, snapshot) in jobs.items():
        generator.submit(job_id, request, snapshot)
    return drain(generator)


def drain(generator):
    finished = {}
    while generator.has_work:
        for outcome in generator.slice():
            finished[outcome.job_id] = outcome.error or outcome.result
    return finished


def alone(model, request, snapshot=None, **options):
    return run(make(model, **options), {0: (request, snapshot)})[0]


@functools.partial(jax.jit, static_argnames="graphdef")
def _full_logits(graphdef, weights, tokens, view):
    module = nnx.merge(graphdef, weights)
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = module.hidden_states(tokens, positions, adapter=view)
    lora, gate = (None, None) if view is None else (view.adapter.unembed, view.gate)
    return next_logits(hidden, module.unembed_kernel(), lora, gate)


def full_logits(model, tokens, snapshot):
    """Logits at every position of one sequence, padded to one of two lengths so that few programs serve."""
    padded = np.zeros((1, 96 if len(tokens) <= 96 else CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    view = None
    if snapshot is not None:
        view = single_view(
            snapshot.adapter, snapshot.scaling, snapshot.expert_scaling, snapshot.rank, max(1, snapshot.expert_rank)
        )
    return _full_logits(model.graphdef, model.weights, jnp.asarray(padded), view)[0, : len(tokens)]


def log_softmax(logits, temperature=1.0):
    return np.asarray(jax.nn.log_softmax(logits / (temperature or 1.0), axis=-1))


def check_logprobs(model, request, snapshot, sequence):
    """Every sampled token's logprob is that of a full forward over prompt and tokens."""
    tokens = np.concatenate([request.prompt, sequence.tokens])
    logprobs = log_softmax(full_logits(model, tokens, snapshot), request.params.temperature)
    at = np.arange(len(request.prompt) - 1, len(tokens) - 1)
    np.testing.assert_allclose(sequence.logprobs, logprobs[at, sequence.tokens], atol=1e-4)
