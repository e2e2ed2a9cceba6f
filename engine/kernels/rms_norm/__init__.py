"""RMSNorm over rows. The addition of the residual before it is fused into the linear that ends the block instead."""
