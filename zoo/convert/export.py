"""Mamba and Mamba-2 in the format of transformers."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Mamba2Config, MambaConfig, PreTrainedConfig

from statezoo.zoo.convert.mamba import LARGE
from statezoo.zoo.model import StateZooForCausalLM


def to_transformers(net: StateZooForCausalLM, folder: str | Path) -> None:
    """Write a model that transformers reads as ``MambaForCausalLM`` or ``Mamba2ForCausalLM``.

    Args:
        net: A model of ``mamba`` layers alone, or of ``mamba2`` layers alone, all alike, without
            channel mixers.
        folder: Where to write ``config.json`` and ``model.safetensors``.

    Raises:
        ValueError: If transformers has no such model.
    """
    kinds = net.config.layer_mixers
    kind = kinds[0]["name"]
    if kind not in ("mamba", "mamba2") or any(entry != kinds[0] for entry in kinds):
        raise ValueError(
            "transformers has Mamba or Mamba-2 in all layers alike; the model has "
            f"{', '.join(sorted({entry['name'] for entry in kinds}))}."
        )
    if net.config.channel is not None:
        raise ValueError("transformers has no channel mixer beside Mamba; the model has one.")
    config = _mamba(net, kinds[0]) if kind == "mamba" else _mamba2(net, kinds[0])
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.dtype = net.dtype
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(_tensors(net), folder / "model.safetensors", {"format": "pt"})


def _common(net: StateZooForCausalLM, mixer: dict[str, Any]) -> dict[str, Any]:
    expand = mixer["expand"]
    if expand != int(expand):
        raise ValueError(f"transformers needs a whole expand, the model has {expand}.")
    config = net.config
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "state_size": mixer["d_state"],
        "conv_kernel": mixer["d_conv"],
        "expand": int(expand),
        "use_bias": mixer["bias"],
        "use_conv_bias": mixer["conv_bias"],
    }


def _mamba(net: StateZooForCausalLM, mixer: dict[str, Any]) -> PreTrainedConfig:
    if mixer["negative_eigenvalues"]:
        raise ValueError("transformers' Mamba has no negative_eigenvalues; the model has.")
    rank = mixer["dt_rank"]
    return MambaConfig(
        **_common(net, mixer),
        time_step_rank="auto" if rank is None else rank,
        time_step_min=mixer["dt_min"],
        time_step_max=mixer["dt_max"],
    )


def _mamba2(net: StateZooForCausalLM, mixer: dict[str, Any]) -> PreTrainedConfig:
    if mixer["norm_eps"] != net.config.norm_eps:
        raise ValueError(
            "transformers' Mamba-2 has one epsilon for all norms; the model has "
            f"{net.config.norm_eps} between and {mixer['norm_eps']} within its mixers."
        )
    low, high = mixer["dt_limit"] or (0.0, float("inf"))
    common = _common(net, mixer)
    return Mamba2Config(
        **common,
        head_dim=mixer["head_dim"],
        num_heads=common["expand"] * net.config.d_model // mixer["head_dim"],
        n_groups=mixer["n_groups"],
        time_step_limit=[low, float("inf") if high >= LARGE else high],
    )


def _tensors(net: StateZooForCausalLM) -> dict[str, Tensor]:
    """Rename the tensors; those kept wider than the rest go back where that loses nothing."""
    found = {}
    for name, tensor in net.state_dict().items():
        new = name.replace("model.", "backbone.", 1).replace(".mixer_norm.", ".norm.")
        new = new.replace("backbone.norm.", "backbone.norm_f.")
        if name == "lm_head.weight":
            if net.config.tie_embeddings:
                continue
            new = name
        narrow = tensor.to(net.dtype)
        same = torch.equal(narrow.to(tensor.dtype), tensor)
        found[new] = (narrow if same else tensor).detach().cpu().contiguous()
    return found
