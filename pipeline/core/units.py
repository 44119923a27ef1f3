"""Units in which sizes and rates are reported."""

MIB, GIB = 2**20, 2**30
GB = 1e9  # data sheets give bandwidths in powers of ten
GIGA, TERA = 1e9, 1e12
