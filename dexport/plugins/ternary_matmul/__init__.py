"""DexTernaryMatMul: product with ternary weights that stay packed four to a byte."""
