"""DexTMSA: DiffiT's time-dependent multi-head self-attention with a relative position bias."""
