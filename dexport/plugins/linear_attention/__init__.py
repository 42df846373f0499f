"""DexLinearAttention: LiT's ReLU linear attention."""
