"""What the decoder-only families share: embedding, layer stack, final norm, head, and the adapter sites."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tx.layers.attention import AttentionShape, Place
from tx.layers.kv_cache import KVBlocks
from tx.layers.lora import AdapterView, LoraSite
from tx.layers.mlp import GatedMlp
from tx.layers.moe import MoeShape, SparseMlp
from tx.layers.norm import RMSNorm
from tx.layers.rotary import rotary_tables
from tx.layers.sharding import constrain
from tx.layers.stack import DecoderLayer, RotaryTables, run_layers
from tx.layers.weights import Kernel, Weight
from tx.models.config import ModelConfig
from tx.models.lora_sites import lora_sites


class Embedding(nnx.Module):
    """The token table: ``[vocab, embed]``, or ``[embed, vocab]`` when it is the head's kernel too.

    Reading columns is the slower look-up, but a head product with the transposed table is slower still: at one row
    15 against 4 ms for a vocabulary of 49k on a 2-core CPU.
    """

    def __init__(self, vocab_size: int, embed: int, *, tied: bool) -> None:
        self.tied = tied
        axes = ("embed", "vocab")
        self.weight = Kernel((embed, vocab_size), axes) if tied else Weight((vocab_size, embed), axes[::-1])

    def __call__(self, tokens: Int[Array, "row seq"]) -> Float[Array, "row seq embed"]:
        """Token ids must be in the vocabulary; they are clipped to it."""
        table = self.weight.get_value()
        if self.tied:
            return jnp.moveaxis(jnp.take(table, tokens, axis=1, mode="clip"), 0, -1)
        return jnp.take(table, tokens, axis=0, mode="clip")


class Head(nnx.Module):
    """An untied unembedding kernel."""

    def __init__(self, embed: int, vocab_size: int) -> None:
        self.weight = Kernel((embed, vocab_size), ("embed", "vocab"))


class DecoderForCausalLM(nnx.Module):
    """A decoder-only language model; families say how their layers differ.

    Attribute names are the checkpoint's, so that a weight's path is its name there (see ``tx.models.loading``).
    """

    qk_norm = False

    def __init__(self, config: ModelConfig, mesh: Mesh | None = None, *, shard_attention_heads: bool = True) -> None:
        self.config = config
        self.mesh = mesh
        attention = self._attention_shape(shard_attention_heads)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, tied=config.tie_word_embeddings)
        self.layers = nnx.List(
            [
                DecoderLayer(attention, self._mlp(layer), eps=config.rms_norm_eps, mesh=mesh)
                for layer in range(config.num_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Head(config.hidden_size, config.vocab_size)

    def _attention_shape(self, shard_heads: bool) -> AttentionShape:
        config = self.config
        tp = 1 if self.mesh is None else self.mesh.shape["tp"]
        return AttentionShape(
            embed=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            head_norm_eps=config.rms_norm_eps if self.qk_norm else None,
            heads_axis="heads" if shard_heads else None,
            kv_axis="kv_heads" if shard_heads and config.num_kv_heads % tp == 0 else None,
        )

    def _mlp(self, layer: int) -> GatedMlp | SparseMlp:
        config = self.config
        if not config.is_moe(layer):
            return GatedMlp(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, mesh=self.mesh)
        shape = MoeShape(
            embed=config.hidden_size,
            ffn=config.moe_intermediate_size,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
        )
        return SparseMlp(shape, self.mesh)

    def hidden_states(
        self,
        tokens: Int[Array, "row seq"],
        positions: Int[Array, "row seq"],
        *,
        adapter: AdapterView | None = None,
        cache: KVBlocks | None = None,
        place: Place | None = None,
        return_cache: bool = False,
    ) -> tuple[Float[Array, "row seq embed"], KVBlocks | None]:
        """Final hidden states (normed) and, if asked for or given, keys and values.

        Without a cache, attention is causal inside each row by index, so padding on the right is harmless, and fresh
        keys and values come back as blocks. With one, ``place`` says what it means: decoding rows write their token
        into the pool, which comes back updated; a continued prompt reads what it has and gives back fresh blocks.
        """
        x, rope = self.embed(tokens, positions)
        layers = list(self.layers)
        x, kept = run_layers(
            layers, x, rope, positions, adapter=adapter, cache=cache, place=place, keep_kv=return_cache
        )
        return self.norm(x), kept

    def embed(
        self, tokens: Int[Array, "row seq"], positions: Int[Array, "row seq"]
    ) -> tuple[Float[Array, "row seq embed"], RotaryTables]:
        """What the first layer sees, and the rotary tables that every layer uses."""
        x = constrain(self.embed_tokens(tokens), ("row", "seq", None), self.mesh)
        return x, rotary_tables(positions, self.config.rope, self.config.head_dim)

    def unembed_kernel(self) -> Float[Array, "embed vocab"]:
        """The head's kernel: its own, or the tied embedding's."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.weight.get_value()

    def lora_sites(self) -> tuple[LoraSite, ...]:
        """Every place of this model that takes an adapter."""
        return lora_sites(self.config)
