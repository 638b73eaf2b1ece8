"""LLM, control, imitation and generative learning on torch, on the estimator primitives of `ope`."""
