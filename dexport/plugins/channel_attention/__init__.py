"""DexChannelAttention: DiCo's compact channel attention."""
