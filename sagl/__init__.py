"""sagl: fine-tune ADM diffusion models and sample from them with self-attention guidance."""

__version__ = "0.1.0"
