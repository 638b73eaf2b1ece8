"""Any causal language model of Hugging Face behind what the small model offers: logits, with a cache or without.

Prompts are padded on the left: what precedes a row's first token is not seen, and positions count from that token. Padding on the
right follows all that counts, where a causal model does not look. There is no top-k and no top-p: propensities would be of another
distribution than the one that is trained.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ope.data import InputError
from rl_core.rollout import device_of


class HFCache:
    """Keys and values of the tokens so far, and which of those are seen."""

    def __init__(self, held: Any, seen: Tensor) -> None:
        self.held, self.seen = held, seen

    def repeat(self, count: int) -> None:
        """Every row so many times, one after the other: several responses go on from one prompt."""
        self.held.batch_repeat_interleave(count)
        self.seen = self.seen.repeat_interleave(count, dim=0)


class HFModel(nn.Module):
    """A model of `transformers`, without dropout: a propensity is of one policy. `end` and `pad` are what a trainer asks for.

    They may be one token, except where prompts begin with it.
    """

    def __init__(self, model: nn.Module, end: int, pad: int) -> None:
        super().__init__()
        self.model, self.end, self.pad = model.eval(), end, pad
        self.cached = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # its older name

    def forward(self, tokens: Tensor, cache: HFCache | None = None) -> Tensor:
        """Logits (B, S, vocabulary) of what follows each token, in float32. Raises InputError for a prompt of padding alone."""
        seen = (tokens != self.pad).cumsum(dim=1) > 0
        if cache is not None:
            cache.seen = seen = torch.cat((cache.seen, seen | cache.seen.any(dim=1, keepdim=True)), dim=1)
        if not seen[:, -1].all():
            raise InputError("found a prompt of padding alone; expected a token in every row")
        places = (seen.cumsum(dim=1) - 1).clip(min=0)[:, -tokens.shape[1] :]
        held = {} if cache is None else {self.cached: cache.held}
        found = self.model(input_ids=tokens, attention_mask=seen.long(), position_ids=places, use_cache=cache is not None, **held)
        logits: Tensor = found.logits.float()
        return logits

    def cache(self, rows: int, length: int) -> HFCache:
        """For `length` tokens of so many rows. Raises ValueError for more than the model has positions."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and length > positions:
            raise ValueError(f"found {length} tokens; expected at most {positions}, the model's positions")
        seen = torch.zeros(rows, 0, dtype=torch.bool, device=device_of(self))
        return HFCache(_package("transformers").DynamicCache(), seen)


def load(path: str | Path, *, adapter: Any = None, end: int | None = None, pad: int | None = None) -> HFModel:
    """A model from a folder or by its name, in float32; `adapter`: a configuration of peft, whose weights alone are then trained.

    end, pad: tokens, else those of the model's configuration; without padding there, the end pads. Raises InputError for a package
    that is not there, and for an end that is not one token.
    """
    model = _package("transformers").AutoModelForCausalLM.from_pretrained(path).float()
    ends = model.generation_config.eos_token_id if end is None else end
    if not isinstance(ends, int):
        raise InputError(f"{path}: found {ends} as end of a response; expected one token: load(path, end=...)")
    pads = model.generation_config.pad_token_id if pad is None else pad
    if adapter is not None:
        model = _package("peft").inject_adapter_in_model(adapter, model)
    return HFModel(model, ends, ends if pads is None else pads)


def _package(name: str) -> Any:
    """A package that is loaded where it is needed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"found no module {name}, which this Hugging Face model needs. Run `pip install {name}`") from error
