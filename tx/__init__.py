"""tx: a self-hosted service that speaks the Tinker API, in JAX."""

__version__ = "0.1.0"
