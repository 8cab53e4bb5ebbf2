"""From a folder of safetensors and a ``config.json`` to a model. Nothing in the folder is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_runtime.models import MODELS

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load a released checkpoint.

    Every tensor's presence, shape and dtype is checked before any of them is used.

    Args:
        path: a folder that holds ``config.json`` and ``model.safetensors`` or a sharded
            ``model.safetensors.index.json``; or the id of a Hugging Face repository, which needs the ``hub`` extra
            (with ``HF_HUB_OFFLINE=1`` only what is already in its cache is used).
        dtype: floating-point dtype of the model. None: that of the checkpoint.
        device: where the weights go.

    Returns:
        the model, in evaluation mode, its parameters without gradients.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: a file that is malformed, an unknown ``model_type`` or configuration, or weights that do not fit it;
            the message names the file and the tensor.
        ImportError: a repository id without huggingface_hub installed.
    """
    folder = _folder(path)
    config = _read_json(folder / _CONFIG)
    model_type = config.get("model_type")
    if model_type not in MODELS:
        raise ValueError(f"{folder / _CONFIG}: unknown model_type {model_type!r}; known are {', '.join(MODELS)}")
    model_class, config_class = MODELS[model_type]
    try:
        parsed = config_class.from_dict(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG}: {error}") from error
    with torch.device("meta"), _SkipInitialisation():
        model = model_class(parsed)
    weights = _read_weights(folder, model.state_dict(), dtype, torch.device(device))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


class _SkipInitialisation(TorchFunctionMode):
    """The weights are about to be replaced; to initialise them on the meta device takes seconds of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    # an id is "owner/name"; anything else was meant as a folder
    if isinstance(path, Path) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {folder}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{path!r} is not a folder; fetching it from the Hugging Face hub needs the extra: "
            "pip install 'diffusion-runtime[hub]'"
        ) from error
    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file.parent} has no {file.name}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold an object, got {type(content).__name__}")
    return content


def _shards(folder: Path) -> dict[str, set[str]]:
    """Which tensors each file is said to hold; of a single file nothing is said."""
    if not (folder / _INDEX).exists():
        return {_WEIGHTS: set()}
    weight_map = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX} has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{folder / _INDEX}: {name} is said to be in {file!r}, not a safetensors file beside it")
        shards.setdefault(file, set()).add(name)
    return shards


def _read_weights(
    folder: Path, expected: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    shards = _shards(folder)
    opened = {}
    for file in shards:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}")
        try:
            opened[file] = safe_open(folder / file, framework="pt", device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is not a safetensors file: {error}") from error
    found = {name: file for file, shard in opened.items() for name in shard.keys()}  # noqa: SIM118
    for file, names in shards.items():
        if absent := names - set(opened[file].keys()):
            raise ValueError(f"{folder / file} lacks {min(absent)}, which {_INDEX} says it holds")
    if missing := expected.keys() - found.keys():
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first {min(missing)}")
    if unexpected := found.keys() - expected.keys():
        raise ValueError(f"{folder}: {len(unexpected)} tensors are not of this model, the first {min(unexpected)}")
    for name, tensor in expected.items():
        _check_header(folder / found[name], name, opened[found[name]].get_slice(name), tensor)
    return {name: opened[found[name]].get_tensor(name).to(dtype) for name in expected}


def _check_header(file: Path, name: str, stored: Any, expected: Tensor) -> None:
    if tuple(stored.get_shape()) != tuple(expected.shape):
        raise ValueError(f"{file}: {name} must be {tuple(expected.shape)}, got {tuple(stored.get_shape())}")
    if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{file}: {name} must be floating point, got {stored.get_dtype()}")
