"""Array-agnostic, differentiable arithmetic: the only home of weights and per-row terms.

Seven rules hold for every function here. (1) Arrays in; an array, term columns or `Terms` out; namespace and shapes first.
(2) No randomness, no writes in place, no boolean indexing, no shapes that depend on data: `where` and masks, True counts.
(3) Ratios of log-probabilities are formed in log space, bounded at ±20, in float32 or better. (4) Values are to be
maximised. (5) Gradients are stopped by callers, never behind a flag. (6) Sums over machines enter as a callable.
(7) A fused twin may live beside its caller if a test shows that it equals the primitive.
"""
