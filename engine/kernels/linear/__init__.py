"""Linear layers with packed weights and fused ends: plain (+ bias), added to the residual, SiLU(gate) * up."""
