"""Loading: released layouts work, anything malformed is an error before a weight is used."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CONFIG, random_llada
from safetensors.torch import save_file

from diffusion_runtime import load
from diffusion_runtime.loading import local_folder
from diffusion_runtime.models import LLaDA

INDEX = "model.safetensors.index.json"


def save(folder: Path, weights: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    config = {"model_type": "llada", "rope": True, **dataclasses.asdict(CONFIG), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_llada().state_dict() if weights is None else weights, folder / "model.safetensors")
    return folder


def save_shards(folder: Path) -> dict[str, str]:
    weights = random_llada().state_dict()
    save(folder, {})
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: x for name, x in weights.items() if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_a_folder(tmp_path):
    model = load(save(tmp_path))
    tokens = torch.randint(0, 60, (2, 9))
    assert torch.equal(model(tokens), random_llada()(tokens))
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert load(str(tmp_path), dtype=torch.float64)(tokens).dtype == torch.float64


def test_shards(tmp_path):
    save_shards(tmp_path)
    expected = random_llada().state_dict()
    for name, weight in load(tmp_path).state_dict().items():
        assert torch.equal(weight, expected[name])


def without(name: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in random_llada().state_dict().items() if k != name}


EMBEDDING, HEAD = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (without(HEAD), f"1 tensors are missing, the first {HEAD}"),
        (without("") | {"model.bias": torch.zeros(1)}, "1 tensors are not of this model, the first model.bias"),
        (without(EMBEDDING) | {EMBEDDING: torch.zeros(61, 63)}, r"wte.weight must be \(61, 64\), got \(61, 63\)"),
        (without(EMBEDDING) | {EMBEDDING: torch.zeros(64, 61)}, r"must be \(61, 64\), got \(64, 61\)"),
        (
            without(EMBEDDING) | {EMBEDDING: torch.zeros(61, 64, dtype=torch.int32)},
            "wte.weight must be floating point, got I32",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path, weights))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: raw[:-8],
        lambda raw: (2**62).to_bytes(8, "little") + raw[8:],
        lambda raw: raw[:8] + b"!" + raw[9:],
        lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        lambda raw: b"PK\x03\x04" + raw,  # a zip archive, as pickled checkpoints are
    ],
    ids=["cut in the header", "empty", "cut in the data", "header length", "not JSON", "offsets", "archive"],
)
def test_malformed_files(tmp_path, spoil):
    file = save(tmp_path) / "model.safetensors"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load(tmp_path)
    (save(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load("./nowhere")


def test_models_of_the_package_have_names(tmp_path, monkeypatch):
    assert load("sudoku").config.vocab_size == 20
    assert local_folder("sudoku").name == "sudoku"
    for name in ("nothing", "sudoku/", Path("sudoku")):
        assert local_folder(name) is None
    monkeypatch.chdir(tmp_path)  # a folder comes first
    (tmp_path / "sudoku").mkdir()
    save(tmp_path / "sudoku")
    assert load("sudoku").config.vocab_size != 20
    with pytest.raises(FileNotFoundError, match="no folder nothing, and no model of this package"):
        load("nothing")


def test_configs(tmp_path):
    save(tmp_path, model_type="gpt2")
    with pytest.raises(ValueError, match="unknown model_type 'gpt2'; known are Dream, "):
        load(tmp_path)
    save(tmp_path, alibi=True)
    with pytest.raises(ValueError, match=r"config.json: the LLaDA config asks for alibi=True"):
        load(tmp_path)
    save(tmp_path, n_layers="two")
    with pytest.raises(ValueError, match=r"config.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)


def test_indexes(tmp_path):
    weight_map = save_shards(tmp_path)
    outside = weight_map | {EMBEDDING: "../model.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(ValueError, match="not a safetensors file beside it"):
        load(tmp_path)
    other = next(file for file in weight_map.values() if file != weight_map[EMBEDDING])
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {EMBEDDING: other}}))
    with pytest.raises(ValueError, match=f"{other} lacks {EMBEDDING}"):
        load(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map | {EMBEDDING: "model-9.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"has no model-9.safetensors"):
        load(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load(tmp_path)


def test_a_repository_id_needs_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"diffusion-runtime\[hub\]"):
        load("owner/name")


def test_a_repository_id_that_is_cached(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: asked.append(name) or str(save(tmp_path)))
    assert load("owner/name").mask_token_id == 60
    assert asked == ["owner/name"]


WATCHED_LOAD = """
import sys, torch
from pathlib import Path
from diffusion_runtime import load, loading

def anonymous():  # what the process holds itself; pages of the mapped file are the system's to drop
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

read, seen = loading._read, []
def watched(*arguments):
    result = read(*arguments)
    seen.append(anonymous())
    return result
loading._read = watched
before = anonymous()
model = load(sys.argv[1], dtype=torch.float32)
print(max(seen) - before, sum(x.nbytes for x in model.state_dict().values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_second_copy_in_memory(tmp_path):
    config = dataclasses.replace(CONFIG, d_model=512, mlp_hidden_size=1024, vocab_size=4096, n_layers=6)
    save(tmp_path, LLaDA(config).bfloat16().state_dict(), **dataclasses.asdict(config))
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    run = [sys.executable, "-c", WATCHED_LOAD, str(tmp_path)]
    printed = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    most, weights = map(int, printed.split())
    largest = 4 * config.vocab_size * config.d_model
    assert weights > 6 * largest
    assert most < weights + largest


@pytest.mark.gpu
def test_no_second_copy_on_a_gpu(tmp_path):
    save(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load(tmp_path, device="cuda", dtype=torch.bfloat16)
    sizes = [x.nbytes for x in model.state_dict().values()]
    assert torch.cuda.max_memory_allocated() - before < sum(sizes) + 3 * max(sizes) + 512 * len(sizes)
