"""Gated activations (SiLU and GELU times the up projection) and the soft cap of logits."""
