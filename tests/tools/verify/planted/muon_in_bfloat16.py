"""Planted: Muon orthogonalises in bfloat16 in a run of float32, which magnifies the rounding between layouts."""

from moe_lm.optim import muon

orthogonalise = muon.orthogonalise
muon.orthogonalise = lambda matrices: orthogonalise(matrices.bfloat16()).to(matrices.dtype)
