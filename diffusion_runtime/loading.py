"""From a folder of safetensors and a ``config.json`` to a model. Nothing in the folder is executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusion_runtime.models import family_of

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
SHIPPED = Path(__file__).parent / "checkpoints"


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Load a released checkpoint.

    Every tensor's presence, shape and dtype is checked before any of them is used.

    Args:
        path: a folder that holds ``config.json`` and ``model.safetensors`` or a sharded
            ``model.safetensors.index.json``; or a model of this package, ``"pycode"`` or ``"sudoku"``; or the id of a
            Hugging Face repository, which needs the ``hub`` extra (with ``HF_HUB_OFFLINE=1`` only what is already in
            its cache is used).
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
    files = _open_shards(folder, torch.device(device))
    found = {name: file for file, opened in files.items() for name in opened.keys()}  # noqa: SIM118
    try:
        model_class, config_class = family_of(config)
        parsed = config_class.from_dict(config).for_tensors(found.keys())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG}: {error}") from error
    with torch.device("meta"), _SkipInitialisation():
        model = model_class(parsed)
    parts = _parts(model)
    _check_tensors(folder, files, found, parts, getattr(model, "unused_tensors", frozenset()))
    parameters = {name for name, _ in model.named_parameters()}
    for name, pieces in parts.items():
        # constants that are not weights stay as precise as they are
        kind = dtype if name in parameters else None
        _assign(model, name, _read(pieces, files, found, kind, torch.device(device)))
    return model.requires_grad_(False).eval()


class _SkipInitialisation(TorchFunctionMode):
    """The weights are about to be replaced; to initialise them on the meta device takes seconds of imports."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def local_folder(path: str | Path) -> Path | None:
    """The folder that ``path`` names, or the model of this package that has that name; None: neither is here."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    return next((entry for entry in SHIPPED.glob("*") if entry.name == path), None)


def _folder(path: str | Path) -> Path:
    folder = local_folder(path)
    if folder is not None:
        return folder
    # an id is "owner/name"; anything else was meant as a folder
    if isinstance(path, Path) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {path}, and no model of this package has that name")
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


def _open_shards(folder: Path, device: torch.device) -> dict[str, Any]:
    """Each file, opened but not read, by its name."""
    from safetensors import SafetensorError, safe_open

    opened: dict[str, Any] = {}
    for file, names in _shards(folder).items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}")
        try:
            opened[file] = safe_open(folder / file, framework="pt", device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / file} is not a safetensors file: {error}") from error
        if absent := names - set(opened[file].keys()):
            raise ValueError(f"{folder / file} lacks {min(absent)}, which {_INDEX} says it holds")
    return opened


class _Piece(NamedTuple):
    """A tensor of a checkpoint, and where in a tensor of the model it belongs."""

    name: str
    whole: Tensor  # the model's, on the meta device
    place: tuple[int | slice, ...]  # () for all of it


def _parts(model: nn.Module) -> dict[str, list[_Piece]]:
    """What each tensor of the model is made of."""
    parts = {name: [_Piece(name, tensor, ())] for name, tensor in model.state_dict().items()}
    for prefix, module in model.named_modules():
        released: dict[str, dict[str, Any]] = getattr(module, "released_parts", dict)()
        for parameter, pieces in released.items():
            whole = module.get_parameter(parameter)
            parts[f"{prefix}.{parameter}"] = [_Piece(f"{prefix}.{n}", whole, place) for n, place in pieces.items()]
    return parts


def _check_tensors(
    folder: Path, files: dict[str, Any], found: dict[str, str], parts: dict[str, list[_Piece]], unused: frozenset[str]
) -> None:
    pieces = {piece.name: piece for several in parts.values() for piece in several}
    if missing := pieces.keys() - found.keys():
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first {min(missing)}")
    if unexpected := found.keys() - pieces.keys() - unused:
        raise ValueError(f"{folder}: {len(unexpected)} tensors are not of this model, the first {min(unexpected)}")
    for name, piece in pieces.items():
        file, stored = folder / found[name], files[found[name]].get_slice(name)
        expected = tuple(piece.whole[piece.place].shape)
        if tuple(stored.get_shape()) != expected:
            raise ValueError(f"{file}: {name} must be {expected}, got {tuple(stored.get_shape())}")
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{file}: {name} must be floating point, got {stored.get_dtype()}")


def _read(
    pieces: list[_Piece],
    files: dict[str, Any],
    found: dict[str, str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> Tensor:
    """One tensor of the model; of a file that is as it should be nothing is copied, and else one piece at a time."""
    first = files[found[pieces[0].name]].get_tensor(pieces[0].name)
    if not pieces[0].place:
        whole: Tensor = first.to(dtype)
        return whole
    whole = torch.empty(pieces[0].whole.shape, dtype=dtype or first.dtype, device=device)
    for piece in pieces:
        whole[piece.place].copy_(files[found[piece.name]].get_tensor(piece.name))
    return whole


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    prefix, _, own = name.rpartition(".")
    module = model.get_submodule(prefix)
    if own in dict(module.named_buffers(recurse=False)):
        setattr(module, own, value)
    else:
        setattr(module, own, nn.Parameter(value, requires_grad=False))
